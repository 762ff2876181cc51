"""Whose a home is: what is made in it is that user's alone, whoever makes it and whatever the umask."""

import os
import pwd
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PRIVATE = 0o077  # the umask: nothing for others
_given: int | None = None  # the umask that the user has given this process, while `private` has another
_turn = threading.RLock()  # of who acts as another user, which is the whole process's


class ForeignHomeError(RuntimeError):
    """The home is another user's; the message is one line and says what to do next."""


def _owner(home: Path) -> tuple[int, int] | None:
    """The user and group of a home that is another user's; None for one of our own, or for none.

    A home of root's is whoever's may write to it, as the folder that a container mounts.
    """
    try:
        found = home.stat()
    except FileNotFoundError:
        return None
    return None if found.st_uid in (os.geteuid(), 0) else (found.st_uid, found.st_gid)


def require_own(home: Path) -> None:
    """That files which are made in the home from here on are its owner's. Raises ForeignHomeError."""
    if owner := _owner(home):
        try:
            name = pwd.getpwuid(owner[0]).pw_name
        except KeyError:
            name = f"#{owner[0]}"  # as sudo takes it
        raise ForeignHomeError(
            f"{home} is the home of the user {name}, who could not use what another makes in it; work "
            f"as that user (sudo -u {name}), or set ATELIER_HOME to another folder"
        )


@contextmanager
def as_owner(home: Path) -> Iterator[None]:
    """What root makes in the `with` block is the home's owner's, as if that user made it; and private.

    Raises ForeignHomeError for another user than root.
    """
    owner = _owner(home)
    if owner is None:
        with private():
            yield
        return
    if os.geteuid() != 0:
        require_own(home)
    with _turn, private():
        groups, group = os.getgroups(), os.getegid()
        try:
            try:
                # All of them: what the owner's files name may be run.
                os.setgroups([owner[1]])
                os.setegid(owner[1])
                os.seteuid(owner[0])
            except OSError:  # root of a container that knows no such user
                require_own(home)
            yield
        finally:
            os.seteuid(0)
            os.setegid(group)
            with suppress(OSError):  # it was not allowed before, either
                os.setgroups(groups)


@contextmanager
def private() -> Iterator[None]:
    """What is made in the `with` block is open to nobody else, but for what `for_people` makes."""
    global _given
    before, outermost = os.umask(PRIVATE), _given is None
    if outermost:
        _given = before
    try:
        yield
    finally:
        os.umask(before)
        if outermost:
            _given = None


@contextmanager
def for_people() -> Iterator[None]:
    """What is made in the `with` block is as open as the user's umask says: it is for elsewhere."""
    if _given is None:
        yield
        return
    before = os.umask(_given)
    try:
        yield
    finally:
        os.umask(before)


def let_pass(path: Path) -> None:
    """Let every user pass through the folders above, if they know what they look for. Raises OSError."""
    for folder in path.absolute().parents:
        mode = folder.stat().st_mode
        if mode & 0o011 != 0o011:
            folder.chmod(mode & 0o7777 | 0o011)

"""Whose a home is: what is made in it is that user's alone, whoever makes it and whatever the umask.

Umask and user are the process's, not a thread's: `private` begins in the main thread, around a whole
command.
"""

import os
import pwd
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PRIVATE = 0o077  # the umask: nothing for others
_users_umask: int | None = None  # while `private` has set another
_turn = threading.RLock()  # of who acts as another user, which is the whole process's


class ForeignHomeError(RuntimeError):
    """The home is another user's; the message is one line and says what to do next."""


def _owner(home: Path) -> tuple[int, int] | None:
    """The user and group of a home that is another user's; None for one of our own, or for none.

    A home that root owns counts as everybody's: containers mount such folders.
    """
    try:
        found = home.stat()
    except (FileNotFoundError, PermissionError):  # a folder above is closed: nothing can be made there
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
            f"as that user (sudo -u {shlex.quote(name)}), or set ATELIER_HOME to another folder"
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
                # The groups too: programs that the owner's files name may be run.
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
    """What is made in the `with` block is open to nobody else, but for `with_users_umask`."""
    global _users_umask
    before, outermost = os.umask(PRIVATE), _users_umask is None
    if outermost:
        _users_umask = before
    try:
        yield
    finally:
        os.umask(before)
        if outermost:
            _users_umask = None


@contextmanager
def with_users_umask() -> Iterator[None]:
    """Files that are made in the `with` block get the user's own umask: they lie outside the home."""
    if _users_umask is None:
        yield
        return
    before = os.umask(_users_umask)
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


def _forget_turn() -> None:
    """In a forked child: another thread may have been acting as another user."""
    global _turn
    _turn = threading.RLock()


os.register_at_fork(after_in_child=_forget_turn)

"""Who owns a home: make all files in it that user's, and closed to other users.

The umask and the user belong to the process, not to a thread. So enter `private` in the main thread,
around a whole command.
"""

import os
import pwd
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PRIVATE = 0o077  # the umask: no access for others
_users_umask: int | None = None  # the user's umask, while `private` has set PRIVATE
_turn = threading.RLock()  # one thread at a time: acting as another user changes the whole process


class ForeignHomeError(RuntimeError):
    """The home belongs to another user; the message is one line and says what to do next."""


def _owner(home: Path) -> tuple[int, int] | None:
    """The other user that owns a home, and its group; None if the home is ours or does not exist.

    A home that root owns counts as ours: containers mount such folders.
    """
    try:
        status = home.stat()
    except (FileNotFoundError, PermissionError):  # the latter: a folder above it is closed to us
        return None
    return None if status.st_uid in (os.geteuid(), 0) else (status.st_uid, status.st_gid)


def require_own(home: Path) -> None:
    """Require that files made in the home will belong to its owner. Raises ForeignHomeError."""
    if owner := _owner(home):
        try:
            name = pwd.getpwuid(owner[0]).pw_name
        except KeyError:
            name = f"#{owner[0]}"  # as sudo takes it
        raise ForeignHomeError(
            f"{home} is the home of the user {name}, who could not use files of another user in it; "
            f"work as that user (sudo -u {shlex.quote(name)}), or set ATELIER_HOME to another folder"
        )


@contextmanager
def as_owner(home: Path) -> Iterator[None]:
    """In the `with` block root acts as the home's owner, and new files are private.

    Raises ForeignHomeError if the home is another user's and this process is not root.
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
                # Drop root's groups too: the owner's files may name programs that we run.
                os.setgroups([owner[1]])
                os.setegid(owner[1])
                os.seteuid(owner[0])
            except OSError:  # a container's root, where that user does not exist
                require_own(home)
            yield
        finally:
            os.seteuid(0)
            os.setegid(group)
            with suppress(OSError):  # changing the groups was not allowed before, either
                os.setgroups(groups)


@contextmanager
def private() -> Iterator[None]:
    """New files in the `with` block are closed to other users, except within `with_users_umask`."""
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
    """New files in the `with` block get the user's umask again: for files outside the home."""
    if _users_umask is None:
        yield
        return
    before = os.umask(_users_umask)
    try:
        yield
    finally:
        os.umask(before)


def let_pass(path: Path) -> None:
    """Let every user pass through the folders above a path, not list them. Raises OSError."""
    for folder in path.absolute().parents:
        mode = folder.stat().st_mode
        if mode & 0o011 != 0o011:
            folder.chmod(mode & 0o7777 | 0o011)


def _forget_turn() -> None:
    """Make a new lock in a forked child: a thread of the parent may have held the old one."""
    global _turn
    _turn = threading.RLock()


os.register_at_fork(after_in_child=_forget_turn)

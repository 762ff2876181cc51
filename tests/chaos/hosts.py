"""Puts a process onto a machine of its own, as the others see it: process ids and host name. Needs root.

What `unshare --pid --uts --fork --kill-child --mount-proc` does for a program, without one.
"""

import ctypes
import os
import signal
import socket

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWPID = 0x20000, 0x4000000, 0x20000000  # sched.h
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000  # mount.h
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36  # prctl.h

_libc = ctypes.CDLL(None, use_errno=True)


def move_to(name: str) -> None:
    """Go on as a process of a new machine. The process that called this one ends as it ends.

    Raises OSError.
    """
    _call("unshare", CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWNS)
    _go_on_in_child()
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    _call("mount", b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    socket.sethostname(name)
    _go_on_in_child()  # process 1 of a machine would be deaf to SIGTERM


def call_process(name: str) -> None:
    """Give this process a name, of at most 15 characters, under which others find it."""
    _call("prctl", PR_SET_NAME, name.encode())


def adopt_orphans() -> None:
    """Become the parent of what the descendants of this process leave behind, to wait for it."""
    _call("prctl", PR_SET_CHILD_SUBREAPER, 1)


def _call(function: str, *arguments: object) -> None:
    if getattr(_libc, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _go_on_in_child() -> None:
    """Fork; the parent waits, and passes the child's end on as a shell does."""
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)

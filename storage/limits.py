"""Limits of the shell and the machine (ulimit): check them, and explain errors that they cause.

This file imports nothing large: it must work where memory is too short for another import.
"""

import errno
import re
import resource
from collections.abc import Iterator

GB, UNLIMITED = 1e9, resource.RLIM_INFINITY
FILES, FILE_BYTES = 1024, 1 << 30  # what a search with its server needs
FEWEST_FILES, LEAST_FILE_BYTES = 128, 64 << 20  # with less the server does not start
LEAST_BYTES = 256 << 20  # of address space; with less, libraries end the process themselves
TORCH_BYTES = 8 * 10**9  # of address space that a worker maps
# What the dynamic linker, glibc, OpenMP and Python say.
_NO_MEMORY = re.compile(r"failed to map|[Cc]annot allocate memory|cannot create shared object")
_NO_THREAD = re.compile(r"can't start new thread|pthread_create|Thread creation failed")


class LimitError(RuntimeError):
    """A limit is too low for this command; the message is one line."""

    exit_code = 1  # the machine's fault, not the input's


def check_process() -> None:
    """Check that any command can run. Raises LimitError."""
    if 0 <= _allowed(resource.RLIMIT_AS) < LEAST_BYTES:
        raise LimitError(_memory())


def check_server() -> None:
    """Check that PostgreSQL can be started from this shell. Raises LimitError."""
    if 0 <= _allowed(resource.RLIMIT_NOFILE) < FEWEST_FILES:
        raise LimitError(_files())
    if 0 <= _allowed(resource.RLIMIT_FSIZE) < LEAST_FILE_BYTES:
        raise LimitError(_file_size())


def too_low() -> Iterator[str]:
    """What this shell allows less of than a search needs, and what to do, in words."""
    for limit, least, in_words in (
        (resource.RLIMIT_NOFILE, FILES, _files),
        (resource.RLIMIT_FSIZE, FILE_BYTES, _file_size),
        (resource.RLIMIT_AS, TORCH_BYTES, _memory),
    ):
        if 0 <= _allowed(limit) < least:
            yield in_words()


def explain(error: BaseException) -> str | None:
    """What is needed after an error that a limit caused, in one line; None for any other error."""
    text = str(error)
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or code == errno.ENOMEM:
        return _memory()
    if isinstance(error, ImportError) and _NO_MEMORY.search(text):
        return _memory()
    if code == errno.EMFILE:
        return _files()
    if code == errno.ENFILE:
        return "the machine allows no more open files; end other programs, or raise fs.file-max"
    if code == errno.EFBIG:
        return _file_size()
    would_block = hasattr(error, "characters_written")  # a write to a full pipe, which is no limit
    if (code == errno.EAGAIN and not would_block) or (
        isinstance(error, RuntimeError) and _NO_THREAD.search(text)
    ):
        return _processes()
    if "No usable temporary directory" in text:
        return "no folder for temporary files is writable; set TMPDIR to one that is"
    return None


def why_killed() -> str:
    """A question that names what may have killed a process that left no message."""
    seconds = _allowed(resource.RLIMIT_CPU)
    time = "" if seconds < 0 else f", and CPU time (ulimit -t is {seconds} s)"
    space = _allowed(resource.RLIMIT_AS)
    memory = "" if space < 0 else f" (ulimit -v is {space >> 10} kB; a worker maps {TORCH_BYTES >> 10})"
    return f"is there enough memory{memory}{time}?"


def cpu_time() -> str:
    """The message for a process that has used up its CPU time."""
    return (
        "the CPU time that this shell allows a process (ulimit -t) is used up: say ulimit -t unlimited, "
        "ask an administrator, or run it in a SLURM job"
    )


def _allowed(limit: int) -> int:
    """The soft limit; -1 for none."""
    soft, _ = resource.getrlimit(limit)
    return -1 if soft == UNLIMITED else soft


def _memory() -> str:
    space = _allowed(resource.RLIMIT_AS)
    if space < 0:
        return "no memory is left; end other programs, ask for more memory, or run fewer workers"
    return (
        f"this shell allows a process {space / GB:.1f} GB of address space (ulimit -v {space >> 10}); "
        f"training needs about {TORCH_BYTES / GB:.0f}: say ulimit -v unlimited, or ask an administrator"
    )


def _files() -> str:
    return (
        f"this shell allows a process {_allowed(resource.RLIMIT_NOFILE)} open files (ulimit -n); "
        f"a search needs {FILES}: say ulimit -n {FILES}, or ask an administrator"
    )


def _file_size() -> str:
    size = _allowed(resource.RLIMIT_FSIZE)
    if size < 0:
        return "a file would be larger than its file system allows; choose another folder"
    return (
        f"this shell allows files of {size / 1e6:.1f} MB (ulimit -f); a search needs "
        f"{FILE_BYTES / GB:.0f} GB: say ulimit -f unlimited, or ask an administrator"
    )


def _processes() -> str:
    most = _allowed(resource.RLIMIT_NPROC)
    allowed = "the machine allows no more" if most < 0 else f"this shell allows {most} (ulimit -u)"
    return f"no further process or thread can be started: {allowed}; end programs, or run fewer workers"

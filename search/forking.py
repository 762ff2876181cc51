"""Processes that begin at once: forked by a server that has imported torch, timm and Optuna.

Those imports take seconds. The standard library's fork server pays for them once, and what it forks
shares the memory of it. It runs no thread of Python's and touches no GPU, so a child is as good as new.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from search.exit_codes import ExitCode
from storage import limits
from storage.ownership import PRIVATE

OWN_FOLDER = str(Path(__file__).resolve().parents[1])
LONGEST_SOCKET_FOLDER = 75  # bytes; with what the fork server adds, it must be within the kernel's 107
# Ctrl-C, and what ends a whole job: for this process, which passes it on. The server only forks.
NOT_FOR_THE_SERVER = {signal.SIGINT, signal.SIGTERM}

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["search.preload"])


def start_server() -> None:
    """Begin with the imports, beside whatever this process does next. Nothing to do if it runs."""
    folder = tempfile.gettempdir()
    # A folder named search, where the user stands or PYTHONPATH leads to, is not this package.
    paths = [OWN_FOLDER, *filter(None, [os.environ.get("PYTHONPATH")])]
    for_the_server = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}
    before = {name: os.environ.get(name, "") for name in for_the_server}  # empty is as good as unset
    os.environ.update(for_the_server)
    if len(os.fsencode(folder)) > LONGEST_SOCKET_FOLDER:
        tempfile.tempdir = "/tmp"
    resource_tracker.ensure_running()  # else the server's start does it, which unblocks the signals
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_THE_SERVER)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        tempfile.tempdir = folder
        os.environ.update(before)


def start(
    target: Callable[..., object], *arguments: object, environment: Mapping[str, str], output: Path
) -> ForkServerProcess:
    """Call a module's function in a process of its own, with this environment; it appends to `output`.

    Its exit code is what the function gives sys.exit, 1 after an error, else 0. It gets no Ctrl-C, and
    asks `multiprocessing.parent_process()` whether this process is still there.
    """
    start_server()
    given = (target, arguments, dict(environment), os.fspath(output))
    return _started(context.Process(target=_run, args=given))


def _started(process: ForkServerProcess) -> ForkServerProcess:
    """Raises CallFailedError if the server has ended."""
    try:
        process.start()
    except (EOFError, ConnectionError):
        raise CallFailedError(
            f"the process that imports torch, for all others, has ended; {limits.why_killed()}"
        ) from None
    return process


def _run(
    target: Callable[..., object],
    arguments: tuple[object, ...],
    environment: dict[str, str],
    output: str,
) -> None:
    _leave_group()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    for name in ("stdout", "stderr"):  # whatever the terminal's encoding is
        getattr(sys, name).reconfigure(encoding="utf-8", errors="backslashreplace")
    _take_environment(environment)
    target(*arguments)


def _take_environment(environment: dict[str, str]) -> None:
    os.environ.clear()  # the server's, which is as old as that
    os.environ.update(environment)


def _leave_group() -> None:
    """Signals to the terminal's or the job's processes do not come here; those to this one do."""
    os.umask(PRIVATE)  # the server may have been started under another; these write into the home
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOT_FOR_THE_SERVER)


class CallFailedError(RuntimeError):
    """The process of a call has ended without an answer; the message is one line."""

    exit_code = ExitCode.FAILED


def call(function: Callable[..., Any], *arguments: object) -> Any:
    """What a module's function returns or raises, called in a process of its own with our environment.

    Raises CallFailedError if that was killed.
    """
    start_server()
    receiver, sender = context.Pipe(duplex=False)
    given = (sender, dict(os.environ), function, arguments)
    process = _started(context.Process(target=_answer, args=given))
    assert process.pid is not None  # it has started
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        end = f"has ended with {process.exitcode}"
        raise CallFailedError(
            f"the process of {function.__name__} {end}; {limits.why_killed()}"
        ) from None
    except KeyboardInterrupt:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGINT)  # it cleans up
        try:
            process.join()
        except KeyboardInterrupt:
            process.kill()
        raise
    finally:
        receiver.close()
    process.join()
    if error is not None:
        raise error
    return result


def _answer(
    sender: Connection,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[object, ...],
) -> None:
    _leave_group()
    _take_environment(environment)
    # The caller that was interrupted, or killed, does not wait for the answer.
    with suppress(KeyboardInterrupt, BrokenPipeError):
        answer: tuple[Any, Exception | None]
        try:
            answer = function(*arguments), None
        except Exception as error:  # the caller's to judge
            error.add_note(traceback.format_exc())
            answer = None, error
        sender.send(answer)

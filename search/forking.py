"""Processes that start at once, since they are forked from a server that has imported torch.

To import torch, timm and Optuna takes seconds. The standard library's fork server does it once, and its
children share that memory. It runs no Python thread and touches no GPU, so a child is as good as new.
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

from search.errors import SearchError
from storage import limits
from storage.ownership import PRIVATE

PROJECT_FOLDER = str(Path(__file__).resolve().parents[1])
LONGEST_SOCKET_FOLDER = 75  # bytes; the fork server adds to it, and the kernel allows 107
# Ctrl-C, and the signal that ends a whole job. This process passes them on; the server ignores them.
NOT_FOR_THE_SERVER = {signal.SIGINT, signal.SIGTERM}

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["search.cli.preload"])


def start_server() -> None:
    """Start the server, if it does not run yet. It imports while this process goes on."""
    folder = tempfile.gettempdir()
    # The user's folder, or one on PYTHONPATH, may hold another package named search.
    paths = [PROJECT_FOLDER, *filter(None, [os.environ.get("PYTHONPATH")])]
    for_the_server = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}
    before = {name: os.environ.get(name, "") for name in for_the_server}  # empty means unset to Python
    os.environ.update(for_the_server)
    if len(os.fsencode(folder)) > LONGEST_SOCKET_FOLDER:
        tempfile.tempdir = "/tmp"
    resource_tracker.ensure_running()  # now: the server's start would do it, and unblock the signals
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
    """Call a module's function in a process of its own, with this environment.

    The process appends what it prints to `output`. It exits with what the function gives to sys.exit,
    with 1 after an error, else with 0. It gets no Ctrl-C. To see whether this process still runs, it
    asks `multiprocessing.parent_process()`. Raises CallFailedError if the server has ended.
    """
    start_server()
    details = (target, arguments, dict(environment), os.fspath(output))
    return _started(context.Process(target=_run, args=details))


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
    os.environ.clear()  # it is the one that the server was started with
    os.environ.update(environment)


def _leave_group() -> None:
    """Leave the group that Ctrl-C and the end of a job signal. Signals to this process still come."""
    os.umask(PRIVATE)  # the server may have another umask, and this process writes into the home
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOT_FOR_THE_SERVER)


class CallFailedError(SearchError):
    """The process of a call has ended without an answer."""


def call(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a module's function in a process of its own, and return or raise what it does there.

    The process has this one's environment. Raises CallFailedError if it was killed.
    """
    start_server()
    receiver, sender = context.Pipe(duplex=False)
    details = (sender, dict(os.environ), function, arguments)
    process = _started(context.Process(target=_answer, args=details))
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
            os.kill(process.pid, signal.SIGINT)  # so that it can clean up
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
    # A caller that was interrupted or killed does not wait for the answer.
    with suppress(KeyboardInterrupt, BrokenPipeError):
        answer: tuple[Any, Exception | None]
        try:
            answer = function(*arguments), None
        except Exception as error:  # the caller raises it
            error.add_note(traceback.format_exc())
            answer = None, error
        sender.send(answer)

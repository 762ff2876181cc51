"""Processes that begin at once: forked by a server that has imported torch, timm and Optuna.

Those imports take seconds. The standard library's fork server pays for them once, and what it forks
shares the memory of it. It starts no thread and touches no GPU, so its children are as good as new.
"""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

LONGEST_SOCKET_FOLDER = 75  # bytes; what the fork server adds to it must stay below the kernel's 107

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["search.preload"])


def start_server() -> None:
    """Begin with the imports, beside whatever this process does next. Nothing to do if it runs."""
    folder, safe = tempfile.gettempdir(), os.environ.get("PYTHONSAFEPATH", "")
    os.environ["PYTHONSAFEPATH"] = (
        "1"  # a folder named search, where the user stands, is not this package
    )
    if len(os.fsencode(folder)) > LONGEST_SOCKET_FOLDER:
        tempfile.tempdir = "/tmp"
    # Ctrl-C in the terminal is for this process alone, also while the server is starting.
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        tempfile.tempdir, os.environ["PYTHONSAFEPATH"] = folder, safe  # empty is as good as unset


def start(
    target: Callable[..., object], *arguments: object, environment: Mapping[str, str], output: Path
) -> ForkServerProcess:
    """Call a module's function in a process of its own, with this environment; it appends to `output`.

    Its exit code is what the function gives sys.exit, 1 after an error, else 0. It gets no Ctrl-C, and
    asks `multiprocessing.parent_process()` whether this process is still there.
    """
    start_server()
    call = (target, arguments, dict(environment), os.fspath(output))
    process = context.Process(target=_run, args=call)
    process.start()
    return process


def _run(
    target: Callable[..., object],
    arguments: tuple[object, ...],
    environment: dict[str, str],
    output: str,
) -> None:
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    target(*arguments)


class CallFailedError(RuntimeError):
    """The process of a call was killed; the message is one line."""


def call(function: Callable[..., Any], *arguments: object) -> Any:
    """What a module's function returns or raises, called in a process of its own.

    Raises CallFailedError if that was killed.
    """
    start_server()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise CallFailedError(
            f"the process that had to {function.__name__} was killed ({_end(process)}); is there enough "
            "memory?"
        ) from None
    except KeyboardInterrupt:
        os.kill(process.pid or 0, signal.SIGINT)  # it cleans up
        raise
    finally:
        process.join()
        receiver.close()
    if error is not None:
        raise error
    return result


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        sender.send((function(*arguments), None))
    except KeyboardInterrupt:
        pass  # the caller was interrupted, and does not wait for the answer
    except Exception as error:  # the caller's to judge
        sender.send((None, error))


def _end(process: ForkServerProcess) -> str:
    code = process.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"

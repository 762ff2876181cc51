"""The process that runs a command: its streams, its environment, its arguments, and how it ends."""

import os
import re
import signal
import sys
from types import FrameType

import typer

from dashboards.terminal import say
from search.cli.errors import errors_in_one_line
from search.errors import InputError
from search.exit_codes import ExitCode
from storage import limits

MOST_THREADS = 4096


def check_arguments(arguments: list[str]) -> None:
    """Check what any command needs: enough memory, and text in arguments and environment.

    Neither the database nor JSON can hold bytes that are no text. Raises LimitError, InputError.
    """
    limits.check_process()
    for argument in arguments:
        _check_encoding(f"the argument {_shown(argument)}", argument, "give it another name")
    for name, value in os.environ.items():
        if name.startswith("ATELIER_") or name in ("HOME", "TMPDIR"):
            _check_encoding(name, value, "set it to another")  # unquoted: it may hold a password
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise InputError("the folder that you are in is gone; cd to another") from None
    _check_encoding(f"the folder that you are in, {_shown(here)},", here, "cd to another, or rename it")


def _check_encoding(what: str, text: str, remedy: str) -> None:
    encoding = sys.getfilesystemencoding()
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        other = "" if encoding == "utf-8" else ", or set LC_ALL=C.UTF-8 and no PYTHONUTF8"
        raise InputError(f"{what} is no text in {encoding.upper()}; {remedy}{other}")


def _shown(text: str) -> str:
    r"""The text in quotes, with bytes that cannot be decoded as \xNN."""
    return repr(os.fsencode(text).decode("utf-8", "backslashreplace")).replace("\\\\x", "\\x")


def check_threads() -> None:
    """Raises InputError for a number of threads that OpenMP or PyTorch would not take."""
    for name in ("OMP_NUM_THREADS", "ATELIER_CPUS"):
        text = os.environ.get(name, "")
        # OpenMP takes a number for each level of nesting.
        numbers = text.split(",") if name == "OMP_NUM_THREADS" else [text]
        if text.strip() and not all(map(_is_number_of_threads, numbers)):
            raise InputError(
                f"{name}={text!r}: allowed is a number from 1 to {MOST_THREADS}; unset it for all CPUs"
            )


def _is_number_of_threads(text: str) -> bool:
    return re.fullmatch(" *[0-9]{1,9} *", text) is not None and 0 < int(text) <= MOST_THREADS


def ready_streams() -> None:
    """Make sure that stdin, stdout and stderr are open, and that any text can be written.

    A character that the encoding lacks is written as an escape, as in a string of Python's. A stream
    that was closed becomes /dev/null. Otherwise the next file that is opened would take its number, and
    get the output of other programs.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            setattr(sys, name, os.fdopen(opened, "w" if number else "r", encoding="utf-8"))
        if number:
            getattr(sys, name).reconfigure(errors="backslashreplace")


def run(app: typer.Typer, arguments: list[str] | None) -> None:
    """Run the command and exit. An error at the very end, as of a full disk, is one line too."""
    signal.signal(signal.SIGXCPU, _end_out_of_time)
    try:
        with errors_in_one_line():
            code = app(arguments, prog_name="atelier", standalone_mode=False) or ExitCode.DONE
            if code == ExitCode.DONE:  # otherwise an error was already reported
                sys.stdout.flush()
    except typer.Exit as end:
        code = end.exit_code
    except typer.TyperException as error:  # no verb at all, which is answered with the help
        say(error.format_message())
        code = error.exit_code
    except (BrokenPipeError, typer.Abort):  # nobody reads on, or nobody answered the prompt
        code = ExitCode.FAILED
    sys.exit(_leave(code))


def _end_out_of_time(_: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)  # it comes every second
    say(f"error: {limits.cpu_time()}")
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(ExitCode.FAILED)  # an exception would abort the process inside torch's import
        frame = frame.f_back
    raise SystemExit(ExitCode.FAILED)  # code that is at work may catch any other


def _leave(code: int) -> int:
    """Flush the streams. What cannot be written is dropped, so that Python's own exit does not fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code

"""What all verbs share: errors in one line, and the study that a user names."""

import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dashboards.terminal import printable
from search.exit_codes import ExitCode
from search.slurm.granted import take_granted
from storage import limits
from storage.ownership import ForeignHomeError, private, require_own

if TYPE_CHECKING:
    import sqlalchemy as sa

    from storage.studies import StudyEntry

MOST_THREADS = 4096
DATABASE_MODULES = {"sqlalchemy", "optuna", "psycopg2"}  # whose errors storage.faults judges
StudyName = Annotated[str, typer.Argument(help="Study name, or its study file.")]


class Verbs(TyperGroup):
    """The verbs of a command: what is wrong with their options and arguments is one line too."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Read the options that stand before the verb."""
        with errors_in_one_line():
            limits.check_process()
            _check_text(args)
        with _usage_in_one_line(None):
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Read the verb's options and arguments, and run it."""
        with errors_in_one_line():
            _check_threads()
            take_granted()
        with _usage_in_one_line(ctx), private():
            return super().invoke(ctx)


class NotTextError(ValueError):
    """A word from outside that is no text in this process's encoding; the message is one line."""


class SettingError(ValueError):
    """A variable of the environment says what cannot be; the message is one line."""


def _check_threads() -> None:
    """Raises SettingError."""
    for name in ("OMP_NUM_THREADS", "ATELIER_CPUS"):
        text = os.environ.get(name, "")
        # OpenMP takes a number for each level of nesting.
        numbers = text.split(",") if name == "OMP_NUM_THREADS" else [text]
        if text.strip() and not all(map(_is_number_of_threads, numbers)):
            raise SettingError(
                f"{name}={text!r}: allowed is a number from 1 to {MOST_THREADS}; unset it for all CPUs"
            )


def _is_number_of_threads(text: str) -> bool:
    return re.fullmatch(" *[0-9]{1,9} *", text) is not None and 0 < int(text) <= MOST_THREADS


def _check_text(arguments: list[str]) -> None:
    """Raises NotTextError for bytes from outside that neither a database nor JSON can hold."""
    for argument in arguments:
        _check_encoding(f"the argument {_shown(argument)}", argument, "give it another name")
    for name, value in os.environ.items():
        if name.startswith("ATELIER_") or name in ("HOME", "TMPDIR"):
            _check_encoding(name, value, "set it to another")  # unquoted: it may hold a password
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise NotTextError("the folder that you are in is gone; cd to another") from None
    _check_encoding(f"the folder that you are in, {_shown(here)},", here, "cd to another, or rename it")


def _check_encoding(what: str, text: str, remedy: str) -> None:
    encoding = sys.getfilesystemencoding()
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        other = "" if encoding == "utf-8" else ", or set LC_ALL=C.UTF-8 and no PYTHONUTF8"
        raise NotTextError(f"{what} is no text in {encoding.upper()}; {remedy}{other}")


def _shown(text: str) -> str:
    r"""With the bytes that are no text as \xNN."""
    return repr(os.fsencode(text).decode("utf-8", "backslashreplace")).replace("\\\\x", "\\x")


def ready_streams() -> None:
    """Let any text be written to stdout and stderr, and both be there.

    What an encoding has no letter for is written as Python writes it in a string. What was closed is
    /dev/null: else the next file that is opened would get the output of other programs.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            setattr(sys, name, os.fdopen(opened, "w" if number else "r", encoding="utf-8"))
        if number:
            getattr(sys, name).reconfigure(errors="backslashreplace")


def run(app: typer.Typer, arguments: list[str] | None) -> None:
    """Run the whole command; what its verbs do not meet, as a full disk at the end, is one line too."""
    signal.signal(signal.SIGXCPU, _end_out_of_time)
    try:
        with errors_in_one_line():
            code = app(arguments, standalone_mode=False) or ExitCode.DONE
            if code == ExitCode.DONE:  # else there is an error already
                sys.stdout.flush()
    except typer.Exit as end:
        code = end.exit_code
    except typer.TyperException as error:  # no verb at all, which is answered with the help
        say(error.format_message())
        code = error.exit_code
    except (BrokenPipeError, typer.Abort):  # who read it has seen enough; who was asked says no more
        code = ExitCode.FAILED
    sys.exit(_leave(code))


def _end_out_of_time(*_: object) -> None:
    """Not by an error: whoever is at work, as torch's import, may take that for one of its own."""
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)  # it comes every second
    say(f"error: {limits.cpu_time()}")
    raise SystemExit(ExitCode.FAILED)


def _leave(code: int) -> int:
    """What could not be written is not tried again when the interpreter ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


@contextmanager
def _usage_in_one_line(group: Any) -> Iterator[None]:
    """`group` is the context of the command whose verb is read; None while there is none."""
    try:
        yield
    except typer.TyperException as error:
        context: Any = getattr(error, "ctx", None)
        if context is not None and error.message == context.get_help():
            raise  # no arguments at all: it is the help
        words = []
        if context is None and group is not None:  # the parser knows none
            context, words = group, [group.invoked_subcommand]
        while context is not None and context.parent is not None:
            context, words = context.parent, [context.info_name, *words]
        say(f"error: {printable(_usage(error))}; see: {shlex.join(['atelier', *words, '--help'])}")
        raise typer.Exit(ExitCode.WRONG_INPUT) from None


def _usage(error: typer.TyperException) -> str:
    from pydantic import ValidationError

    from search.typed import in_our_words

    if (
        isinstance(error, typer.BadParameter)
        and error.param
        and isinstance(error.__cause__, ValidationError)
    ):
        name = error.param.get_error_hint().replace("'", "")
        return f"{name}: {in_our_words(error.__cause__.errors()[0])}"
    text = error.format_message().rstrip(".")
    return text[:1].lower() + text[1:]


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Known errors end the command with one line; anything else keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted; the same command, given again, goes on")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except Exception as error:  # `one_line` tells the user's from ours, which are raised again
        line = one_line(error)
        if line is None:
            raise
        say(f"error: {line}")
        # An error that is not the input's fault says so itself.
        failed = limits.explain(error) or _may_pass(error)
        code = ExitCode.FAILED if failed else getattr(error, "exit_code", ExitCode.WRONG_INPUT)
        raise typer.Exit(code) from None


def one_line(error: Exception) -> str | None:
    """What the user is told of an error, printable and in one line; None if it is a fault of ours."""
    words = _words(error)
    return None if words is None else printable(words)


def _words(error: Exception) -> str | None:
    if said := limits.explain(error):  # first: with no memory left, or no file, nothing can be imported
        return said
    if isinstance(error, UnicodeEncodeError | UnicodeDecodeError):
        found = error.object[error.start : error.end]
        return (
            f"{found!r} is no text in {error.encoding.upper()}; give it in UTF-8, and use a locale that "
            "has it (LC_ALL=C.UTF-8)"
        )
    if isinstance(error, BrokenPipeError):
        return None  # `run` ends it
    if isinstance(error, OSError) and (said := _of_the_system(error)):
        return said
    # By the module, not by the class, which would have to be imported, and torch with it.
    origin = type(error).__module__.partition(".")[0]
    if origin in DATABASE_MODULES:
        from storage.faults import ErrorKind, classify, explain

        return None if classify(error) is ErrorKind.OURS else f"the database: {explain(error)}"
    return str(error) if origin in {"search", "dashboards", "storage", "trainer"} else None


def _of_the_system(error: OSError) -> str | None:
    from storage.paths import home

    if error.errno in (errno.ENOSPC, errno.EDQUOT):  # names no file
        return (
            f"{error.strerror}, in ATELIER_HOME ({home()}) or where the output goes; free some, or "
            "choose another place"
        )
    if error.filename is not None:
        own = Path(str(error.filename)).absolute().is_relative_to(home())
        if own and isinstance(error, PermissionError):
            try:
                require_own(home())
            except ForeignHomeError as foreign:
                return str(foreign)
        other = "set ATELIER_HOME to another folder" if own else "choose another path"
        return f"cannot use {error.filename}: {error.strerror}; {other}"
    if error.errno in (errno.EIO, errno.ESTALE, errno.EROFS, errno.ENOLCK, errno.ENODEV, errno.ENXIO):
        return f"the system says: {error.strerror}; mend that, then give the same command again"
    return None


def _may_pass(error: Exception) -> bool:
    """Whether it is the database's that was away for longer than anybody waits: no wrong input."""
    if type(error).__module__.partition(".")[0] not in DATABASE_MODULES:
        return False
    from storage.faults import is_transient

    return is_transient(error)


def say(text: str) -> None:
    with suppress(OSError):  # nobody can be told that nobody can be told
        typer.echo(text, err=True)


def find_study(name_or_file: str) -> tuple["sa.Engine", "StudyEntry"]:
    """Find a study that exists, by its name or its file."""
    from search.errors import InputError
    from search.toml_file import load_study_file
    from storage import database, schema
    from storage.studies import study_entry, study_names
    from trainer.text import same_letters

    name = name_or_file
    if name.endswith(".toml") and Path(name).is_file():
        name = load_study_file(Path(name)).study.name
    engine = database.look()
    if schema.schema_revision(engine) is None:
        raise InputError("the database has no study yet; start one with: atelier search STUDY.toml")
    schema.require_schema(engine)
    entry = study_entry(engine, name) or study_entry(engine, same_letters(name))
    if entry is None:
        known = ", ".join(study_names(engine)) or "none"
        raise InputError(f"no study {name!r} in the database; it has: {known}")
    return engine, entry

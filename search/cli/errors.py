"""Every error of a command becomes one line on stderr and an exit code."""

import errno
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer

from dashboards.terminal import printable
from search.exit_codes import ExitCode
from storage import limits
from storage.ownership import ForeignHomeError, require_own
from storage.paths import home

OUR_PACKAGES = {"search", "dashboards", "storage", "trainer"}
DATABASE_PACKAGES = {"sqlalchemy", "optuna", "psycopg2"}  # storage.faults explains their errors


def say(text: str) -> None:
    """Print a line to stderr."""
    with suppress(OSError):  # if stderr cannot be written, there is no other way to tell
        typer.echo(text, err=True)


@contextmanager
def errors_in_one_line(group: Any = None) -> Iterator[None]:
    """End the command with one line for any error that is not a fault of ours, which is raised again.

    `group` is the context of the group whose verb is read, if there is one. Raises typer.Exit.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        say("interrupted; the same command, given again, goes on")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except typer.TyperException as error:
        if _is_help(error):
            raise
        say(f"error: {printable(_usage(error))}; see: {_help_command(error, group)}")
        raise typer.Exit(ExitCode.WRONG_INPUT) from None
    except Exception as error:  # `one_line` tells the user's from ours, which are raised again
        line = one_line(error)
        if line is None:
            raise
        say(f"error: {line}")
        raise typer.Exit(_exit_code(error)) from None


def _is_help(error: Any) -> bool:
    """Whether no arguments were given at all: then the message is the help."""
    context = getattr(error, "ctx", None)
    return context is not None and error.message == context.get_help()


def _help_command(error: Any, group: Any) -> str:
    """The command that shows the help of the verb whose options are wrong."""
    context, words = getattr(error, "ctx", None), []
    if context is None and group is not None:  # errors of the parser have no context
        context, words = group, [group.invoked_subcommand]
    while context is not None and context.parent is not None:
        context, words = context.parent, [context.info_name, *words]
    return shlex.join(["atelier", *words, "--help"])


def _usage(error: typer.TyperException) -> str:
    """What is wrong with an option or an argument."""
    details = getattr(error.__cause__, "errors", None)  # of pydantic's ValidationError
    if isinstance(error, typer.BadParameter) and error.param and details:
        from search.typed import in_our_words  # late: `atelier --help` would wait for pydantic

        name = error.param.get_error_hint().replace("'", "")
        return f"{name}: {in_our_words(details()[0])}"
    text = error.format_message().rstrip(".")
    return text[:1].lower() + text[1:]


def one_line(error: Exception) -> str | None:
    """What the user is told of an error, printable and in one line; None if it is a fault of ours."""
    text = _text(error)
    return None if text is None else printable(text)


def _text(error: Exception) -> str | None:
    if explanation := limits.explain(error):  # first: without memory or files nothing can be imported
        return explanation
    if isinstance(error, UnicodeEncodeError | UnicodeDecodeError):
        wrong = error.object[error.start : error.end]
        return (
            f"{wrong!r} is no text in {error.encoding.upper()}; give it in UTF-8, and use a locale that "
            "has it (LC_ALL=C.UTF-8)"
        )
    if isinstance(error, BrokenPipeError):
        return None  # `run` ends the command
    if isinstance(error, OSError) and (explanation := _explain_os_error(error)):
        return explanation
    # By the package's name. Its classes would have to be imported, and torch with them.
    package = _package(error)
    if package in DATABASE_PACKAGES:
        return _explain_database_error(error)[0]
    return str(error) if package in OUR_PACKAGES else None


def _package(error: Exception) -> str:
    return type(error).__module__.partition(".")[0]


def _explain_os_error(error: OSError) -> str | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):  # such an error names no file
        return (
            f"{error.strerror}, in ATELIER_HOME ({home()}) or where the output goes; free some, or "
            "choose another place"
        )
    if error.filename is not None:
        in_home = Path(str(error.filename)).absolute().is_relative_to(home())
        if in_home and isinstance(error, PermissionError):
            try:
                require_own(home())
            except ForeignHomeError as foreign:
                return str(foreign)
        remedy = "set ATELIER_HOME to another folder" if in_home else "choose another path"
        return f"cannot use {error.filename}: {error.strerror}; {remedy}"
    if error.errno in (errno.EIO, errno.ESTALE, errno.EROFS, errno.ENOLCK, errno.ENODEV, errno.ENXIO):
        return f"the system says: {error.strerror}; mend that, then give the same command again"
    return None


def _explain_database_error(error: Exception) -> tuple[str | None, bool]:
    """The line for an error of the database, None if it is a fault of ours; and whether it may pass."""
    from storage import faults  # late: `atelier --help` would wait for SQLAlchemy and Optuna

    is_ours = faults.classify(error) is faults.ErrorKind.OURS
    line = None if is_ours else f"the database: {faults.explain(error)}"
    return line, faults.is_transient(error)


def _exit_code(error: Exception) -> int:
    """Wrong input, unless the error says otherwise, or the machine or the database was at fault."""
    if limits.explain(error):
        return ExitCode.FAILED
    if _package(error) in DATABASE_PACKAGES and _explain_database_error(error)[1]:
        return ExitCode.FAILED
    code: int = getattr(error, "exit_code", ExitCode.WRONG_INPUT)
    return code

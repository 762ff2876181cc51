"""What a user is told of an error, in one line, and the exit code that goes with it."""

import errno
from pathlib import Path

from dashboards.terminal import printable
from search.exit_codes import ExitCode
from storage import limits
from storage.ownership import ForeignHomeError, require_own
from storage.paths import home

OUR_PACKAGES = {"search", "dashboards", "storage", "trainer"}
DATABASE_PACKAGES = {"sqlalchemy", "optuna", "psycopg2"}  # storage.faults explains their errors


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
    from storage import faults  # late: `atelier --help` would wait for SQLAlchemy, psycopg2

    is_ours = faults.classify(error) is faults.ErrorKind.OURS
    line = None if is_ours else f"the database: {faults.explain(error)}"
    return line, faults.is_transient(error)


def exit_code(error: Exception) -> int:
    """The exit code of a command that ends with it: wrong input, unless it was machine or database."""
    if limits.explain(error):
        return ExitCode.FAILED
    if _package(error) in DATABASE_PACKAGES and _explain_database_error(error)[1]:
        return ExitCode.FAILED
    code: int = getattr(error, "exit_code", ExitCode.WRONG_INPUT)
    return code

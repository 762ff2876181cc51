"""Classify database errors: try again, give up, or a bug of ours; and say what to do about them.

The SQLSTATE of an error decides, because the classes of exceptions are too coarse. A revoked right has
the same class as a misspelt statement, and a dropped database the same as a restart.
"""

import enum
import re
from pathlib import Path

import psycopg2
from sqlalchemy.exc import DBAPIError, InvalidRequestError, OperationalError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError


class ErrorKind(enum.Enum):
    """What to do after an error."""

    AGAIN = "the database is away or busy for now: a retry may succeed"
    FINAL = "no retry helps until somebody changes the database, or the URL"
    OURS = "no known cause outside this program"


READ_ONLY, INSUFFICIENT_PRIVILEGE = "25006", "42501"
NO_POOLER = "connect to PostgreSQL itself, not through a pooler"

# Errors to retry: by SQLSTATE, else by its class (the first two characters); with their meaning.
AGAIN = {
    "08": "the connection was lost",
    "40": "a deadlock, or a conflict with another transaction",
    "53": "no disk, memory or connection is left",
    "57": "shut down, crashed, starting up, cancelled, idle for too long",
    "58": "the server's own system failed",
    READ_ONLY: "read-only, as during a failover",
    "25P03": "idle in a transaction for too long",
    "25P04": "a transaction that took too long",
    "55000": "not in the right state, such as a database that accepts no connections now",
    "55006": "in use",
    "55P03": "a lock is not available",
}
_LOG_IN = "are the user, the password and the server's pg_hba.conf right, and may that role log in?"
_GONE = "name a database that exists in ATELIER_DATABASE_URL, or restore a backup: atelier db restore"
_TABLES = "these are not the tables that Atelier made: see atelier db check, or restore a backup"
_RIGHTS = "let the owner of the tables, or an administrator, grant it: see atelier db check"
_DAMAGE = "the server's files are damaged: restore a backup"
_CHARACTERS = "the database cannot hold it: make one with ENCODING 'UTF8'"
_POOLER, _TLS, _WAY = "pooler", "tls", "way"  # for libpq's errors, which have no SQLSTATE
# Final errors in the same form, with what to do.
FINAL = {
    "0P000": _LOG_IN,
    "22021": _CHARACTERS,
    "22P05": _CHARACTERS,
    "28": _LOG_IN,
    "3D000": _GONE,
    "3F000": _TABLES,
    INSUFFICIENT_PRIVILEGE: _RIGHTS,
    "42703": _TABLES,
    "42704": _TABLES,
    "42P01": _TABLES,
    "57P04": _GONE,
    "XX001": _DAMAGE,
    "XX002": _DAMAGE,
    _POOLER: NO_POOLER,
    _TLS: "are sslmode, sslrootcert, sslcert and sslkey in ATELIER_DATABASE_URL right?",
    _WAY: "write it as in postgresql://USER@HOST:5432/DATABASE?sslmode=verify-full",
}
# libpq gives no SQLSTATE if it cannot connect, so its text decides. Only unmistakable texts are listed.
# All others are retried, and so are a server's messages in another language.
_SAID = r"(?:FATAL|ERROR|failed|fe_sendauth|SSL error): +"
_TEXTS = {
    r'database ".*" does not exist|no such database': "3D000",
    r"\S+ authentication failed|no password supplied|no pg_hba\.conf entry|pg_hba\.conf rejects|"
    r'role ".*" does not exist|role ".*" is not permitted to log in|no such user': "28000",
    r'permission denied|invalid value for parameter "role"': INSUFFICIENT_PRIVILEGE,
    r"Permission denied|authentication method requirement .* failed|channel binding (?:is )?required|"
    r"GSSAPI continuation error|SCRAM authentication requires": "28000",
    r"unsupported startup parameter": _POOLER,
    r"server does not support SSL|certificate verify failed|server certificate for|"
    r"root certificate file .* does not exist|could not (?:read|load|open|get) .*(?:certificate|key)|"
    r"certificate present, but not private key|private key file .* (?:has|must)|"
    r"(?:\S+ )*alert (?:unknown ca|.*certificate|handshake failure|protocol version)": _TLS,
    r"received invalid response to SSL negotiation|"
    r"expected authentication request from server, but received": _WAY,
}
# Errors of libpq before it connects to any server: the URL is wrong.
_REFUSED = re.compile(
    r"could not parse network address|Unix-domain socket path .* is too long|could not match .* to|"
    r"invalid (?:port number|integer value|\w+ value|SSL protocol version)|weak sslmode|"
    r"definition of service|service file|syntax error in service file|nested service|GSSAPI encryption"
)
# A server that says this may soon take connections or writes again.
_ON_ITS_WAY = re.compile(r"session is read-only|in hot standby|starting up|shutting down|in recovery")
# Errors that a restart of the server does not cause, unless its machine or name goes away with it.
_NAME = re.compile(r"could not translate host name .*: (?!Temporary failure)")
_SOCKET = re.compile(r'on socket "(.*)/[^/]*" failed: No such file or directory')


def classify(error: BaseException) -> ErrorKind:
    """What to do after an error; it may be of the database or any other."""
    code, _ = _cause(error)
    for key in (code, code[:2]) if code else ():
        if key in FINAL:
            return ErrorKind.FINAL
        if key in AGAIN:
            return ErrorKind.AGAIN
    return ErrorKind.AGAIN if _is_away(_unwrapped(error), code) else ErrorKind.OURS


def is_transient(error: BaseException) -> bool:
    """Whether the database was away or busy, so that a retry may succeed."""
    return classify(error) is ErrorKind.AGAIN


def is_worth_waiting(error: BaseException) -> bool:
    """Whether to retry a first connection: unlike `is_transient`, not if the host or socket is unknown.

    Then the name is wrong. After a first success that is retried: some machines lose their names for a
    while.
    """
    if not is_transient(error):
        return False
    lines = _lines(error)
    return not lines or any(not _NAME.search(line) and not _lacks_folder(line) for line in lines)


def _lacks_folder(line: str) -> bool:
    match = _SOCKET.search(line)
    return match is not None and not Path(match[1]).is_dir()


def reason(error: BaseException) -> str:
    """The server's or libpq's message in one line."""
    return _cause(error)[1]


def explain(error: BaseException) -> str:
    """The same; for a final error also what to do about it."""
    code, words = _cause(error)
    if classify(error) is not ErrorKind.FINAL or code is None:
        return words
    return f"{words}; {FINAL.get(code) or FINAL[code[:2]]}"


def sqlstate(error: BaseException) -> str | None:
    """PostgreSQL's code of an error (SQLSTATE); None if it has no code."""
    code: str | None = getattr(_drivers(error), "pgcode", None)
    return code


def _unwrapped(error: BaseException) -> BaseException:
    """The SQLAlchemy error that Optuna has wrapped, or the error itself."""
    # By name: whoever meets such an error has imported Optuna, and others need not.
    while type(error).__name__ == "StorageInternalError" and error.__cause__ is not None:
        error = error.__cause__
    return error


def _drivers(error: BaseException) -> BaseException:
    """The psycopg2 error that SQLAlchemy has wrapped, or the error itself."""
    error = _unwrapped(error)
    return error.orig or error if isinstance(error, DBAPIError) else error


def _cause(error: BaseException) -> tuple[str | None, str]:
    """The SQLSTATE, taken from the text if there is no code, and the line of the text that tells it."""
    origin, lines, code = _drivers(error), _lines(error), sqlstate(error)
    if code is None and isinstance(origin, psycopg2.OperationalError):
        # libpq writes at least one line for each address that it tried.
        all_lines = " | ".join(lines)
        # If there are several servers, another may be about to take over.
        for line in lines if not _ON_ITS_WAY.search(all_lines) else ():
            if _REFUSED.match(line):
                return _WAY, line
            for text, meaning in _TEXTS.items():
                if re.search(f"{_SAID}(?:{text})", line):
                    return meaning, line
        lines = [all_lines]
    return code, "".join(lines[:1]) or type(origin).__name__


def _lines(error: BaseException) -> list[str]:
    """The lines of the driver's message, without libpq's advice, which is indented."""
    text = str(_drivers(error))
    return [line.strip() for line in text.splitlines() if line.strip() and not line[0].isspace()]


def _is_away(error: BaseException, code: str | None) -> bool:
    """Whether a connection broke, or could not be made, judged without a code."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    if code is not None:
        return False
    if type(error) is InvalidRequestError:  # the server closed a new connection at once, twice
        return str(error) == "This connection is closed"
    # PendingRollbackError: Optuna went on in a transaction whose connection was lost.
    return isinstance(
        error, (OperationalError, psycopg2.OperationalError, PoolTimeoutError, PendingRollbackError)
    )

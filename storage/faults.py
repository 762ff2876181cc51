"""What an error of the database says: try again, give up, or that the fault is ours.

PostgreSQL says it by SQLSTATE, and classes of exceptions do not: a right that was revoked is of the
class of a statement that we misspelt, and a database that was dropped of that of a restart.
"""

import enum
import re
from pathlib import Path

import optuna
import psycopg2
from sqlalchemy.exc import DBAPIError, InvalidRequestError, OperationalError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError


class ErrorKind(enum.Enum):
    """What to do after an error."""

    AGAIN = "the database is away for the moment, or busy with others: the same may succeed later"
    FINAL = "it stays so until somebody changes the database, or the way to it"
    OURS = "nothing that is known to come from outside"


READ_ONLY, INSUFFICIENT_PRIVILEGE = "25006", "42501"
NO_POOLER = "connect to PostgreSQL itself, not through a pooler"

# By code, else by its class (the first two characters); with what it means.
AGAIN = {
    "08": "the connection was lost",
    "40": "a deadlock, or a conflict with another transaction",
    "53": "no disk, memory or connection is left",
    "57": "shut down, crashed, starting up, cancelled, idle for too long",
    "58": "the server's own system failed",
    READ_ONLY: "read-only: a failover looks so",
    "25P03": "idle in a transaction for too long",
    "25P04": "a transaction that took too long",
    "55000": "not in the state for it, as a database that accepts no connections now",
    "55006": "in use",
    "55P03": "a lock is not to be had",
}
_LOG_IN = "are the user, the password and the server's pg_hba.conf right, and may that role log in?"
_GONE = "name a database that exists in ATELIER_DATABASE_URL, or restore a backup: atelier db restore"
_TABLES = "these are not the tables that Atelier made: see atelier db check, or restore a backup"
_RIGHTS = "let the owner of the tables, or an administrator, grant it: see atelier db check"
_DAMAGE = "the server's files are damaged: restore a backup"
_CHARACTERS = "the database cannot hold it: make one with ENCODING 'UTF8'"
_POOLER, _TLS, _WAY = "pooler", "tls", "way"  # not from PostgreSQL, so without a code
# The same, with what to do.
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
# libpq gives no SQLSTATE for a session that does not come about. Of its texts only what cannot be
# mistaken is judged; the rest, also what a server says in another language, is tried again.
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
# What libpq refuses before it connects to anybody.
_REFUSED = re.compile(
    r"could not parse network address|Unix-domain socket path .* is too long|could not match .* to|"
    r"invalid (?:port number|integer value|\w+ value|SSL protocol version)|weak sslmode|"
    r"definition of service|service file|syntax error in service file|nested service|GSSAPI encryption"
)
_ON_ITS_WAY = re.compile(r"session is read-only|in hot standby|starting up|shutting down|in recovery")
# What a restart leaves as it is, unless the machine or its name comes and goes with the server.
_NAME = re.compile(r"could not translate host name .*: (?!Temporary failure)")
_SOCKET = re.compile(r'on socket "(.*)/[^/]*" failed: No such file or directory')


def classify(error: BaseException) -> ErrorKind:
    """What to do after an error, of the database or any other."""
    code, _ = _cause(error)
    for key in (code, code[:2]) if code else ():
        if key in FINAL:
            return ErrorKind.FINAL
        if key in AGAIN:
            return ErrorKind.AGAIN
    return ErrorKind.AGAIN if _is_away(_unwrapped(error), code) else ErrorKind.OURS


def is_transient(error: BaseException) -> bool:
    """Whether the database was away, so that the same may succeed later."""
    return classify(error) is ErrorKind.AGAIN


def is_worth_waiting(error: BaseException) -> bool:
    """The same for who was never there: a name that nobody knows is a wrong one, and so is a folder.

    Who was there goes on trying: with some machines their names come and go.
    """
    if not is_transient(error):
        return False
    lines = _lines(error)
    return not lines or any(not _NAME.search(line) and not _lacks_folder(line) for line in lines)


def _lacks_folder(line: str) -> bool:
    match = _SOCKET.search(line)
    return match is not None and not Path(match[1]).is_dir()


def reason(error: BaseException) -> str:
    """What the server, or the way to it, says, in one line."""
    return _cause(error)[1]


def explain(error: BaseException) -> str:
    """The same, with what to do about it if it is final."""
    code, words = _cause(error)
    if classify(error) is not ErrorKind.FINAL or code is None:
        return words
    return f"{words}; {FINAL.get(code) or FINAL[code[:2]]}"


def sqlstate(error: BaseException) -> str | None:
    """PostgreSQL's code of the error; None for an error that has none."""
    code: str | None = getattr(_drivers(error), "pgcode", None)
    return code


def _unwrapped(error: BaseException) -> BaseException:
    """SQLAlchemy's error in Optuna's."""
    while isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _drivers(error: BaseException) -> BaseException:
    """The driver's error in SQLAlchemy's."""
    error = _unwrapped(error)
    return error.orig or error if isinstance(error, DBAPIError) else error


def _cause(error: BaseException) -> tuple[str | None, str]:
    """The SQLSTATE, also where only a text says it, and the line that does."""
    origin, lines, code = _drivers(error), _lines(error), sqlstate(error)
    if code is None and isinstance(origin, psycopg2.OperationalError):
        # At least one for each address that was tried.
        every = " | ".join(lines)
        # Of several servers, another may be on its way to take over.
        for line in lines if not _ON_ITS_WAY.search(every) else ():
            if _REFUSED.match(line):
                return _WAY, line
            for text, meaning in _TEXTS.items():
                if re.search(f"{_SAID}(?:{text})", line):
                    return meaning, line
        lines = [every]
    return code, "".join(lines[:1]) or type(origin).__name__


def _lines(error: BaseException) -> list[str]:
    """What the driver says, without libpq's advice, which is indented."""
    text = str(_drivers(error))
    return [line.strip() for line in text.splitlines() if line.strip() and not line[0].isspace()]


def _is_away(error: BaseException, code: str | None) -> bool:
    """Whether a connection broke, or does not come about, where no code says so."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    if code is not None:
        return False
    if type(error) is InvalidRequestError:  # a new connection that was hung up at once, twice
        return str(error) == "This connection is closed"
    # The last is what Optuna meets that goes on in a transaction whose connection was lost.
    return isinstance(
        error, (OperationalError, psycopg2.OperationalError, PoolTimeoutError, PendingRollbackError)
    )

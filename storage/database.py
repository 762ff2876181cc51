"""Connect to the database with SQLAlchemy, retry while it is away, and check each new session.

`ATELIER_DATABASE_URL` names any PostgreSQL 14+. Without it the home folder's own server is used. That
server listens at the address in `database.url`, or is embedded and started when needed. Optuna's
tables are in the schema `public`, ours in the schema `atelier`.
"""

import logging
import os
import select
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from storage import libpq
from storage.embedded import EmbeddedPostgres
from storage.faults import (
    NO_POOLER,
    READ_ONLY,
    ErrorKind,
    classify,
    explain,
    is_transient,
    is_worth_waiting,
    sqlstate,
)
from storage.paths import home
from storage.postgres_programs import EmbeddedPostgresError
from storage.url import DatabaseError, configured_url, database_url, shown

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
PATIENCE = 600  # seconds of retrying while the database is away

# The same for this thread: somebody who waits for a page gets an error sooner.
thread_patience: ContextVar[float] = ContextVar("thread_patience", default=PATIENCE)


@dataclass(frozen=True)
class Sessions:
    """The settings that every new session asks for, and that are checked then."""

    settings: Mapping[str, str]  # PostgreSQL's settings; each value as SHOW writes it
    connect_timeout: int = 10  # seconds
    checked: bool = True

    def having(self, **settings: str) -> "Sessions":
        """The same with further settings."""
        return replace(self, settings={**self.settings, **settings})

    def arguments(self) -> dict[str, Any]:
        """The connection parameters for libpq."""
        return {
            "connect_timeout": self.connect_timeout,
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 60000,  # ms; keepalives do not run while sent data is not acknowledged
            "application_name": "atelier",
            "client_encoding": "utf8",  # names may be in any language
            "options": " ".join(f"-c {name}={value}" for name, value in self.settings.items()),
        }


WORK = Sessions(
    {
        # By default a role with our schema's name would find our tables before Optuna's.
        "search_path": "public",
        # A stopped process must not hold a row lock for ever.
        "statement_timeout": "1min",
        "idle_in_transaction_session_timeout": "1min",
    }
)

# For who only looks.
READING = WORK.having(default_transaction_read_only="on")

# For web pages: nobody waits a minute for a page.
PAGES = replace(WORK.having(statement_timeout="15s"), connect_timeout=3)


def _revive(_: object) -> None:
    """Start the embedded server again after a crash; a server that was stopped stays stopped."""
    if configured_url() is None:
        with suppress(EmbeddedPostgresError):
            EmbeddedPostgres(home()).revive()


def retrying(function: Callable[P, T]) -> Callable[P, T]:
    """Run the function again while the database is away or busy.

    It may run again after a lost reply. Its rows have keys, so the second run adds none.
    """

    @wraps(function)
    def call(*positional: P.args, **named: P.kwargs) -> T:
        # A new one for each call: tenacity's own decorator shares its records between threads, and one
        # that begins would clear them while another retries.
        again = Retrying(
            before_sleep=_revive,
            retry=retry_if_exception(is_transient),
            wait=wait_random_exponential(multiplier=0.2, max=10),
            stop=lambda state: (state.seconds_since_start or 0) >= thread_patience.get(),
            reraise=True,
        )
        return again(function, *positional, **named)

    return call


@contextmanager
def one_moment(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection whose reads all show the database as of the first one.

    Reads inside it are not retried one by one: the caller retries the whole block.
    """
    token = thread_patience.set(0)
    try:
        with engine.execution_options(isolation_level="REPEATABLE READ").begin() as connection:
            yield connection
    finally:
        thread_patience.reset(token)


@contextmanager
def connected(bind: sa.Engine | sa.Connection) -> Iterator[sa.Connection]:
    """A connection for some reads: a new one, or the caller's own, as from `one_moment`."""
    if isinstance(bind, sa.Connection):
        yield bind
    else:
        with bind.connect() as connection:
            yield connection


def look(sessions: Sessions = WORK) -> sa.Engine:
    """An engine on an existing database; none is made here. Raises DatabaseError."""
    return connect(database_url(make=False), sessions=sessions)


def connect(url: URL | None = None, patience: float = 0, sessions: Sessions = WORK) -> sa.Engine:
    """An engine on a database that has answered; `patience` is how many seconds it may take.

    Raises DatabaseError, also if a session has other settings than it asked for.
    """
    engine = make_engine(url or database_url(), sessions)
    try:
        for attempt in Retrying(
            retry=retry_if_exception(is_worth_waiting),
            wait=wait_random_exponential(multiplier=1, max=10),
            stop=stop_after_delay(patience),
            reraise=True,
        ):
            with attempt, engine.connect():
                return engine
        raise AssertionError("it returns or raises")
    except SQLAlchemyError as error:
        line = f"cannot reach the database at {shown(engine.url)}: {explain(error)}"
        if classify(error) is not ErrorKind.FINAL:
            line += (
                "; is it up, and is ATELIER_DATABASE_URL right?"
                if os.environ.get("ATELIER_DATABASE_URL")
                else "; start it with: atelier db start"
            )
        raise DatabaseError(line) from error


def make_engine(url: URL, sessions: Sessions) -> sa.Engine:
    return watched(sa.create_engine(url, **pool(url, sessions)), sessions)


def watched(engine: sa.Engine, sessions: Sessions) -> sa.Engine:
    """The engine, which from now on leaves servers that have hung up, or have become a standby."""
    sa.event.listen(engine, "checkout", _refuse_hung_up)
    if "default_transaction_read_only" not in sessions.settings:  # else read-only is wanted
        sa.event.listen(engine, "handle_error", _leave_read_only)
    return engine


def _leave_read_only(context: sa.engine.ExceptionContext) -> None:
    """Connect again after a failover: an idle session is still with the server that is now a standby."""
    if sqlstate(context.original_exception) == READ_ONLY:
        context.is_disconnect = True


def _refuse_hung_up(connection: Any, *_: object) -> None:
    """Refuse a pooled connection that the server has closed, without the round trip of a ping.

    An idle connection with data to read has got the server's goodbye. The pool then connects again.
    """
    if not connection.closed:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        if not poll.poll(0):
            return
    raise sa.exc.DisconnectionError


def pool(url: URL, sessions: Sessions) -> dict[str, Any]:
    """What an engine needs to be told of its connections."""
    # Two connections are kept. The web server's threads may need more for a moment.
    return {
        "pool_size": 2,
        "max_overflow": 8,
        "creator": _creator(url, sessions),
    }


def _creator(url: URL, sessions: Sessions) -> Callable[[], Any]:
    """A function that connects, and checks that the session has the settings it asked for.

    A pooler between us and PostgreSQL may drop these settings silently.
    """
    positional, named = sa.make_url(url).get_dialect()().create_connect_args(url)
    named = {**named, **sessions.arguments()}

    def create() -> Any:
        connection = libpq.connect(*positional, **named)
        try:
            if sessions.checked:
                present = settings_of(connection, sessions)
                if problem := other_settings(present, sessions.settings):
                    raise DatabaseError(f"the database at {shown(url)} {problem}")
        except BaseException:
            connection.close()
            raise
        return connection

    return create


def settings_of(connection: Any, sessions: Sessions) -> dict[str, str]:
    """The values that the session really has of the settings it asked for.

    The connection is the driver's, and in no transaction.
    """
    connection.autocommit = True  # spares two round trips, and some poolers have no transactions
    with connection.cursor() as cursor:
        query = "SELECT name, current_setting(name) FROM unnest(%s) AS name"
        cursor.execute(query, [list(sessions.settings)])
        present = dict(cursor.fetchall())
    connection.autocommit = False
    return present


def is_pooled(connection: sa.Connection) -> bool:
    """Whether a pooler is in between: it has named another process than the one that answers."""
    driver: Any = connection.connection.driver_connection
    named = driver.info.backend_pid
    return bool(connection.scalar(sa.text("SELECT pg_backend_pid()")) != named)


def other_settings(present: Mapping[str, str], asked: Mapping[str, str]) -> str | None:
    """The problem with a session whose settings differ from those it asked for; None if none does."""
    differences = [
        f"{name} = {present[name]!r} instead of {value!r}"
        for name, value in asked.items()
        if present[name] != value
    ]
    return f"gives sessions with {', '.join(differences)}; {NO_POOLER}" if differences else None

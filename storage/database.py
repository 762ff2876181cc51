"""The one database: where it is, how to reach it, and which schema it must have.

`ATELIER_DATABASE_URL` names any PostgreSQL 14+. Without it the home folder's own server is used: one
that listens (`database.url` says where), or an embedded one that is started. Optuna's tables are in the
schema `public`, ours in the schema `atelier`.
"""

import logging
import os
import select
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import optuna
import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from tenacity import Retrying, retry, retry_if_exception, stop_after_delay, wait_random_exponential

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
PATIENCE = 600  # seconds that work goes on trying while the database is away

# The same for what this thread does: somebody who waits for a page has less of it.
thread_patience: ContextVar[float] = ContextVar("thread_patience", default=PATIENCE)


@dataclass(frozen=True)
class Sessions:
    """What every new session with the database is asked to be, and is checked to be."""

    settings: Mapping[str, str]  # the server's, each value as SHOW writes it
    connect_timeout: int = 10  # seconds
    checked: bool = True

    def having(self, **settings: str) -> "Sessions":
        """The same with further settings."""
        return replace(self, settings={**self.settings, **settings})

    def arguments(self) -> dict[str, Any]:
        """What libpq is told."""
        return {
            "connect_timeout": self.connect_timeout,
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 60000,  # ms; keepalives do not run while sent data wait for an answer
            "application_name": "atelier",
            "client_encoding": "utf8",  # names are in any language
            "options": " ".join(f"-c {name}={value}" for name, value in self.settings.items()),
        }


WORK = Sessions(
    {
        # By default a role named as our schema would find our tables before Optuna's.
        "search_path": "public",
        # A stopped process must not hold a row lock for ever.
        "statement_timeout": "1min",
        "idle_in_transaction_session_timeout": "1min",
    }
)

# For pages: nobody waits a minute for one.
PAGES = replace(WORK.having(statement_timeout="15s"), connect_timeout=3)

# They say nothing about the trial that was at work.
DATABASE_ERRORS = (SQLAlchemyError, optuna.exceptions.StorageInternalError, DatabaseError)


def _revive(_: object) -> None:
    """Start the embedded server again if it has crashed; one that was stopped stays so."""
    if configured_url() is None:
        with suppress(EmbeddedPostgresError):
            EmbeddedPostgres(home()).revive()


# Every operation that uses it may be repeated after a lost reply: rows are keyed, not appended.
retrying = retry(
    before_sleep=_revive,
    retry=retry_if_exception(is_transient),
    wait=wait_random_exponential(multiplier=0.2, max=10),
    stop=lambda state: (state.seconds_since_start or 0) >= thread_patience.get(),
    reraise=True,
)


@contextmanager
def one_moment(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection that shows the database as of its first statement, for several reads.

    Inside it nothing is retried: the caller retries the whole.
    """
    token = thread_patience.set(0)
    try:
        with engine.execution_options(isolation_level="REPEATABLE READ").begin() as connection:
            yield connection
    finally:
        thread_patience.reset(token)


def look(sessions: Sessions = WORK) -> sa.Engine:
    """An engine on a database that has been used before: looking makes nothing. Raises DatabaseError."""
    return connect(database_url(make=False), sessions=sessions)


def connect(url: URL | None = None, patience: float = 0, sessions: Sessions = WORK) -> sa.Engine:
    """An engine on a database that answers, within so many seconds.

    Raises DatabaseError, also for sessions that are not what they were asked to be.
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
    engine = sa.create_engine(url, **pool(url, sessions, ping=False))
    sa.event.listen(engine, "checkout", _refuse_hung_up)
    follow_failovers(engine, sessions)
    return engine


def follow_failovers(engine: sa.Engine, sessions: Sessions) -> None:
    if "default_transaction_read_only" not in sessions.settings:  # else it was asked for
        sa.event.listen(engine, "handle_error", _leave_read_only)


def _leave_read_only(context: sa.engine.ExceptionContext) -> None:
    """Connect anew after a failover: an idle session stays with the server that is a standby now."""
    if sqlstate(context.original_exception) == READ_ONLY:
        context.is_disconnect = True


def _refuse_hung_up(connection: Any, *_: object) -> None:
    """What a ping would find, without a round trip: an idle connection with something to read.

    That is the server's goodbye; the pool then connects anew.
    """
    if not connection.closed:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        if not poll.poll(0):
            return
    raise sa.exc.DisconnectionError


def pool(url: URL, sessions: Sessions, ping: bool = True) -> dict[str, Any]:
    # Two are kept; a page server's threads may need some more for a moment.
    return {
        "pool_pre_ping": ping,
        "pool_size": 2,
        "max_overflow": 8,
        "creator": _creator(url, sessions),
    }


def _creator(url: URL, sessions: Sessions) -> Callable[[], Any]:
    """Makes connections, and hands out none whose session is not what was asked for.

    A pooler may drop all that a session asks for, and say nothing.
    """
    positional, named = sa.make_url(url).get_dialect()().create_connect_args(url)
    named = {**named, **sessions.arguments()}

    def create() -> Any:
        connection = libpq.connect(*positional, **named)
        try:
            if sessions.checked:
                found = settings_of(connection, sessions)
                if wrong := other_settings(found, sessions.settings):
                    raise DatabaseError(f"the database at {shown(url)} {wrong}")
        except BaseException:
            connection.close()
            raise
        return connection

    return create


def settings_of(connection: Any, sessions: Sessions) -> dict[str, str]:
    """What a session of the driver's, in no transaction, really has of what was asked for."""
    connection.autocommit = True  # spares two round trips, and some poolers have no transactions
    with connection.cursor() as cursor:
        query = "SELECT name, current_setting(name) FROM unnest(%s) AS name"
        cursor.execute(query, [list(sessions.settings)])
        found = dict(cursor.fetchall())
    connection.autocommit = False
    return found


def other_settings(found: Mapping[str, str], asked: Mapping[str, str]) -> str | None:
    wrong = [
        f"{name} = {found[name]!r} instead of {value!r}"
        for name, value in asked.items()
        if found[name] != value
    ]
    return f"gives sessions with {', '.join(wrong)}; {NO_POOLER}" if wrong else None

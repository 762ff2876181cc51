"""The one database: where it is, how to reach it, and which schema it must have.

`ATELIER_DATABASE_URL` names any PostgreSQL 14+. Without it the home folder's own server is used: one
that listens (`database.url` says where), or an embedded one that is started. Optuna's tables are in the
schema `public`, ours in the schema `atelier`.
"""

import ipaddress
import logging
import os
import select
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import optuna
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from tenacity import Retrying, retry, retry_if_exception, stop_after_delay, wait_random_exponential

from storage import libpq
from storage.embedded import EmbeddedPostgres, EmbeddedPostgresError
from storage.faults import (
    INSUFFICIENT_PRIVILEGE,
    NO_POOLER,
    READ_ONLY,
    Verdict,
    explain,
    is_transient,
    is_worth_waiting,
    judge,
    reason,
    sqlstate,
)
from storage.network import VIEWER, WORKER
from storage.properties import Property, is_owner, make_roles, properties, tables, why_without
from storage.tables import SCHEMA

log = logging.getLogger(__name__)

PATIENCE = 600  # seconds that work goes on trying while the database is away
# The same for what this thread does: somebody who waits for a page has less of it.
thread_patience: ContextVar[float] = ContextVar("thread_patience", default=PATIENCE)
_MIGRATIONS = Path(__file__).with_name("migrations")
_CREATE_LOCK = 0x41544C52  # advisory lock: two processes must not create the tables at once


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


class DatabaseError(RuntimeError):
    """The database cannot be used; the message is one line and says what to do next."""


def home() -> Path:
    """The folder for everything that Atelier keeps beside the database: `.atelier`, if unset."""
    # A ~ that no shell has seen, as from a file of settings.
    return Path(os.path.expanduser(os.environ.get("ATELIER_HOME") or ".atelier")).absolute()


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


def configured_url() -> str | None:
    """The URL from the environment, or of a server that `atelier db start --listen` has set up."""
    url = EmbeddedPostgres(home()).network.url
    return os.environ.get("ATELIER_DATABASE_URL") or (url and url.render_as_string(hide_password=False))


def database_url(make: bool = True) -> URL:
    """The configured URL, else that of the embedded server, which is started, and made if need be.

    Raises DatabaseError (also if there is no database and `make` is false), ForeignHomeError,
    LimitError.
    """
    text = configured_url()
    if text is None:
        embedded = EmbeddedPostgres(home())
        if not make and not embedded.exists():
            raise DatabaseError(
                f"no database in {home()}; atelier search STUDY.toml makes one, or name another with "
                "ATELIER_HOME or ATELIER_DATABASE_URL"
            )
        try:
            return make_url(embedded.acquire(make))
        except EmbeddedPostgresError as error:
            raise DatabaseError(str(error)) from error
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        url = None
    if url is None or "\0" in unquote(text):
        raise DatabaseError(
            "ATELIER_DATABASE_URL is not a URL; write postgresql://USER@HOST:5432/DATABASE"
        )
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise DatabaseError(
            f"ATELIER_DATABASE_URL names {url.get_backend_name()}; only PostgreSQL is served: "
            "postgresql://USER@HOST:5432/DATABASE"
        )
    _refuse_unprotected(url)
    return url.set(drivername="postgresql+psycopg2")


def server_host(url: URL) -> str:
    """The host that libpq will connect to, or several with commas; empty for the default socket."""
    host = url.query.get("hostaddr") or url.query.get("host", url.host)
    if isinstance(host, tuple):  # `host=` was given several times
        host = ",".join(host)
    if "service" in url.query and not host:
        return f"service {url.query['service']}"
    return host or ""


def is_local(hosts: str) -> bool:
    """Whether the way to all of them never leaves this machine."""
    return all(host in ("", "localhost") or _is_here(host) for host in hosts.split(","))


def _is_here(host: str) -> bool:
    try:
        return host.startswith("/") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse_unprotected(url: URL) -> None:
    """Raises DatabaseError if libpq could send a remote server everything in clear, unasked.

    Its default, `prefer`, does so wherever the server, or somebody in between, declines TLS.
    """
    mode = str(url.query.get("sslmode", "prefer"))
    if mode in ("prefer", "allow") and not is_local(server_host(url)):
        raise DatabaseError(
            f"the way to the database on {server_host(url)} may be in clear (sslmode={mode}); add to "
            "ATELIER_DATABASE_URL ?sslmode=verify-full&sslrootcert=FILE, or, on a network that you "
            "trust, ?sslmode=disable"
        )


def shown(url: URL) -> str:
    """The URL as text, without a password."""
    return url.difference_update_query(["password"]).render_as_string()


def look(sessions: Sessions = WORK) -> sa.Engine:
    """An engine on a database that has been used before: looking makes nothing. Raises DatabaseError."""
    return connect(database_url(make=False), sessions=sessions)


def connect(url: URL | None = None, patience: float = 0, sessions: Sessions = WORK) -> sa.Engine:
    """An engine on a database that answers, within so many seconds.

    Raises DatabaseError, also for sessions that are not what they were asked to be.
    """
    engine = _engine(url or database_url(), sessions)
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
        if judge(error) is not Verdict.FINAL:
            line += (
                "; is it up, and is ATELIER_DATABASE_URL right?"
                if os.environ.get("ATELIER_DATABASE_URL")
                else "; start it with: atelier db start"
            )
        raise DatabaseError(line) from error


def _engine(url: URL, sessions: Sessions) -> sa.Engine:
    engine = sa.create_engine(url, **_pool(url, sessions, ping=False))
    sa.event.listen(engine, "checkout", _refuse_hung_up)
    _follow_failovers(engine, sessions)
    return engine


def _follow_failovers(engine: sa.Engine, sessions: Sessions) -> None:
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


def _pool(url: URL, sessions: Sessions, ping: bool = True) -> dict[str, Any]:
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
                found = _settings(connection, sessions)
                if wrong := _other_settings(found, sessions.settings):
                    raise DatabaseError(f"the database at {shown(url)} {wrong}")
        except BaseException:
            connection.close()
            raise
        return connection

    return create


def _settings(connection: Any, sessions: Sessions) -> dict[str, str]:
    """What a session of the driver's, in no transaction, really has of what was asked for."""
    connection.autocommit = True  # spares two round trips, and some poolers have no transactions
    with connection.cursor() as cursor:
        query = "SELECT name, current_setting(name) FROM unnest(%s) AS name"
        cursor.execute(query, [list(sessions.settings)])
        found = dict(cursor.fetchall())
    connection.autocommit = False
    return found


def _other_settings(found: Mapping[str, str], asked: Mapping[str, str]) -> str | None:
    wrong = [
        f"{name} = {found[name]!r} instead of {value!r}"
        for name, value in asked.items()
        if found[name] != value
    ]
    return f"gives sessions with {', '.join(wrong)}; {NO_POOLER}" if wrong else None


class Restricted(NamedTuple):
    """Ways into a database with fewer rights than its owner's."""

    engine: sa.Engine
    storage: optuna.storages.BaseStorage
    has_role: bool  # a role sees to it; else nothing does, or the connection's own setting


def read_only(engine: sa.Engine) -> Restricted:
    """Look at the same database as the role `atelier_viewer`, which may only SELECT.

    Where this user may not act as the role, transactions are read-only because the connection asks for
    it.
    """
    return _restricted(engine, VIEWER, PAGES.having(default_transaction_read_only="on"))


@retrying
def for_worker(engine: sa.Engine) -> Restricted:
    """Work in the same database as the role `atelier_worker`: it deletes no study and alters no table.

    Where this user may not act as the role, the worker has this user's rights, and says so.
    Raises DatabaseError.
    """
    work = _restricted(engine, WORKER, WORK)
    if not work.has_role:
        with engine.connect() as connection:
            owner = is_owner(connection)
            why = why_without(connection, WORKER)
        # The owner was told when the tables were made.
        log.log(logging.INFO if owner else logging.WARNING, "with all rights of this user: %s", why)
    return work


def _restricted(engine: sa.Engine, role: str, sessions: Sessions) -> Restricted:
    with engine.connect() as connection:
        has_role = why_without(connection, role) is None
    sessions = sessions.having(role=role) if has_role else sessions
    other = _engine(engine.url, sessions)
    return Restricted(other, optuna_storage(engine, sessions, make_tables=False), has_role)


def examine(engine: sa.Engine) -> Iterator[Property]:
    """What is to be known about the database, for one who asks whether it can be used.

    `engine` may have sessions that are not checked: they are here.
    """
    with engine.connect() as connection:
        found = _settings(connection.connection.driver_connection, WORK)
        general = list(properties(connection))
    yield from general
    for name, asked in WORK.settings.items():
        yield Property(name, found[name], _other_settings(found, {name: asked}))
    if any(one.problem for one in general if one.name == "rights"):
        return  # the rest may not be seen
    revision = schema_revision(engine)
    if revision is None:
        yield Property("schema", "none yet; the first search, submit or worker makes the tables")
        return
    try:
        yield Property("schema", require_schema(engine))
    except DatabaseError as error:
        yield Property("schema", revision, str(error).removeprefix("the database "))
        return
    with engine.connect() as connection:
        yield tables(connection)
        why = why_without(connection, WORKER, VIEWER)
    yield Property(
        "roles", f"workers and viewers have all rights of this user: {why}" if why else "both"
    )


def require_fit(engine: sa.Engine, only: str | None = None) -> None:
    """Raises DatabaseError for the first thing about the database that forbids us to write to it.

    `only` names the property that matters.
    """
    with engine.connect() as connection:
        for one in properties(connection):
            if one.problem and only in (None, one.name):
                raise DatabaseError(f"the database at {shown(engine.url)} {one.problem}")


@retrying
def prepare(engine: sa.Engine) -> optuna.storages.BaseStorage:
    """Optuna's storage on the same database, after `ensure_tables`. Raises DatabaseError."""
    ensure_tables(engine)
    return optuna_storage(engine)


@retrying
def ensure_tables(engine: sa.Engine) -> None:
    """Give an empty database Optuna's tables and ours.

    Raises DatabaseError if there are tables of another version, or if nothing can be written.
    """
    require_fit(engine)
    if schema_revision(engine) is None:
        upgrade(engine)
    else:
        require_schema(engine)


@retrying
def upgrade(engine: sa.Engine, revision: str = "head") -> None:
    """Create the tables and roles, or bring ours up to date; safe for processes that start at once.

    Says so if workers will not be able to have fewer rights than this user. Raises DatabaseError if the
    schema is newer than this program, or older and in use, or not this user's, or if the database is
    not fit for tables of ours.
    """
    require_fit(engine)
    check_schema(engine)
    by_owner = "let the owner of the tables run: atelier db upgrade"
    with engine.connect() as connection:
        if schema_revision(engine) is not None and not is_owner(connection):
            raise DatabaseError(f"permission denied: the tables are another user's; {by_owner}")
    try:
        _upgrade(engine, revision)
    except SQLAlchemyError as error:
        if sqlstate(error) != INSUFFICIENT_PRIVILEGE:
            raise
        raise DatabaseError(f"{reason(error)}; {by_owner}") from error  # of Optuna's tables
    with engine.connect() as connection:
        why = why_without(connection, WORKER, VIEWER)
    if why is not None:
        log.warning("workers and viewers will have all rights of this user: %s", why)


def _upgrade(engine: sa.Engine, wanted: str) -> None:
    with engine.connect() as lock:
        lock.execute(sa.text("SELECT pg_advisory_lock(:key)"), {"key": _CREATE_LOCK})
        lock.commit()
        try:
            optuna_storage(engine)  # makes Optuna's tables
            revision = schema_revision(engine)
            with engine.begin() as connection:
                if revision not in (None, head_revision()):
                    _refuse_if_held(connection)
                if not connection.dialect.has_schema(connection, SCHEMA):  # an administrator's, perhaps
                    connection.execute(sa.schema.CreateSchema(SCHEMA))
                _show_optunas_tables(connection)
                config = _alembic()
                config.attributes["connection"] = connection
                command.upgrade(config, wanted)
                make_roles(connection)
        finally:
            lock.execute(sa.text("SELECT pg_advisory_unlock(:key)"), {"key": _CREATE_LOCK})


def _refuse_if_held(connection: sa.Connection) -> None:
    """Raises DatabaseError while trials are held; until the transaction ends, none can be claimed."""
    # As text: the tables are of an older version than the models.
    connection.exec_driver_sql(f"LOCK TABLE {SCHEMA}.attempt IN SHARE ROW EXCLUSIVE MODE")
    held = f"FROM {SCHEMA}.attempt WHERE released IS NULL AND lease_until > clock_timestamp()"
    if number := connection.scalar(sa.text(f"SELECT count(*) {held}")):
        raise DatabaseError(
            f"workers of the older Atelier hold {number} trials; let them end first: "
            "atelier stop STUDY, with the version that they run"
        )


def _show_optunas_tables(connection: sa.Connection) -> None:
    """Let other programs, as optuna-dashboard, find Optuna's tables before ours: see WORK."""
    role, name = connection.execute(sa.text("SELECT current_user, current_database()")).one()
    if role == SCHEMA:
        database = connection.dialect.identifier_preparer.quote_identifier(name)
        connection.execute(
            sa.text(f"ALTER ROLE {SCHEMA} IN DATABASE {database} SET search_path = public")
        )


def check_schema(engine: sa.Engine) -> None:
    """Raises DatabaseError if our tables were made by a newer version of Atelier."""
    revision = schema_revision(engine)
    if revision is not None and not knows(revision):
        raise DatabaseError(
            f"the database has schema {revision}, which this version of Atelier does not know "
            f"(it knows up to {head_revision()}); use the newer Atelier that made it"
        )


def knows(revision: str) -> bool:
    """Whether this program can make tables of that schema."""
    script = ScriptDirectory.from_config(_alembic())
    return revision in (one.revision for one in script.walk_revisions())


def require_schema(engine: sa.Engine) -> str:
    """The schema's revision. Raises DatabaseError unless it is the one that this program wants."""
    check_schema(engine)
    revision = schema_revision(engine)
    if revision is None:
        raise DatabaseError("there are no tables yet; the first search, submit or worker makes them")
    if revision != head_revision():
        raise DatabaseError(
            f"the database has schema {revision}, this version of Atelier wants {head_revision()}; let "
            "its workers end (atelier stop STUDY), then run: atelier db upgrade"
        )
    return revision


def schema_revision(engine: sa.Engine) -> str | None:
    """The revision of our tables in the database; None before they exist."""
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table_schema": SCHEMA})
        return context.get_current_revision()


def head_revision() -> str:
    """The revision that this program wants."""
    head = ScriptDirectory.from_config(_alembic()).get_current_head()
    assert head is not None  # there is at least one migration
    return head


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config


def optuna_storage(
    engine: sa.Engine, sessions: Sessions = WORK, make_tables: bool = True
) -> optuna.storages.BaseStorage:
    """Optuna's storage on the same database, with its cache of finished trials.

    Raises DatabaseError if Optuna's tables were made by another version.
    """
    try:
        storage = optuna.storages.RDBStorage(
            engine.url.render_as_string(hide_password=False),
            engine_kwargs=_pool(engine.url, sessions),
            skip_table_creation=not make_tables,
        )
    except RuntimeError as error:
        raise DatabaseError(f"Optuna cannot use this database: {error}".replace("\n", " ")) from error
    _follow_failovers(storage.engine, sessions)
    return optuna.storages.get_storage(storage)

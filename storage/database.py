"""The one database: where it is, how to reach it, and which schema it must have.

`ATELIER_DATABASE_URL` names any PostgreSQL 14+. Without it the home folder's own server is used: one
that listens (`database.url` says where), or an embedded one that is started. Optuna's tables are in the
schema `public`, ours in the schema `atelier`.
"""

import ipaddress
import logging
import os
import select
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg2.errors import InsufficientPrivilege
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from tenacity import Retrying, retry, retry_if_exception, stop_after_delay, wait_random_exponential

from storage.embedded import EmbeddedPostgres, EmbeddedPostgresError
from storage.network import VIEWER, WORKER

log = logging.getLogger(__name__)

SCHEMA = "atelier"
PATIENCE = 600  # seconds that work goes on trying while the database is away
# The same for what this thread does: somebody who waits for a page has less of it.
thread_patience: ContextVar[float] = ContextVar("thread_patience", default=PATIENCE)
_MIGRATIONS = Path(__file__).with_name("migrations")
_CREATE_LOCK = 0x41544C52  # advisory lock: two processes must not create the tables at once


CONNECT_ARGS: dict[str, object] = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60000,  # ms; keepalives do not run while sent data wait for an answer
    "application_name": "atelier",
    "options": " ".join(
        [
            # By default a role named as our schema would find our tables before Optuna's.
            "-c search_path=public",
            # A stopped process must not hold a row lock for ever.
            "-c statement_timeout=60000 -c idle_in_transaction_session_timeout=60000",
        ]
    ),
}


class DatabaseError(RuntimeError):
    """The database cannot be used; the message is one line and says what to do next."""


def home() -> Path:
    """The folder for everything that Atelier keeps beside the database: `.atelier`, if unset."""
    return Path(os.environ.get("ATELIER_HOME") or ".atelier").absolute()


def is_transient(error: BaseException) -> bool:
    """Whether the database was away, so that the same may succeed later."""
    if isinstance(error, optuna.exceptions.StorageInternalError):
        error = error.__cause__ or error
    # The last is what Optuna meets that goes on in a transaction whose connection was lost.
    return isinstance(error, (OperationalError, PoolTimeoutError, PendingRollbackError)) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )


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


def database_url() -> URL:
    """The configured URL, else that of the embedded server, which is started.

    Raises DatabaseError.
    """
    text = configured_url()
    if text is None:
        try:
            return make_url(EmbeddedPostgres(home()).acquire())
        except EmbeddedPostgresError as error:
            raise DatabaseError(str(error)) from error
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise DatabaseError(
            "ATELIER_DATABASE_URL is not a URL; write postgresql://USER@HOST:5432/DATABASE"
        ) from None
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise DatabaseError(
            f"ATELIER_DATABASE_URL names {url.get_backend_name()}; only PostgreSQL is served: "
            "postgresql://USER@HOST:5432/DATABASE"
        )
    _refuse_unprotected(url)
    return url.set(drivername="postgresql+psycopg2")


def server_host(url: URL) -> str:
    """The host that libpq will connect to, or several with commas; empty for the default socket."""
    service = url.query.get("service", os.environ.get("PGSERVICE"))
    host = url.query.get("host", url.host or os.environ.get("PGHOST"))
    address = url.query.get("hostaddr", os.environ.get("PGHOSTADDR"))
    if service and not host:
        return f"service {service}"
    return str(address or host or "")


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
    mode = str(url.query.get("sslmode", os.environ.get("PGSSLMODE", "prefer")))
    if mode in ("prefer", "allow") and not is_local(server_host(url)):
        raise DatabaseError(
            f"the way to the database on {server_host(url)} may be in clear (sslmode={mode}); add to "
            "ATELIER_DATABASE_URL ?sslmode=verify-full&sslrootcert=FILE, or, on a network that you "
            "trust, ?sslmode=disable"
        )


def shown(url: URL) -> str:
    """The URL as text, without a password."""
    return url.difference_update_query(["password"]).render_as_string()


def exists() -> bool:
    """Whether there is a database to look into: an external one, or an embedded one made before."""
    return configured_url() is not None or EmbeddedPostgres(home()).data.is_dir()


# For pages: nobody waits a minute for one.
PAGE_ARGS = CONNECT_ARGS | {
    "connect_timeout": 3,
    "options": f"{CONNECT_ARGS['options']} -c statement_timeout=15000",
}


def connect(
    url: URL | None = None, patience: float = 0, connect_args: dict[str, object] = CONNECT_ARGS
) -> sa.Engine:
    """An engine on a database that answers, within so many seconds. Raises DatabaseError."""
    engine = _engine(url or database_url(), connect_args)
    try:
        for attempt in Retrying(
            retry=retry_if_exception(is_transient),
            wait=wait_random_exponential(multiplier=1, max=10),
            stop=stop_after_delay(patience),
            reraise=True,
        ):
            with attempt, engine.connect():
                return engine
        raise AssertionError("it returns or raises")
    except DBAPIError as error:
        reason = str(error.orig).strip().splitlines()[0]
        raise DatabaseError(
            f"cannot reach the database at {shown(engine.url)}: {reason}; "
            + (
                "is it up, and is ATELIER_DATABASE_URL right?"
                if os.environ.get("ATELIER_DATABASE_URL")
                else "start it with: atelier db start"
            )
        ) from error


def _engine(url: URL, connect_args: dict[str, object]) -> sa.Engine:
    engine = sa.create_engine(url, **_pool(connect_args, ping=False))
    sa.event.listen(engine, "checkout", _refuse_hung_up)
    return engine


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


def _pool(connect_args: dict[str, object], ping: bool = True) -> dict[str, Any]:
    # Two are kept; a page server's threads may need some more for a moment.
    return {"pool_pre_ping": ping, "pool_size": 2, "max_overflow": 8, "connect_args": connect_args}


class Restricted(NamedTuple):
    """Ways into a database with fewer rights than its owner's."""

    engine: sa.Engine
    storage: optuna.storages.BaseStorage
    has_role: bool  # a role sees to it; else nothing does, or the connection's own setting


_EVERYWHERE = f"SCHEMA public, {SCHEMA}"
# What each role may do with Optuna's tables and ours. No role may change or drop a table.
RIGHTS = {
    VIEWER: (f"SELECT ON ALL TABLES IN {_EVERYWHERE}",),
    WORKER: (
        f"SELECT, INSERT, UPDATE ON ALL TABLES IN {_EVERYWHERE}",
        f"USAGE ON ALL SEQUENCES IN {_EVERYWHERE}",
        f"DELETE ON {SCHEMA}.attempt",  # Ledger.withdraw
    ),
}


def read_only(engine: sa.Engine) -> Restricted:
    """Look at the same database as the role `atelier_viewer`, which may only SELECT.

    Where this user may not act as the role, transactions are read-only because the connection asks for
    it.
    """
    return _restricted(engine, VIEWER, PAGE_ARGS, "-c default_transaction_read_only=on")


@retrying
def for_worker(engine: sa.Engine) -> Restricted:
    """Work in the same database as the role `atelier_worker`: it deletes no study and alters no table.

    Where this user may not act as the role, the worker has this user's rights, and says so.
    """
    work = _restricted(engine, WORKER, CONNECT_ARGS)
    if not work.has_role:
        log.warning("this user may not act as %s; its owner makes it with: atelier db upgrade", WORKER)
    return work


def _restricted(
    engine: sa.Engine, role: str, arguments: dict[str, object], options: str = ""
) -> Restricted:
    has_role = _may_act_as(engine, role)
    every = [str(arguments["options"]), options, f"-c role={role}" if has_role else ""]
    arguments = arguments | {"options": " ".join(filter(None, every))}
    other = _engine(engine.url, arguments)
    return Restricted(other, optuna_storage(engine, arguments, make_tables=False), has_role)


def _may_act_as(engine: sa.Engine, role: str) -> bool:
    with engine.connect() as connection:
        # The role is the server's, its rights are this database's.
        query = sa.text(
            "SELECT 1 FROM pg_roles WHERE rolname = :role AND pg_has_role(oid, 'MEMBER') "
            f"AND has_schema_privilege(oid, '{SCHEMA}', 'USAGE')"
        )
        return connection.scalar(query, {"role": role}) is not None


def _make_roles(connection: sa.Connection) -> None:
    """Make the roles and give them their rights, if this user may."""
    run = connection.exec_driver_sql
    for role, rights in RIGHTS.items():
        try:
            with connection.begin_nested():
                if not run(f"SELECT 1 FROM pg_roles WHERE rolname = '{role}'").scalar():
                    run(f"CREATE ROLE {role} NOLOGIN")
                    run(f"GRANT {role} TO CURRENT_USER")
                for right in (f"USAGE ON {_EVERYWHERE}", *rights):
                    run(f"GRANT {right} TO {role}")
        except DBAPIError as error:  # not allowed, or just made for another database of the server
            if is_transient(error):
                raise


MINIMUM_SERVER = 14


def server_version(engine: sa.Engine) -> str:
    """Raises DatabaseError for a server that is too old."""
    with engine.connect() as connection:
        version = str(connection.scalar(sa.text("SHOW server_version")))
    if int(version.split(".")[0]) < MINIMUM_SERVER:
        raise DatabaseError(f"the server is PostgreSQL {version}; allowed is {MINIMUM_SERVER}+")
    return version


@retrying
def prepare(engine: sa.Engine) -> optuna.storages.BaseStorage:
    """Optuna's storage on the same database, after `ensure_tables`. Raises DatabaseError."""
    ensure_tables(engine)
    return optuna_storage(engine)


@retrying
def ensure_tables(engine: sa.Engine) -> None:
    """Give an empty database Optuna's tables and ours.

    Raises DatabaseError if there are tables of another version.
    """
    server_version(engine)
    if schema_revision(engine) is None:
        upgrade(engine)
    else:
        require_schema(engine)


@retrying
def upgrade(engine: sa.Engine, revision: str = "head") -> None:
    """Create the tables and roles, or bring ours up to date; safe for processes that start at once.

    Raises DatabaseError if the schema is newer than this program, or older and in use, or not this
    user's.
    """
    check_schema(engine)
    try:
        _upgrade(engine, revision)
    except ProgrammingError as error:
        if not isinstance(error.orig, InsufficientPrivilege):
            raise
        reason = str(error.orig).strip().splitlines()[0]
        raise DatabaseError(f"{reason}; let the owner of the tables run: atelier db upgrade") from error


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
                connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
                _show_optunas_tables(connection)
                config = _alembic()
                config.attributes["connection"] = connection
                command.upgrade(config, wanted)
                _make_roles(connection)
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
    """Let other programs, as optuna-dashboard, find Optuna's tables before ours: see CONNECT_ARGS."""
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
    engine: sa.Engine, connect_args: dict[str, object] = CONNECT_ARGS, make_tables: bool = True
) -> optuna.storages.BaseStorage:
    """Optuna's storage on the same database, with its cache of finished trials.

    Raises DatabaseError if Optuna's tables were made by another version.
    """
    try:
        storage = optuna.storages.RDBStorage(
            engine.url.render_as_string(hide_password=False),
            engine_kwargs=_pool(connect_args),
            skip_table_creation=not make_tables,
        )
    except RuntimeError as error:
        raise DatabaseError(f"Optuna cannot use this database: {error}".replace("\n", " ")) from error
    return optuna.storages.get_storage(storage)

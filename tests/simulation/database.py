"""A real PostgreSQL under the scheduler: a boundary before and after each statement and each commit.

psycopg2 calls `wait` whenever it waits for the server, so an actor whose statement waits for a lock
gives up its turn. Whether it does, PostgreSQL is asked only if an answer does not come at once.
"""

import io
import math
import os
import re
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import sqlalchemy as sa
from optuna.storages._rdb.storage import _VersionManager
from psycopg2 import extensions
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Mapper
from sqlalchemy.util import LRUCache, OrderedSet

import storage.libpq
from storage import database, schema
from storage.embedded import EmbeddedPostgres
from storage.postgres_process import is_alive
from tests.simulation.history import History
from tests.simulation.scheduler import Scheduler, current

SOON = 0.002  # seconds in which most statements have their answer
TIMEOUT = 60.0  # simulated seconds: statement_timeout, and that for an idle transaction
TEMPLATE = "simulation_template"
SEARCH_PATH = "simulation,pg_catalog,public"
# Found before PostgreSQL's own. A sequence, since all sessions see its value at once.
CLOCK = """
CREATE SCHEMA simulation;
CREATE SEQUENCE simulation.clock;
CREATE FUNCTION simulation.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE sql
    AS 'SELECT to_timestamp(last_value / 1e6) FROM simulation.clock';
GRANT USAGE ON SCHEMA simulation TO public;
GRANT SELECT ON simulation.clock TO public;
"""
DEFAULTS = {
    "study": ("created",),
    "array_job": ("submitted",),
    "worker": ("started", "last_seen"),
    "attempt": ("claimed", "renewed"),
    "epoch": ("recorded",),
}
WRITES = re.compile(r"\s*(WITH|INSERT|UPDATE|DELETE)")


class Server:
    """A PostgreSQL for the simulations of one process, with a template of their database."""

    def __init__(self, folder: Path) -> None:
        self._embedded = EmbeddedPostgres(folder)
        self.url = make_url(self._embedded.acquire())
        for name, value in {
            "fsync": "off",
            "full_page_writes": "off",
            "autovacuum": "off",
            "synchronize_seqscans": "off",
            "max_connections": "200",
            "jit": "off",
            "track_counts": "off",
            "update_process_title": "off",
            "wal_level": "minimal",
            "max_wal_senders": "0",
            "deadlock_timeout": "1h",  # a deadlock is a finding: see `expire`
        }.items():
            self.ask("postgres", f"ALTER SYSTEM SET {name} = '{value}'")
        self.restart()
        self._make_template()

    def connect(self, name: str) -> Any:
        """A superuser's connection."""
        connection = psycopg2.connect(
            host=self.url.query["host"],
            user="postgres",
            dbname=name,
            options=f"-c default_transaction_read_only=off -c search_path={SEARCH_PATH}",
        )
        connection.autocommit = True
        return connection

    def ask(self, name: str, statement: str) -> None:
        connection = self.connect(name)
        connection.cursor().execute(statement)
        connection.close()

    def _make_template(self) -> None:
        self.ask("postgres", f"CREATE DATABASE {TEMPLATE} OWNER {self.url.username}")
        engine = database.connect(self.url.set(database=TEMPLATE))
        schema.ensure_tables(engine)
        engine.dispose()
        defaults = "".join(
            f"ALTER TABLE atelier.{table} ALTER {column} SET DEFAULT simulation.clock_timestamp();"
            for table, columns in DEFAULTS.items()
            for column in columns
        )
        self.ask(TEMPLATE, CLOCK + defaults)
        self.ask("postgres", f"ALTER DATABASE {TEMPLATE} ALLOW_CONNECTIONS false")
        self.ask(
            "postgres",
            f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{TEMPLATE}'",
        )

    def make_database(self, name: str) -> str:
        """A copy of the template; its URL."""
        self.ask("postgres", f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY FILE_COPY")
        return self.url.set(database=name).render_as_string(hide_password=False)

    def drop_database(self, name: str) -> None:
        """Drop a copy."""
        self.ask("postgres", f"DROP DATABASE {name} WITH (FORCE)")

    def drop_databases(self) -> None:
        """Drop all copies."""
        connection = self.connect("postgres")
        cursor = connection.cursor()
        cursor.execute("SELECT datname FROM pg_database WHERE datname LIKE 'simulated%'")
        for (name,) in cursor.fetchall():
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
        connection.close()

    def restart(self) -> None:
        """End it as a crash does, and start it again."""
        postmaster = psutil.Process(int((self._embedded.data / "postmaster.pid").read_text().split()[0]))
        postmaster.send_signal(signal.SIGQUIT)
        while is_alive(postmaster):
            time.sleep(0.01)
        self._embedded.start()

    def stop(self) -> None:
        self._embedded.stop()


class Cursor(extensions.cursor):
    """A cursor whose statements are boundaries."""

    def execute(self, query: Any, parameters: Any = None) -> None:
        connection: Any = self.connection
        text = query.as_string(self) if hasattr(query, "as_string") else str(query)

        def run() -> None:
            extensions.cursor.execute(self, query, parameters)

        connection.simulated.run(connection, text, run, parameters, self)

    def copy_expert(self, query: str, file: Any, size: int = 8192) -> None:
        """COPY to a file."""
        connection: Any = self.connection
        rows = io.BytesIO()  # to write to the file may be a boundary

        def run() -> None:
            with connection.simulated.blocking():  # it waits for no lock but an upgrade's
                extensions.cursor.copy_expert(self, query, rows, size)

        connection.simulated.run(connection, query, run, None, self)
        file.write(rows.getvalue())


class Connection(extensions.connection):
    """A connection of an actor."""

    simulated: "Database"
    asked: str  # how it was asked for
    process: Any
    pid = 0
    blocked_since: float | None = None  # in simulated seconds
    idle_since = 0.0
    loses_answer = False
    last_statement = ""  # but for COMMIT
    is_at_work = False  # whether libpq is inside a call

    def cursor(self, *positional: Any, **named: Any) -> Any:
        return super().cursor(*positional, **{"cursor_factory": Cursor, **named})

    def commit(self) -> None:
        self._end("COMMIT", super().commit)

    def rollback(self) -> None:
        self._end("ROLLBACK", super().rollback)

    def _end(self, statement: str, call: Callable[[], None]) -> None:
        if current() is None or self.closed or self.info.transaction_status == 0:
            call()
        else:
            self.simulated.run(self, statement, call)

    def close(self) -> None:
        if self in self.simulated.connections:
            self.simulated.hang_up(self)

    @property
    def is_in_transaction(self) -> bool:
        return not self.closed and self.info.transaction_status != 0

    @property
    def is_blocked(self) -> bool:
        return self.blocked_since is not None


def share_what_never_changes() -> None:
    """Let a new worker find what a worker before it has compiled: else most of the time goes there."""
    _VersionManager.__init__ = lambda *_: None
    _VersionManager.check_table_schema_compatibility = lambda _: None
    initialize, of_server = PGDialect_psycopg2.initialize, {}

    def find(dialect: Any, connection: Any) -> None:
        own = vars(dialect)
        before = own.setdefault("before", {*own})  # an attempt may fail half-way
        if not of_server:
            initialize(dialect, connection)
            of_server.update({name: value for name, value in own.items() if name not in before})
        own.update(of_server)

    PGDialect_psycopg2.initialize = find
    PGDialect_psycopg2.__hash__ = lambda _: 0
    PGDialect_psycopg2.__eq__ = lambda _, other: isinstance(other, PGDialect_psycopg2)
    compiled = LRUCache[Any, Any](5000)
    make = sa.Engine.__init__

    def init(engine: sa.Engine, *positional: Any, **named: Any) -> None:
        make(engine, *positional, **named)
        engine._compiled_cache = compiled

    sa.Engine.__init__ = init
    # A set of objects, in the order of their addresses: it decides in which order rows are loaded.
    Mapper._prop_set = property(lambda mapper: OrderedSet(mapper._props.values()))


class Database:
    """One simulation's database: its time, its statements, and what may happen to connections."""

    def __init__(self, server: Server, name: str, scheduler: Scheduler, history: History) -> None:
        self._server, self._name = server, name
        self._scheduler, self._history = scheduler, history
        self.connections: list[Connection] = []
        self._spare: dict[str, list[Connection]] = {}  # that were hung up, by what they were asked for
        self.is_read_only = False
        self.deadlocks: list[str] = []
        self.down_until = 0.0
        self._set_to = 0.0  # what the database's clock was last set to
        self._monitor = server.connect(name)
        storage.libpq.psycopg2 = _Psycopg2(self)
        database.WORK.settings["search_path"] = SEARCH_PATH
        extensions.set_wait_callback(self.wait)
        self.set_clock()

    def ask(self, query: str, *values: Any) -> list[Any]:
        """Ask as a superuser, outside of the simulation."""
        with self._monitor.cursor() as cursor:
            cursor.execute(query, values)
            return list(cursor.fetchall()) if cursor.description else []

    def set_clock(self) -> None:
        """Set the database's clock to the simulated time."""
        if self._set_to != self._scheduler.now:
            self._set_to = self._scheduler.now
            self.ask("SELECT setval('simulation.clock', %s)", round(self._set_to * 1e6))

    def connect(self, *positional: Any, **named: Any) -> Any:
        """What psycopg2.connect does, for an actor."""
        actor = current()
        if actor is None:
            return psycopg2.connect(*positional, **named)
        self._scheduler.boundary("connect")
        if self._scheduler.now < self.down_until:
            named["host"] = str(Path(named["host"]).parent)  # where no server listens
        asked = repr((positional, named, self.is_read_only))
        if spare := self._spare.get(asked):
            connection = spare.pop()
        else:
            connection = psycopg2.connect(*positional, connection_factory=Connection, **named)
            connection.simulated, connection.asked = self, asked
            connection.pid = connection.info.backend_pid
        connection.process = actor.process
        connection.idle_since = self._scheduler.now
        self.connections.append(connection)
        return connection

    def run(
        self,
        connection: Connection,
        statement: str,
        call: Callable[[], None],
        parameters: Any = None,
        cursor: Any = None,
    ) -> None:
        """Run a statement between two boundaries. What it raises is psycopg2's."""
        actor = current()
        if actor is None:
            return call()
        actor.connection, actor.statement = connection, statement
        if statement != "COMMIT":
            connection.last_statement = statement.lstrip()
        is_write = statement == "COMMIT" or (
            connection.autocommit and WRITES.match(statement) is not None
        )
        self._scheduler.boundary("before commit" if is_write else "before statement")
        self.set_clock()
        error: Exception | None = None
        connection.is_at_work = True
        try:
            call()
        except psycopg2.Error as raised:
            error = raised
            raise
        finally:
            connection.is_at_work = connection.loses_answer = False
            connection.idle_since = self._scheduler.now
            self.settle()
            self._history.add_statement(actor, statement, parameters, cursor, error)
            if error is None:
                self._scheduler.boundary("after commit" if is_write else "after statement")
            actor.connection = None

    @contextmanager
    def blocking(self) -> Iterator[None]:
        """Without psycopg2's callback, under which there is no COPY. Nobody else goes on meanwhile."""
        extensions.set_wait_callback(None)
        try:
            yield
        finally:
            extensions.set_wait_callback(self.wait)

    def wait(self, connection: Any) -> None:
        """Let psycopg2's call come to its end."""
        while (state := connection.poll()) != extensions.POLL_OK:
            if state == extensions.POLL_WRITE:
                _is_ready(connection, None, select.POLLOUT)
            elif current() is None or not isinstance(connection, Connection) or not connection.pid:
                _is_ready(connection, None)
            else:
                self._await_answer(connection)

    def _await_answer(self, connection: Connection) -> None:
        while not _is_ready(connection, SOON):
            if self._waits_for_a_lock([connection.pid]):
                connection.blocked_since = self._scheduler.now
                self._scheduler.wait_until("answer", lambda: not connection.is_blocked, None, deaf=True)
        if connection.loses_answer:
            connection.loses_answer = False
            self.lose(connection)

    def _waits_for_a_lock(self, pids: list[int]) -> set[int]:
        query = "SELECT pid FROM unnest(%s::int[]) AS pid WHERE pg_blocking_pids(pid) <> '{}'"
        return {pid for (pid,) in self.ask(query, pids)}

    def settle(self) -> None:
        """Wait until every backend that was woken has answered, or waits for a lock again."""
        while waiting := [one for one in self.connections if one.is_blocked]:
            for connection in waiting:
                if connection.closed or _is_ready(connection, 0):
                    self._unblock(connection)
            waiting = [one for one in waiting if one.is_blocked]
            locked = self._waits_for_a_lock([one.pid for one in waiting])
            working = [one for one in waiting if one.pid not in locked]
            if not working:
                return
            _is_ready(working[0], SOON)

    def _unblock(self, connection: Connection) -> None:
        connection.blocked_since = None
        if connection.process.is_gone:  # nobody reads the answer
            self._end_backends([connection])

    def expire(self) -> None:
        """What the server does when sessions have waited or idled for too long."""
        now = self._scheduler.now
        for one in self.connections:
            if one.is_blocked and now >= one.blocked_since + TIMEOUT:
                self._look_for_deadlock(one)
                self.ask("SELECT pg_cancel_backend(%s)", one.pid)
                _is_ready(one, None)  # its error comes
            elif not one.is_blocked and one.is_in_transaction and now >= one.idle_since + TIMEOUT:
                self._end_backends([one])
        self.settle()

    def _look_for_deadlock(self, connection: Connection) -> None:
        """Note it if a session waits for itself, by way of others.

        Not if a user's session is among them: Optuna's own deletion of a study locks rows in another
        order than claims do. Then PostgreSQL ends one of them, and a worker tries again.
        """
        seen, ahead = set[int](), [connection.pid]
        while ahead:
            [(blocking,)] = self.ask("SELECT pg_blocking_pids(%s)", ahead.pop())
            ahead += set(blocking) - seen
            seen.update(blocking)
        waiting = {one.process for one in self.connections if one.pid in seen}
        if connection.pid in seen and all(process.place is not None for process in waiting):
            names = ", ".join(sorted(process.name for process in waiting))
            self.deadlocks.append(f"no_deadlock: sessions of {names} wait for each other")

    def next_expiry(self) -> float:
        """When the server does this next, if nothing happens before."""
        times = [
            (one.idle_since if one.blocked_since is None else one.blocked_since) + TIMEOUT
            for one in self.connections
            if one.is_blocked or one.is_in_transaction
        ]
        return min(times, default=float("inf"))

    def hang_up(self, connection: Connection) -> None:
        """Let the server see that a client has gone: it rolls back.

        The session is kept for who asks for one like it. To begin one takes as long as ten statements.
        """
        self.connections.remove(connection)
        if not connection.closed:
            extensions.connection.rollback(connection)
            connection.set_session("DEFAULT", "DEFAULT", "DEFAULT", autocommit=False)
            self._spare.setdefault(connection.asked, []).append(connection)
        self.settle()

    # Faults.

    def lose(self, connection: Connection) -> None:
        """Cut a connection; an answer that has come is lost."""
        self._end_backends([connection])
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            while end.recv(65536):
                pass
            end.shutdown(socket.SHUT_RDWR)

    def terminate(self, connections: list[Connection]) -> None:
        """Let the server end connections; their clients are told."""
        self._end_backends(connections)
        self.settle()

    def abandon(self, process: Any, leaves_work: bool) -> None:
        """Close the connections of a process that is gone; with `leaves_work` not where one works."""
        own = [one for one in self.connections if one.process is process]
        left = [one for one in own if one.is_blocked and leaves_work]
        self._end_backends([one for one in own if one.is_at_work and one not in left])
        for connection in own:
            if not connection.is_at_work:
                self.hang_up(connection)
        self.settle()

    def _end_backends(self, connections: list[Connection]) -> None:
        ended = [one for one in connections if one in self.connections]
        if ended:
            pids = [one.pid for one in ended]
            self.ask("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", pids)
        for one in ended:
            _is_ready(one, None, select.POLLHUP)  # its locks are free by then
            self.connections.remove(one)
            one.blocked_since = None

    def crash(self, seconds: float) -> None:
        """Kill the server. It is there again after so many seconds."""
        self._monitor.close()
        with self.blocking():
            self._server.restart()
            self._monitor = self._server.connect(self._name)
        self.down_until = self._scheduler.now + seconds
        for one in self.connections:
            one.blocked_since = None
        self.connections.clear()
        self._spare.clear()
        self._set_to = 0.0
        self.set_clock()

    def set_read_only(self, is_on: bool) -> None:
        """Let new sessions be those of a standby."""
        self.is_read_only = is_on
        value = "= on" if is_on else "= off"
        self.ask(f"ALTER DATABASE {self._name} SET default_transaction_read_only {value}")

    def close(self) -> None:
        extensions.set_wait_callback(None)
        self._monitor.close()


def _is_ready(connection: Any, seconds: float | None, event: int = select.POLLIN) -> bool:
    """Whether there is something to read, at the latest after so many seconds."""
    poll = select.poll()  # unlike select(), it takes any number of open files
    poll.register(connection, event)
    return bool(poll.poll(None if seconds is None else math.ceil(1000 * seconds)))


class _Psycopg2:
    """The module psycopg2, for storage.libpq."""

    def __init__(self, simulated: Database) -> None:
        self.connect = simulated.connect

    def __getattr__(self, name: str) -> Any:
        return getattr(psycopg2, name)

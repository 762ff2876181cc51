"""Databases as people have them: read-only, taken away, behind a pooler, in another encoding, with few
rights. What is for the moment is waited for; the rest is one line that says what to do."""

import logging
import os
import shutil
import socket
import subprocess
import threading
import time

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from dashboards.web.server import connect_roles
from search.exit_codes import ExitCode
from storage import database, roles, schema
from storage.ledger import Ledger
from storage.network import VIEWER, WORKER
from storage.postgres_programs import SYSTEM_USER
from storage.properties import why_without
from storage.tables import EPOCHS
from storage.url import DatabaseError
from tests.conftest import as_superuser, free_port
from tests.studies import fill

ONE_TRIAL = ("study.max_trials=1", "space.lr=[1e-3]", "space.batch_size=[32]")
NO_WRITES = "takes no writes (a standby, or default_transaction_read_only); give the primary"


def curve(engine):
    columns = (EPOCHS.c.epoch, EPOCHS.c.train_loss, EPOCHS.c.val_loss, EPOCHS.c.value, EPOCHS.c.lr)
    with engine.connect() as connection:
        return connection.execute(sa.select(*columns).order_by(EPOCHS.c.epoch)).all()


def at_the_first_record(monkeypatch, event):
    """Something happens to the database when a worker has trained its first epoch."""
    record, happened = Ledger.record, []

    def after_the_event(self, *arguments):
        if not happened:
            happened.append(True)
            event()
        return record(self, *arguments)

    monkeypatch.setattr(Ledger, "record", after_the_event)


def error_line(result):
    """The one line that a command has said."""
    [line] = result.output.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def on_server(server):
    """Runs statements as superuser; what is given as `undo` runs after the test."""
    later = []

    def run(*statements, undo=()):
        later.extend(undo)
        as_superuser(server, *statements)

    yield run
    as_superuser(server, *later)


@pytest.fixture
def read_only(database_name, on_server):
    """Makes the test's database one that takes no writes, for every new session."""

    def switch():
        on_server(f"ALTER DATABASE {database_name} SET default_transaction_read_only = on")

    return switch


# The server changes while a worker is at work.


def test_a_worker_waits_for_a_server_that_is_read_only_and_goes_on(
    engine, make_worker, monkeypatch, on_server
):
    assert make_worker(*ONE_TRIAL, "study.name=undisturbed").run() == ExitCode.DONE
    expected = curve(engine)
    with engine.begin() as connection:
        connection.execute(sa.delete(EPOCHS))
    reload, reset = "SELECT pg_reload_conf()", "ALTER SYSTEM RESET default_transaction_read_only"
    refused = threading.Event()
    sa.event.listen(
        engine,
        "handle_error",
        lambda context: "read-only" in str(context.original_exception) and refused.set(),
    )

    def fail_over():
        on_server("ALTER SYSTEM SET default_transaction_read_only = on", reload, undo=[reset, reload])
        wait_until(lambda: is_read_only(engine))
        threading.Thread(target=lambda: refused.wait() and on_server(reset, reload)).start()

    at_the_first_record(monkeypatch, fail_over)
    assert make_worker(*ONE_TRIAL, "study.name=disturbed").run() == ExitCode.DONE
    assert refused.is_set()
    assert curve(engine) == expected
    assert len(expected) == 3


def is_read_only(engine):
    with engine.connect() as connection:
        return connection.scalar(sa.text("SHOW transaction_read_only")) == "on"


def wait_until(condition):
    while not condition():
        time.sleep(0.05)


ENDS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"


@pytest.mark.parametrize(
    ("statements", "inside", "expected"),
    [
        (["REVOKE INSERT, UPDATE ON ALL TABLES IN SCHEMA atelier FROM atelier_worker"], True, "denied"),
        (["REVOKE USAGE ON SCHEMA atelier FROM atelier_worker"], True, "denied for schema atelier"),
        (["DROP TABLE atelier.epoch CASCADE"], True, 'relation "atelier.epoch" does not exist'),
        (["DROP SCHEMA atelier CASCADE"], True, "does not exist"),
        (["ALTER TABLE atelier.epoch DROP COLUMN train_loss"], True, "does not exist"),
        (["DROP DATABASE {name} WITH (FORCE)"], False, 'database "{name}" does not exist'),
        (["ALTER ROLE atelier NOLOGIN", ENDS], False, 'role "atelier" is not permitted to log in'),
    ],
)
def test_a_worker_ends_with_one_line_when_it_is_final(
    atelier, database_name, prepared_url, monkeypatch, on_server, statements, inside, expected
):
    def event():
        if inside:
            other = sa.create_engine(make_url(prepared_url).set(username="postgres"))
            with other.begin() as connection:
                for statement in statements:
                    connection.execute(sa.text(statement))
            other.dispose()
        else:
            every = [statement.format(name=database_name) for statement in statements]
            on_server(*every, undo=["ALTER ROLE atelier LOGIN"])

    at_the_first_record(monkeypatch, event)
    result = atelier("worker", "study.toml", code=2)
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("error: the database: ")
    assert expected.format(name=database_name) in last
    assert "Traceback" not in result.output


def test_a_session_that_met_a_standby_is_not_used_again(engine):
    with engine.connect() as connection:
        first = connection.scalar(sa.text("SELECT pg_backend_pid()"))
        connection.execute(sa.text("SET TRANSACTION READ ONLY"))
        with pytest.raises(DBAPIError, match="read-only") as caught:
            connection.execute(sa.text("DELETE FROM atelier.study"))
    assert database.is_transient(caught.value)
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT pg_backend_pid()")) != first


def test_an_absence_that_is_too_long_is_one_line_and_no_wrong_input(
    atelier, engine, monkeypatch, on_server
):
    fill(engine, ["complete"], name="s")
    token = database.thread_patience.set(0)
    blocker = engine.connect()
    blocker.execute(sa.text("LOCK TABLE atelier.study"))
    impatient = database.WORK.having(statement_timeout="200ms")
    monkeypatch.setattr(database, "look", lambda _, look=database.look: look(impatient))
    result = atelier("status", "s", code=1)
    assert "canceling statement due to statement timeout" in error_line(result)
    blocker.close()
    database.thread_patience.reset(token)


# What is found at the first contact.


@pytest.mark.parametrize(
    "words",
    [
        ["search", "study.toml"],
        ["worker", "study.toml"],
        ["stop", "s"],
        ["stop", "s", "--undo"],
        ["db", "upgrade"],
    ],
)
def test_who_has_to_write_is_told_at_once_that_nothing_can_be(atelier, engine, read_only, words):
    fill(engine, ["complete"], name="s")
    read_only()
    assert NO_WRITES in error_line(atelier(*words, code=2))


def test_an_empty_database_that_takes_no_writes(atelier, database_url, read_only):
    read_only()
    assert NO_WRITES in error_line(atelier("search", "study.toml", code=2))
    assert "BAD writes: no" in atelier("db", "check", code=2).output


def test_who_only_looks_does_so_on_a_standby(atelier, engine, read_only, tmp_path):
    fill(engine, ["complete", "pruned"], name="s")
    read_only()
    for words in (["status", "s"], ["trials", "s"], ["logs", "s"], ["db", "status"], ["plot", "s"]):
        output = ["-o", str(tmp_path / "x.png")] if words[0] == "plot" else []
        atelier(*words, *output)
    atelier("db", "backup", str(tmp_path / "s.tar"))
    for role in connect_roles().values():
        with role.engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT study_name FROM studies")) == "s"
        role.engine.dispose()


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_JP"])
def test_a_database_that_cannot_hold_every_name_gets_no_tables(
    atelier, server, database_name, database_url, encoding
):
    as_superuser(
        server,
        f"DROP DATABASE {database_name}",
        f"CREATE DATABASE {database_name} OWNER atelier TEMPLATE template0 ENCODING '{encoding}' "
        "LOCALE 'C'",
    )
    for words in (["search", "study.toml", "--set", "study.name=衣服"], ["db", "upgrade"]):
        assert f"has the encoding {encoding}" in error_line(atelier(*words, code=2))
    checked = atelier("db", "check", code=2).output
    assert f"BAD encoding: {encoding}" in checked
    assert "OK  server: PostgreSQL" in checked
    assert "none yet" in checked


def test_names_of_any_language_whatever_the_environment_says(engine, monkeypatch):
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    other = database.connect()
    fill(other, ["complete"], name="衣服")
    assert "衣服" in [one.study_name for one in roles.read_only(other).storage.get_all_studies()]
    other.dispose()


@pytest.fixture
def as_user(server, database_name, database_url, monkeypatch):
    """Makes a user who owns nothing, and lets the commands be that user's."""
    as_superuser(server, "DROP ROLE IF EXISTS plain", "CREATE ROLE plain LOGIN")
    url = make_url(database_url)
    superuser = sa.create_engine(url.set(username="postgres"), isolation_level="AUTOCOMMIT")
    monkeypatch.setenv("ATELIER_DATABASE_URL", url.set(username="plain").render_as_string())

    def run(*statements):
        with superuser.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    yield run
    superuser.dispose()
    as_superuser(server, f"DROP DATABASE {database_name} WITH (FORCE)", "DROP ROLE plain")


@pytest.mark.parametrize(
    ("before", "missing"),
    [
        ([], "GRANT CREATE ON SCHEMA public TO plain; GRANT CREATE ON DATABASE {name} TO plain"),
        (["GRANT CREATE ON SCHEMA public TO plain"], "GRANT CREATE ON DATABASE {name} TO plain"),
        (["GRANT CREATE ON DATABASE {name} TO plain"], "GRANT CREATE ON SCHEMA public TO plain"),
        (
            ["GRANT CREATE ON SCHEMA public TO plain", "CREATE SCHEMA atelier"],
            "GRANT USAGE ON SCHEMA atelier TO plain; GRANT CREATE ON SCHEMA atelier TO plain",
        ),
        (
            ["GRANT CREATE ON DATABASE {name} TO plain", "DROP SCHEMA public"],
            "CREATE SCHEMA public; GRANT USAGE ON SCHEMA public TO plain; "
            "GRANT CREATE ON SCHEMA public TO plain",
        ),
    ],
)
def test_the_rights_that_are_missing_are_named_and_are_enough(
    atelier, database_name, as_user, before, missing
):
    as_user("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # as since PostgreSQL 15
    as_user(*(statement.format(name=database_name) for statement in before))
    missing = missing.format(name=database_name)
    line = error_line(atelier("search", "study.toml", code=2))
    assert line.endswith(f"run: {missing}")
    assert "upgrade" not in line
    assert f"run: {missing}" in atelier("db", "check", code=2).output
    as_user(*missing.split("; "))
    assert "schema none -> " in atelier("db", "upgrade").output
    assert "BAD" not in atelier("db", "check").output


def test_a_user_who_may_not_look_into_tables_that_are_there(atelier, as_user, database_url):
    owner = database.connect(make_url(database_url))
    schema.ensure_tables(owner)
    owner.dispose()
    line = error_line(atelier("search", "study.toml", code=2))
    assert line.endswith(f"run: GRANT {WORKER} TO plain")
    as_user(f"GRANT {WORKER} TO plain")
    engine = database.connect()
    schema.ensure_tables(engine)
    engine.dispose()


def test_an_owner_who_can_make_no_roles_is_told_once_and_not_to_ask_itself(
    atelier, database_name, as_user, caplog
):
    as_user(
        "GRANT CREATE ON SCHEMA public TO plain", f"GRANT CREATE ON DATABASE {database_name} TO plain"
    )
    caplog.set_level(logging.INFO)
    engine = database.connect()
    schema.ensure_tables(engine)
    [said] = [one for one in caplog.records if one.levelno >= logging.WARNING]
    grants = f"GRANT {VIEWER} TO plain; GRANT {WORKER} TO plain"
    assert said.getMessage().endswith(f"and has no CREATEROLE; let an administrator run: {grants}")
    caplog.clear()
    schema.ensure_tables(engine)
    assert not roles.for_worker(engine).has_role
    assert [one.levelname for one in caplog.records] == ["INFO"]
    assert "owner" not in caplog.text
    as_user(*grants.split("; "))  # what was said is enough
    assert roles.for_worker(engine).has_role
    assert roles.read_only(engine).has_role
    engine.dispose()


def test_a_role_that_is_not_there(engine):
    with engine.connect() as connection:
        assert why_without(connection, WORKER, VIEWER) is None
        assert why_without(connection, "absent") == (
            "atelier cannot act as absent and has no CREATEROLE; let an administrator run: CREATE ROLE "
            "absent NOLOGIN; GRANT absent TO atelier, then run: atelier db upgrade"
        )


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("DROP TABLE atelier.epoch CASCADE", "has no table atelier.epoch any more"),
        ("DROP TABLE trial_params", "has no table public.trial_params any more"),
        (
            "REVOKE UPDATE ON trials FROM atelier_worker",
            "gives atelier_worker no UPDATE on public.trials",
        ),
    ],
)
def test_check_finds_what_keeps_workers_from_working(atelier, engine, statement, expected):
    sound = atelier("db", "check").output.splitlines()
    assert all(line.startswith("OK  ") for line in sound)
    assert "OK  search_path: public" in sound
    assert "OK  statement_timeout: 1min" in sound
    with engine.begin() as connection:
        connection.execute(sa.text(statement))
    checked = atelier("db", "check", code=2).output
    assert "BAD tables" in checked
    assert expected in checked.splitlines()[-1]


# A pooler in between.


@pytest.fixture
def pooler(server, database_name, monkeypatch, tmp_path_factory):
    """Starts a real PgBouncer before the test's database, with further lines of its configuration."""
    if shutil.which("pgbouncer") is None:
        pytest.skip("needs Debian's pgbouncer")
    folder, started = tmp_path_factory.mktemp("pgbouncer"), []
    user = SYSTEM_USER if os.geteuid() == 0 else None

    def start(*lines):
        port = free_port()
        configuration = folder / "pgbouncer.ini"
        configuration.write_text(
            f"[databases]\n* = host={make_url(server).query['host']} user=atelier\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\n"
            "unix_socket_dir =\n" + "".join(f"{line}\n" for line in lines)
        )
        for path in (configuration, folder, *folder.parents):
            if os.geteuid() == 0 and path.stat().st_uid == 0 and path.is_relative_to(folder.parents[1]):
                path.chmod(path.stat().st_mode | 0o055)
        started.append(subprocess.Popen(["pgbouncer", "-q", str(configuration)], user=user))
        wait_until(lambda: answers(port))
        url = f"postgresql://atelier@127.0.0.1:{port}/{database_name}"
        monkeypatch.setenv("ATELIER_DATABASE_URL", url)

    yield start
    for process in started:
        process.terminate()
        process.wait()


def answers(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


IGNORED = "ignore_startup_parameters = options"


@pytest.mark.parametrize("mode", ["session", "transaction", "statement"])
def test_a_pooler_that_drops_what_a_session_asks_for_is_refused(atelier, engine, pooler, mode):
    fill(engine, ["complete"], name="s")
    pooler(IGNORED, f"pool_mode = {mode}")
    for words in (["search", "study.toml"], ["worker", "study.toml"], ["status", "s"]):
        line = error_line(atelier(*words, code=2))
        assert "statement_timeout = '0' instead of '1min'" in line
        assert "idle_in_transaction_session_timeout = '0' instead of '1min'" in line
        assert line.endswith("connect to PostgreSQL itself, not through a pooler")
    if mode == "statement":  # in which nothing more can be looked at
        return
    checked = atelier("db", "check", code=2).output
    assert "BAD statement_timeout: 0" in checked
    assert "OK  encoding: UTF8" in checked


def test_a_pooler_that_refuses_what_a_session_asks_for(atelier, engine, pooler):
    pooler()
    for words in (["search", "study.toml"], ["status", "s"], ["db", "check"]):
        line = error_line(atelier(*words, code=2))
        assert "unsupported startup parameter" in line
        assert line.endswith("connect to PostgreSQL itself, not through a pooler")


def test_a_pooler_that_drops_a_role_is_refused_though_the_server_gives_the_rest(
    engine, pooler, database_name, on_server
):
    """Neither a worker nor a viewer gets more rights than it asked for."""
    on_server(
        *(
            f"ALTER DATABASE {database_name} SET {name} = '{value}'"
            for name, value in database.WORK.settings.items()
        )
    )
    fill(engine, ["complete"], name="s")
    pooler(IGNORED, "pool_mode = session")
    owner = database.connect()
    for restricted, role in ((roles.for_worker, WORKER), (roles.read_only, VIEWER)):
        with pytest.raises(DatabaseError, match=f"role = 'none' instead of '{role}'.*not through"):
            restricted(owner).engine.connect()
        with pytest.raises(DatabaseError, match=f"role = 'none' instead of '{role}'"):
            restricted(owner).storage.get_all_studies()
    owner.dispose()

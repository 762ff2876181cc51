"""The environment steers no connection, and who only looks makes nothing anywhere."""

import os
import re
from pathlib import Path

import psycopg2
import pytest
from sqlalchemy.engine import make_url
from typer.testing import CliRunner

from search.cli import app
from storage import database, libpq, schema
from storage.embedded import EmbeddedPostgres
from storage.postgres_programs import EmbeddedPostgresError
from storage.url import DatabaseError
from tests.conftest import all_verbs, as_superuser, free_port
from tests.studies import fill

runner = CliRunner()
NOWHERE = "/nowhere/at/all"


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """The variables that libpq reads are as they were after the test, whoever has taken them away."""
    before = {name: value for name, value in os.environ.items() if name.startswith("PG")}
    yield
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module")
def other_server(tmp_path_factory, give_data):
    """A server that listens on a port and lets everybody in; what there is on it is to stay so."""
    home = give_data(tmp_path_factory.mktemp("other"))
    port = free_port()
    with (home / "postgres" / "postgresql.auto.conf").open("a") as file:
        file.write(f"port = {port}\n")
    server = EmbeddedPostgres(home)
    server.network.set_up("127.0.0.1", port, tls=False)
    server.network.access_rules = lambda: "local all all trust\nhost all all 127.0.0.1/32 trust\n"
    server.start()
    yield port
    server.stop()


def what_is_on(port):
    connection = psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres")
    with connection.cursor() as cursor:
        cursor.execute("SELECT rolname FROM pg_roles UNION ALL SELECT datname FROM pg_database")
        found = sorted(name for [name] in cursor.fetchall())
    connection.close()
    return found


def read_by_libpq():
    """The variables that the libpq that psycopg2 brings along knows."""
    [library] = Path(psycopg2.__file__).parents[1].glob("psycopg2_binary.libs/libpq*.so*")
    words = re.findall(rb"\0(PG[A-Z]+(?:_TIMEOUT)?)(?=\0)", library.read_bytes())
    return {word.decode() for word in words}


def test_every_variable_that_libpq_reads_is_kept_or_taken_away():
    known = read_by_libpq()
    assert len(known) > 35
    assert {"PGHOSTADDR", "PGSERVICE", "PGOPTIONS", "PGCONNECT_TIMEOUT"} <= known
    for name in known:
        os.environ[name] = "x"
    assert {name for name in libpq.environment() if name.startswith("PG")} == libpq.KEPT & known
    assert {"PGPASSFILE", "PGSSLCERT", "PGSSLKEY", "PGSSLROOTCERT", "PGPASSWORD"} <= libpq.KEPT


STEERING = {
    "PGHOSTADDR": "127.0.0.1",
    "PGHOST": "127.0.0.1",
    "PGPORT": "{port}",
    "PGUSER": "postgres",
    "PGDATABASE": "postgres",
    "PGOPTIONS": "-c default_transaction_read_only=on",
    "PGSERVICE": "other",
    "PGTARGETSESSIONATTRS": "standby",
    "PGREQUIREAUTH": "gss",
    "PGSSLMODE": "verify-full",
    "PGGSSENCMODE": "require",
    "PGCHANNELBINDING": "require",
    "PGREQUIREPEER": "nobody",
    "PGSSLMINPROTOCOLVERSION": "nonsense",
    "PGCONNECT_TIMEOUT": "nonsense",
    "PGDATA": "/nowhere",
    "PGTZ": "nonsense",
    "PGDATESTYLE": "nonsense",
    "PGCLIENTENCODING": "nonsense",
}


TOLD = {"PGHOSTADDR", "PGSERVICE", "PGTARGETSESSIONATTRS", "PGREQUIREAUTH", "PGREQUIREPEER"}
TOLD |= {"PGCHANNELBINDING", "PGGSSENCMODE", "PGSSLMINPROTOCOLVERSION"}


@pytest.mark.parametrize(
    "names", [["PGHOSTADDR"], ["PGSERVICE"], STEERING.keys() - TOLD, STEERING], ids=len
)
def test_a_search_in_a_home_goes_nowhere_else(names, home, give_data, other_server, tmp_path, caplog):
    give_data(home)
    before = what_is_on(other_server)
    service = tmp_path / "services"
    service.write_text(f"[other]\nhostaddr=127.0.0.1\nport={other_server}\n")
    os.environ["PGSERVICEFILE"] = str(service)
    for name in names:
        os.environ[name] = STEERING[name].format(port=other_server)
    engine = database.connect()  # what each of the verbs begins with
    schema.ensure_tables(engine)
    server = EmbeddedPostgres(home)
    assert engine.url.query["host"] == make_url(server.start()).query["host"]
    engine.dispose()
    server.stop()
    assert what_is_on(other_server) == before
    assert not any(name in os.environ for name in names)  # nor do children get them
    lines = [one.message for one in caplog.records if ": ignored;" in one.message]
    told = ", ".join(sorted(TOLD & {*names}))  # what would have led elsewhere, or kept us from going
    assert [line.partition(":")[0] for line in lines] == [told] * bool(told)


@pytest.mark.parametrize("name", ["PGHOSTADDR", "PGHOST", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE"])
def test_what_the_url_says_is_the_whole_way(name, prepared_url, other_server, tmp_path, engine):
    fill(engine, ["complete"], name="s")
    (tmp_path / "services").write_text(f"[other]\nhostaddr=127.0.0.1\nport={other_server}\n")
    os.environ["PGSERVICEFILE"] = str(tmp_path / "services")
    os.environ[name] = STEERING[name].format(port=other_server)
    result = runner.invoke(app, ["status", "s"])
    assert result.exit_code == 0, result.output
    assert "1/1 trials" in result.output


def test_what_the_url_leaves_to_a_service_is_found_there(
    prepared_url, engine, tmp_path, monkeypatch, home
):
    fill(engine, ["complete"], name="s")
    url = make_url(prepared_url)
    (tmp_path / "services").write_text(f"[ours]\nhost={url.query['host']}\ndbname={url.database}\n")
    os.environ["PGSERVICEFILE"] = str(tmp_path / "services")
    monkeypatch.setenv("ATELIER_DATABASE_URL", "postgresql://atelier@/?service=ours&sslmode=disable")
    result = runner.invoke(app, ["status", "s"])
    assert result.exit_code == 0, result.output


def test_a_password_of_the_environment_counts_unless_a_file_is_named(home, give_data, monkeypatch):
    server = EmbeddedPostgres(give_data(home))
    server.listen("127.0.0.1", free_port(), tls=False)
    password = server.network.url.query["passfile"]
    monkeypatch.setenv("PGPASSWORD", "of another server")
    database.connect().dispose()
    secret = Path(password).read_text().strip().rpartition(":")[2]
    url = server.network.url.difference_update_query(["passfile"])
    monkeypatch.setenv("ATELIER_DATABASE_URL", url.render_as_string())
    with pytest.raises(DatabaseError, match="password authentication failed"):
        database.connect()
    monkeypatch.setenv("PGPASSWORD", secret)
    database.connect().dispose()
    server.stop()


# Who only looks.

LOOKING = [
    ["status", "demo"],
    ["status", "demo", "--json"],
    ["status", "demo", "--watch"],
    ["trials", "demo"],
    ["trials", "demo", "--csv", "trials.csv"],
    ["logs", "demo"],
    ["efficiency", "demo"],
    ["efficiency", "demo", "--json"],
    ["doctor", "study.toml"],
    ["verify", "demo"],
    ["verify", "demo", "--json"],
    ["plot", "demo", "-o", "x.png"],
    ["report", "demo"],
    ["export", "demo"],
    ["confirm", "demo", "--show"],
    ["confirm", "demo", "--json"],
    ["confirm", "demo"],
    ["replay", "demo", "--trial", "0"],
    ["worker", "demo"],
    ["stop", "demo"],
    ["submit", "study.toml", "--dry-run"],
    ["confirm", "demo", "--dry-run"],
    ["train", "none.toml"],
    ["train", "none.toml", "--submit", "--dry-run"],
    ["predict", "none.run"],
    ["export-model", "none.run"],
    ["model", "study.toml"],
    ["data", "check", "nowhere"],
    ["dashboard", "--port", "{port}"],
    ["user", "list"],
    ["user", "remove", "nobody"],
    ["db", "status"],
    ["db", "check"],
    ["db", "backup", "atelier.tar"],
    ["db", "restore", "none.tar"],
    ["db", "prune"],
    ["db", "prune", "--deleted"],
    ["db", "prune", "demo", "--dry-run"],
    ["db", "stop"],
]
MAKING = {
    "demo",
    "example",
    "init",
    "search",
    "train --submit",
    "db start",
    "db upgrade",
    "data demo",
    "user add",
}


def everything_in(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.fixture
def folder(tmp_path, study_text, monkeypatch):
    where = tmp_path / "work"
    where.mkdir()
    (where / "study.toml").write_text(study_text + "\n[slurm.tuning]\nmemory = '1G'\n")
    monkeypatch.chdir(where)
    return where


def end(words):
    """How it ends: by itself, in one line if it fails."""
    result = runner.invoke(app, [word.format(port=free_port()) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    if words[0] == "doctor":  # which lists what is wrong
        assert result.exit_code in (0, 1), result.output
        return result
    assert result.exit_code in (0, 2), result.output
    if result.exit_code == 2 and words[:2] != ["data", "check"]:  # which lists what is wrong
        assert len(result.output.splitlines()) == 1, result.output
    return result


def test_every_verb_makes_something_or_is_looked_at():
    looking = {" ".join(words[:2]) for words in LOOKING} | {words[0] for words in LOOKING}
    assert all_verbs() <= looking | MAKING


def look_at_all(what_there_is):
    """Give every command that looks; each leaves all as it was."""
    before = what_there_is()
    for words in LOOKING:
        end(words)
        assert what_there_is() == before, words


def test_looking_where_nothing_is_makes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "new" / "home"))
    monkeypatch.delenv("ATELIER_DATABASE_URL", raising=False)
    look_at_all(lambda: everything_in(tmp_path))


def test_looking_into_an_empty_database_makes_nothing(
    folder, tmp_path, monkeypatch, database_url, server
):
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "new" / "home"))
    look_at_all(lambda: (everything_in(tmp_path), on_server(server, database_url)))


def on_server(server, url):
    """Roles, databases, and what is in one of them."""
    found = []
    for name in ("postgres", make_url(url).database):
        connection = psycopg2.connect(host=make_url(server).query["host"], user="postgres", dbname=name)
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT rolname FROM pg_roles UNION ALL SELECT datname FROM pg_database "
                "UNION ALL SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' "
                "UNION ALL SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
            )
            found += sorted(row[0] for row in cursor.fetchall())
        connection.close()
    return found


@pytest.mark.parametrize("words", [["status", "demo"], ["db", "check"], ["dashboard"], ["db", "prune"]])
def test_looking_into_a_home_whose_making_was_cut_short_makes_nothing(words, home, give_data, folder):
    server = EmbeddedPostgres(give_data(home))
    url = server.start()
    as_superuser(url, "DROP DATABASE atelier", "DROP ROLE atelier_viewer")
    server.stop()
    assert "has no database yet" in end(words).output
    assert not server.is_running()
    database.connect(make_url(server.start())).dispose()  # it is made by who may make one
    server.stop()


def test_a_folder_for_data_that_is_empty_is_no_database(home, folder):
    (home / "postgres").mkdir()
    assert "no database in" in end(["status", "demo"]).output
    assert not any((home / "postgres").iterdir())


# What waiting cannot mend.


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("atelier@no-such-host.invalid/a?sslmode=disable", "could not translate host name"),
        (f"atelier@/a?host={NOWHERE}", "No such file or directory"),
        (f"atelier@/a?host={NOWHERE}&host=/{'x' * 120}", "is too long"),
        ("a%00b@127.0.0.1:{port}/a", "is not a URL"),
        ("atelier@127.0.0.1:99999/a", "invalid port number"),
        ("atelier@127.0.0.1/a?sslmode=maybe", "invalid sslmode value"),
        ("atelier@/a?service=none&sslmode=disable", "none"),
        (
            "atelier@127.0.0.1:{port}/a?sslmode=verify-full&sslrootcert=/nowhere",
            "server does not support SSL",
        ),
        ("atelier@127.0.0.1:{port}/nothing", 'database "nothing" does not exist'),
        ("nobody@127.0.0.1:{port}/postgres", 'role "nobody" does not exist'),
        ("atelier@127.0.0.1:{port}/a?sslmode=require", "server does not support SSL"),
        ("atelier@127.0.0.1:{port}/a?channel_binding=require", "channel binding"),
        ("atelier@127.0.0.1:{port}/a?require_auth=password", "authentication method requirement"),
    ],
)
def test_who_would_wait_for_ever_is_told_at_once(query, expected, other_server, monkeypatch):
    monkeypatch.setenv("ATELIER_DATABASE_URL", f"postgresql://{query.format(port=other_server)}")
    tried = []
    monkeypatch.setattr("storage.database.wait_random_exponential", lambda **_: tried.append)
    with pytest.raises(DatabaseError, match=expected) as caught:
        database.connect(patience=database.PATIENCE)  # as a worker does
    assert not tried
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("lost", ["gone", "replaced"])
def test_a_server_that_has_lost_its_socket_is_not_waited_for(lost, home, give_data):
    server = EmbeddedPostgres(give_data(home))
    folder = make_url(server.start()).query["host"]
    [path] = Path(folder).glob(".s.PGSQL.*[0-9]")
    path.unlink()
    if lost == "replaced":
        path.mkdir()
    with pytest.raises(EmbeddedPostgresError, match="db stop --force"):
        server.acquire()
    if lost == "replaced":
        path.rmdir()
    assert server.stop()

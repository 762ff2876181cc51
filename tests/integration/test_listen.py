"""The embedded server on the network: a password, no superuser, TLS where the build has it."""

import os
import socket
import stat
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from typer.testing import CliRunner

from search.cli import app
from storage import database, url
from storage.embedded import EmbeddedPostgres
from storage.url import DatabaseError
from tests.conftest import free_port
from tests.studies import open_storage

runner = CliRunner()
SYSTEM = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # Debian's; built with TLS


@pytest.fixture
def home(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("listen") / "home"
    monkeypatch.setenv("ATELIER_HOME", str(folder))
    monkeypatch.delenv("ATELIER_DATABASE_URL", raising=False)
    yield folder
    if folder.is_dir():
        EmbeddedPostgres(folder).stop()


@pytest.fixture
def used_home(home, give_data):
    """The same with the data of a server that ran before."""
    return give_data(home)


@pytest.fixture
def port():
    return free_port()


def start(port, *options):
    return runner.invoke(app, ["db", "start", "--listen", "127.0.0.1", "--port", str(port), *options])


def refused(port, user, password=None, sslmode="prefer"):
    with pytest.raises(psycopg2.OperationalError) as caught:
        psycopg2.connect(
            host="127.0.0.1",
            port=port,
            user=user,
            password=password,
            dbname="atelier",
            sslmode=sslmode,
            passfile="/dev/null",
        )
    return str(caught.value)


def test_the_network_needs_the_password_and_serves_no_superuser(home, port):
    result = start(port, "--no-tls")
    assert result.exit_code == 0, result.output
    passfile = home / "database.pass"
    password = passfile.read_text().strip().rpartition(":")[2]
    assert len(password) > 30
    assert stat.S_IMODE(passfile.stat().st_mode) == 0o600
    engine = database.connect()  # by the file that the home holds
    assert (engine.url.host, engine.url.port) == ("127.0.0.1", port)
    open_storage(engine)
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SHOW is_superuser")) == "off"
        assert connection.scalar(sa.text("SELECT count(*) FROM atelier.study")) == 0
    engine.dispose()
    assert "no password" in refused(port, "atelier")
    assert "authentication failed" in refused(port, "atelier", "guess")
    assert "no pg_hba.conf entry" in refused(port, "postgres", password)
    shown = [
        result.output,
        (home / "database.url").read_text(),
        (home / "postgres.log").read_text(errors="replace"),
        *(path.read_text(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline")),
    ]
    assert not any(password in text for text in shown)


def test_a_server_that_listens_does_so_again_with_the_same_password(used_home, port):
    start(port, "--no-tls")
    password = (used_home / "database.pass").read_text()
    assert runner.invoke(app, ["db", "stop"]).output == "stopped\n"
    down = runner.invoke(app, ["status", "x"])
    assert down.exit_code == 2
    assert "cannot reach the database" in down.output
    assert runner.invoke(app, ["db", "start"]).exit_code == 0
    database.connect().dispose()
    assert start(port, "--no-tls").exit_code == 0
    assert (used_home / "database.pass").read_text() == password
    database.connect().dispose()


def test_without_listen_there_is_no_port(used_home):
    url = make_url(EmbeddedPostgres(used_home).acquire())
    connection = psycopg2.connect(host=url.query["host"], user=url.username, dbname=url.database)
    with connection.cursor() as cursor:
        cursor.execute("SHOW listen_addresses")
        assert cursor.fetchone() == ("",)
    connection.close()
    EmbeddedPostgres(used_home).release()


def test_no_tls_has_to_be_said(used_home, port):
    result = start(port)
    assert result.exit_code == 2
    assert result.output.startswith("error: this PostgreSQL was built without TLS")
    assert len(result.output.splitlines()) == 1
    assert not (used_home / "database.url").exists()


def test_an_address_that_is_not_this_machines_leaves_the_server_as_it_was(used_home):
    EmbeddedPostgres(used_home).start()
    result = runner.invoke(app, ["db", "start", "--listen", "203.0.113.9", "--no-tls"])
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1)
    assert "could not create any TCP/IP sockets" in result.output
    database.connect().dispose()  # by its socket
    assert not (used_home / "database.url").exists()


def test_a_port_that_is_taken_leaves_the_server_where_it_listened(used_home, port):
    start(port, "--no-tls")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = start(taken.getsockname()[1], "--no-tls")
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1)
    engine = database.connect()
    assert engine.url.port == port
    engine.dispose()


def test_a_server_in_use_is_not_taken_from_its_users(used_home, port):
    start(port, "--no-tls")
    user = psycopg2.connect(url.configured_url())
    for refusal in (start(port, "--no-tls"), runner.invoke(app, ["db", "stop"])):
        assert (refusal.exit_code, len(refusal.output.splitlines())) == (2, 1)
        assert "is in use" in refusal.output
    user.cursor().execute("SELECT 1")  # it is still served
    assert runner.invoke(app, ["db", "stop", "--force"]).output == "stopped\n"
    with pytest.raises(psycopg2.OperationalError):
        user.cursor().execute("SELECT 1")


def test_what_goes_with_listen_goes_nowhere_without(home):
    for option in (["--port", "5"], ["--no-tls"], ["--postgres", "/usr"]):
        result = runner.invoke(app, ["db", "start", *option])
        assert (result.exit_code, len(result.output.splitlines())) == (2, 1)
        assert "go with --listen" in result.output
    assert not home.exists()


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "a b", "$(id)", ""])
def test_an_address_that_nobody_could_connect_to_is_refused(home, address):
    result = runner.invoke(app, ["db", "start", "--no-tls", "--listen", address])
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1)
    assert "allowed is one address" in result.output


@pytest.mark.skipif(not SYSTEM, reason="needs a PostgreSQL with TLS in /usr/lib/postgresql")
def test_with_tls_nothing_goes_in_the_clear_and_the_server_is_verified(home, port, monkeypatch):
    result = start(port, "--postgres", str(SYSTEM[-1]))
    assert result.exit_code == 0, result.output
    engine = database.connect()
    open_storage(engine)
    with engine.connect() as connection:
        query = "SELECT ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        encrypted, version = connection.execute(sa.text(query)).one()
    engine.dispose()
    assert encrypted
    assert version >= "TLSv1.2"
    password = (home / "database.pass").read_text().strip().rpartition(":")[2]
    assert "no encryption" in refused(port, "atelier", password, sslmode="disable")
    assert stat.S_IMODE((home / "postgres.key").stat().st_mode) == 0o600
    # A server with another certificate is not believed.
    (home / "database.crt").write_text((home / "database.crt").read_text())
    url = make_url((home / "database.url").read_text().strip())
    other = home / "other.crt"
    os.system(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=x "
        f"-keyout /dev/null -out {other} 2>/dev/null"
    )
    monkeypatch.setenv(
        "ATELIER_DATABASE_URL", url.update_query_dict({"sslrootcert": str(other)}).render_as_string()
    )
    with pytest.raises(DatabaseError, match="certificate verify failed"):
        database.connect()


def test_programs_of_another_version_are_for_a_new_home(used_home, port, tmp_path):
    EmbeddedPostgres(used_home).start()
    (tmp_path / "initdb").touch()
    result = start(port, "--no-tls", "--postgres", str(tmp_path))
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1)
    assert "is for a new home" in result.output
    empty = start(port, "--no-tls", "--postgres", str(used_home))
    assert "no initdb in it" in empty.output

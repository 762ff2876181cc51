"""The embedded server: shared by real processes, and gone with the last of them."""

import multiprocessing
import shutil
import tempfile
from pathlib import Path

import psutil
import psycopg2
import pytest
from sqlalchemy.engine import make_url

from storage.embedded import EmbeddedPostgres, EmbeddedPostgresError

context = multiprocessing.get_context("spawn")


@pytest.fixture
def home():
    folder = Path(tempfile.mkdtemp(prefix="at-"))
    folder.chmod(0o755)
    yield folder / "home"
    if folder.is_dir():
        EmbeddedPostgres(folder / "home").stop()
        shutil.rmtree(folder)


def query(url, sql="SELECT 1"):
    parts = make_url(url)
    connection = psycopg2.connect(host=parts.query["host"], user=parts.username, dbname=parts.database)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(sql)
        rows = cursor.fetchall() if cursor.description else []
    connection.close()
    return rows


def use(home, ready, leave) -> None:
    url = EmbeddedPostgres(home).acquire()
    assert query(url) == [(1,)]
    ready.release()
    leave.wait()


@pytest.fixture
def user(home):
    """Starts a process that uses the server until it is told to leave."""
    started = []

    def start():
        ready, leave = context.Semaphore(0), context.Event()
        process = context.Process(target=use, args=(home, ready, leave))
        process.start()
        started.append(process)
        return process, ready, leave

    yield start
    for process in started:
        process.kill()
        process.join()


def test_the_last_one_out_stops_it(home, user):
    server = EmbeddedPostgres(home)
    assert not server.is_running()
    assert query(server.acquire()) == [(1,)]
    process, ready, leave = user()
    assert ready.acquire(timeout=60)
    server.release()
    assert server.is_running()
    leave.set()
    process.join(60)
    assert process.exitcode == 0
    assert not server.is_running()


def test_a_killed_user_does_not_keep_it_alive(home, user):
    process, ready, _ = user()
    assert ready.acquire(timeout=60)
    process.kill()
    process.join()
    server = EmbeddedPostgres(home)
    assert server.is_running()
    server.acquire()
    server.release()
    assert not server.is_running()


def test_start_keeps_it_and_stop_ends_it(home):
    server = EmbeddedPostgres(home)
    url = server.start()
    server.acquire()
    server.release()
    assert query(url) == [(1,)]
    assert server.stop()
    assert not server.is_running()
    assert not server.stop()


def test_four_processes_at_once_on_an_empty_folder_share_one_cluster(home, user):
    users = [user() for _ in range(4)]
    assert all(ready.acquire(timeout=90) for _, ready, _ in users)
    for process, _, leave in users:
        leave.set()
        process.join(60)
    assert [process.exitcode for process, _, _ in users] == [0] * 4
    assert not EmbeddedPostgres(home).is_running()


def test_data_survive_a_crash_of_the_server(home):
    server = EmbeddedPostgres(home)
    url = server.acquire()
    query(url, "CREATE TABLE kept AS SELECT 42 AS x")
    pid = int((server.data / "postmaster.pid").read_text().split()[0])
    family = [psutil.Process(pid), *psutil.Process(pid).children()]
    for process in family:
        process.kill()
    psutil.wait_procs(family)
    assert not server.is_running()
    assert query(server.acquire(), "SELECT x FROM kept") == [(42,)]


def test_a_half_made_cluster_is_swept(home):
    leftover = home / "postgres.new-dead"
    leftover.mkdir(parents=True)
    (leftover / "junk").touch()
    EmbeddedPostgres(home).acquire()
    EmbeddedPostgres(home).release()
    assert not leftover.exists()


def test_a_long_path_works(home):
    server = EmbeddedPostgres(home / ("x" * 120))
    assert query(server.acquire()) == [(1,)]
    server.release()
    assert not server.is_running()


def test_only_the_owner_reaches_the_socket_and_there_is_no_port(home):
    server = EmbeddedPostgres(home)
    url = server.acquire()
    assert query(url, "SHOW listen_addresses") == [("",)]
    assert Path(make_url(url).query["host"]).stat().st_mode & 0o077 == 0
    server.release()


def test_a_home_that_is_a_file_is_refused(home):
    home.write_text("mine")
    with pytest.raises(EmbeddedPostgresError, match="set ATELIER_HOME to another"):
        EmbeddedPostgres(home).acquire()
    assert home.read_text() == "mine"


def test_the_server_of_another_host_is_left_alone(home):
    server = EmbeddedPostgres(home)
    server.acquire()
    server.release()
    (home / "postgres.host").write_text("elsewhere\n")
    (server.data / "postmaster.pid").write_text("1\n")
    with pytest.raises(EmbeddedPostgresError, match="runs on host elsewhere"):
        server.acquire()
    (server.data / "postmaster.pid").unlink()

"""The embedded server: shared by real processes, and gone with the last of them."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg2
import pytest
from sqlalchemy.engine import make_url

from storage.embedded import EmbeddedPostgres
from storage.network import NetworkError
from storage.postgres_process import is_alive
from storage.postgres_programs import SYSTEM_USER, EmbeddedPostgresError

context = multiprocessing.get_context("spawn")


@pytest.fixture
def home():
    folder = Path(tempfile.mkdtemp(prefix="at-"))
    folder.chmod(0o755)
    yield folder / "home"
    for data in folder.rglob("postgres"):
        if (data / "PG_VERSION").exists():
            EmbeddedPostgres(data.parent).stop()
    shutil.rmtree(folder)


@pytest.fixture
def used_home(home, give_data):
    """The same with the data of a server that ran before."""
    return give_data(home)


def query(url, sql="SELECT 1"):
    parts = make_url(url)
    connection = psycopg2.connect(
        host=parts.query["host"],
        port=parts.query.get("port"),
        user=parts.username,
        dbname=parts.database,
    )
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(sql)
        rows = cursor.fetchall() if cursor.description else []
    connection.close()
    return rows


def pid_of(server):
    return int((server.data / "postmaster.pid").read_text().split()[0])


def kill_with_children(pid):
    family = [psutil.Process(pid), *psutil.Process(pid).children()]
    for process in family:
        with suppress(psutil.NoSuchProcess):  # PostgreSQL's own workers come and go
            process.kill()
    psutil.wait_procs(family)


def use(home, ready, leave, environment) -> None:
    os.environ.update(environment)
    url = EmbeddedPostgres(home).acquire()
    assert query(url) == [(1,)]
    ready.release()
    leave.wait()


@pytest.fixture
def user(home):
    """Starts a process that uses the server until it is told to leave."""
    started = []

    def start(path=home, **environment):
        ready, leave = context.Semaphore(0), context.Event()
        process = context.Process(target=use, args=(path, ready, leave, environment))
        process.start()
        started.append(process)
        return process, ready, leave

    yield start
    for process in started:
        process.kill()
        process.join()


def test_the_last_one_out_stops_it(used_home, user):
    server = EmbeddedPostgres(used_home)
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


def test_a_killed_user_does_not_keep_it_alive(used_home, user):
    process, ready, _ = user()
    assert ready.acquire(timeout=60)
    process.kill()
    process.join()
    server = EmbeddedPostgres(used_home)
    assert server.is_running()
    server.acquire()
    server.release()
    assert not server.is_running()


def test_start_keeps_it_and_stop_ends_it(used_home):
    server = EmbeddedPostgres(used_home)
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


def test_data_survive_a_crash_of_the_server(used_home):
    server = EmbeddedPostgres(used_home)
    url = server.acquire()
    query(url, "CREATE TABLE kept AS SELECT 42 AS x")
    kill_with_children(pid_of(server))
    assert not server.is_running()
    assert query(server.acquire(), "SELECT x FROM kept") == [(42,)]


def test_data_survive_stop_and_start(used_home):
    server = EmbeddedPostgres(used_home)
    query(server.start(), "CREATE TABLE kept AS SELECT 42 AS x")
    assert server.stop()
    assert query(server.start(), "SELECT x FROM kept") == [(42,)]


def test_a_killed_postmaster_whose_backends_still_live_is_followed_at_once(used_home):
    server = EmbeddedPostgres(used_home)
    server.acquire()
    os.kill(pid_of(server), signal.SIGKILL)
    assert query(server.acquire()) == [(1,)]
    server.release()


def test_a_server_that_is_just_stopping_is_waited_for_and_started_again(used_home):
    server = EmbeddedPostgres(used_home)
    query(server.acquire(), "CREATE TABLE kept AS SELECT generate_series(1, 1000000) AS x")
    os.kill(pid_of(server), signal.SIGINT)
    assert query(server.acquire()) == [(1,)]
    server.release()


def test_a_start_that_was_killed_before_it_made_the_database_is_finished(used_home):
    server = EmbeddedPostgres(used_home)
    url = make_url(server.start())
    query(url.set(database="postgres"), "DROP DATABASE atelier")
    assert query(server.acquire()) == [(1,)]


@pytest.fixture
def stranger():
    """A process of the server's user that has nothing to do with it."""
    process = subprocess.Popen(["sleep", "600"], user=SYSTEM_USER if os.geteuid() == 0 else None)
    yield process
    process.kill()
    process.wait()


def test_a_stranger_with_the_pid_of_a_crashed_server_is_neither_taken_for_it_nor_hurt(
    used_home, stranger
):
    server = EmbeddedPostgres(used_home)
    url = server.start()
    locks = [server.data / "postmaster.pid", Path(make_url(url).query["host"]) / ".s.PGSQL.5432.lock"]
    kill_with_children(pid_of(server))
    for lock in locks:
        _, rest = lock.read_text().split("\n", 1)
        lock.write_text(f"{stranger.pid}\n{rest}")
    assert not server.is_running()
    assert not server.stop()
    assert query(server.acquire()) == [(1,)]
    assert stranger.poll() is None
    server.release()


def test_a_forked_child_neither_leaves_for_its_parent_nor_holds_the_server_for_it(used_home):
    server = EmbeddedPostgres(used_home)
    server.acquire()
    leave, wait = os.pipe()
    child = os.fork()
    if child == 0:
        server.release()
        os.close(wait)
        os.read(leave, 1)  # returns when the parent closes its end
        os._exit(0)
    assert query(server.acquire()) == [(1,)]
    server.release()
    running = server.is_running()
    os.close(wait)
    assert os.waitpid(child, 0)[1] == 0
    os.close(leave)
    assert not running


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


def test_a_name_that_a_shell_would_expand_works(home):
    server = EmbeddedPostgres(home / 'it\'s `my` $HOME, "ü" %41')
    assert query(server.acquire()) == [(1,)]
    server.release()


def test_users_with_other_names_for_a_long_path_and_for_tmp_find_the_socket(
    home, give_data, user, tmp_path
):
    server = EmbeddedPostgres(give_data(home / ("x" * 120)))
    server.acquire()
    (home / "link").symlink_to(server.home)
    for path, environment in ((server.home, {"TMPDIR": str(tmp_path)}), (home / "link", {})):
        process, ready, leave = user(path, **environment)
        leave.set()
        process.join(60)
        assert process.exitcode == 0
        assert ready.acquire(timeout=1)
    server.release()
    assert not server.is_running()


@pytest.mark.parametrize("kind", ["open", "link"])
def test_a_socket_folder_that_somebody_else_could_have_made_is_refused(
    home, give_data, kind, monkeypatch
):
    server = EmbeddedPostgres(give_data(home / ("x" * 120)))
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    digest = hashlib.sha256(os.fsencode(server.home)).hexdigest()[:12]
    sockets, target = home / f"atelier-{os.geteuid()}-{digest}", home / "target"
    target.mkdir(mode=0o700)
    if kind == "open":
        sockets.mkdir()
        sockets.chmod(0o777)
    else:
        sockets.symlink_to(target)
    with pytest.raises(EmbeddedPostgresError, match="not a private folder"):
        server.acquire()
    assert target.stat().st_uid == os.geteuid()
    assert not server.is_running()


def test_only_the_owner_reaches_the_socket_and_there_is_no_port(used_home):
    server = EmbeddedPostgres(used_home)
    url = server.acquire()
    assert query(url, "SHOW listen_addresses") == [("",)]
    assert Path(make_url(url).query["host"]).stat().st_mode & 0o077 == 0
    server.release()


def test_a_home_that_is_a_file_is_refused(home):
    home.write_text("mine")
    with pytest.raises(EmbeddedPostgresError, match="set ATELIER_HOME to another") as caught:
        EmbeddedPostgres(home).acquire()
    assert len(str(caught.value).splitlines()) == 1
    assert home.read_text() == "mine"


def test_a_folder_with_files_of_somebody_else_is_left_alone(home):
    (home / "postgres").mkdir(parents=True)
    (home / "postgres" / "mine").touch()
    with pytest.raises(EmbeddedPostgresError, match="move it away"):
        EmbeddedPostgres(home).acquire()
    assert [path.name for path in (home / "postgres").iterdir()] == ["mine"]


def test_a_failed_start_says_why_in_one_line(used_home):
    server = EmbeddedPostgres(used_home)
    server.start()
    server.stop()
    with (server.data / "postgresql.auto.conf").open("a") as file:
        file.write("work_mem = 'lots'\n")
    with pytest.raises(EmbeddedPostgresError, match='invalid value for parameter "work_mem"') as caught:
        server.acquire()
    assert len(str(caught.value).splitlines()) == 1
    assert str(used_home / "postgres.log") in str(caught.value)


def test_the_server_of_another_host_is_left_alone(used_home):
    server = EmbeddedPostgres(used_home)
    server.acquire()
    server.release()
    (used_home / "postgres.host").write_text("elsewhere\n")
    (server.data / "postmaster.pid").write_text("1\n")
    for use_it in (server.acquire, server.stop):
        with pytest.raises(EmbeddedPostgresError, match="runs on host elsewhere"):
            use_it()
    (server.data / "postmaster.pid").unlink()


# The kernel answers ENOSYS to flock, in this process and its children: a file system without locks.
NO_LOCKS = """
import ctypes, errno, platform, struct, sys

flock = {"x86_64": 73, "aarch64": 32}[platform.machine()]
load, equal, answer = 0x20, 0x15, 0x06  # of seccomp's machine
refused, allowed = 0x50000 | errno.ENOSYS, 0x7FFF0000
steps = (load, 0, 0, 0), (equal, 0, 1, flock), (answer, 0, 0, refused), (answer, 0, 0, allowed)
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))

class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, ctypes.get_errno()  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(code)))) == 0, ctypes.get_errno()
from search.cli import main
main()
"""


def without_locks(home, *words):
    return subprocess.run(
        [sys.executable, "-c", NO_LOCKS, *words],
        env=os.environ | {"ATELIER_HOME": str(home)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("used", [False, True])
def test_what_could_not_be_stopped_is_not_started(home, give_data, used):
    if used:  # with the files of the locks, from a time when there were some
        EmbeddedPostgres(give_data(home)).acquire()
        EmbeddedPostgres(home).release()
    for words in (["start"], ["start", "--listen", "127.0.0.1", "--no-tls"]):
        result = without_locks(home, "db", *words)
        assert result.returncode == 2
        [line] = result.stderr.splitlines()
        assert line.startswith(f"error: the file system of {home} has no locks (flock: ")
        assert "set ATELIER_HOME to a folder on a file system that has them" in line
    assert not EmbeddedPostgres(home).is_running()
    assert used or not (home / "postgres").exists()


def test_what_an_earlier_version_has_started_without_locks_can_be_stopped(used_home):
    EmbeddedPostgres(used_home).start()
    refused = without_locks(used_home, "db", "stop")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "or say --force" in refused.stderr
    assert without_locks(used_home, "db", "stop", "--force").stdout == "stopped\n"
    assert not EmbeddedPostgres(used_home).is_running()


def acquire_as(user, home, said):
    os.setgid(user)
    os.setuid(user)
    try:
        EmbeddedPostgres(home).acquire()
    except EmbeddedPostgresError as error:
        said.put(str(error))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be a user whom nobody knows")
def test_a_user_who_is_not_in_etc_passwd_is_told_so(home, give_data):
    EmbeddedPostgres(home).acquire()  # opens the programs to other users
    EmbeddedPostgres(home).release()
    other = home.with_name("other")
    other.mkdir(mode=0o700)
    os.chown(other, 54321, 54321)
    fork = multiprocessing.get_context("fork")
    said = fork.Queue()
    process = fork.Process(target=acquire_as, args=(54321, other, said))
    process.start()
    line = said.get(timeout=60)
    process.join()
    assert "could not look up effective user ID 54321" in line
    assert "this user (54321) is not in /etc/passwd" in line
    assert "nss_wrapper" in line
    assert "ATELIER_DATABASE_URL" in line
    assert "room" not in line
    assert len(line.splitlines()) == 1


def broken_program(home, text):
    folder = home.with_name("programs")
    folder.mkdir()
    for name in ("initdb", "pg_ctl", "postgres"):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    home.mkdir(exist_ok=True)
    (home / "postgres.programs").write_text(f"{folder}\n")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("#!/bin/sh\necho initdb: error: of the thirteenth kind; exit 1\n", "of the thirteenth kind"),
        ("#!/no/such/shell\n", "No such file or directory"),
        ("no program at all", "initdb"),
    ],
)
def test_what_programs_say_is_quoted_and_not_explained(home, program, expected):
    broken_program(home, program)
    with pytest.raises(EmbeddedPostgresError) as caught:
        EmbeddedPostgres(home).acquire()
    assert expected in str(caught.value)
    assert "room" not in str(caught.value)
    assert "cannot use the folder" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_reason_of_a_failed_start_is_not_that_of_an_earlier_one(used_home):
    (used_home / "postgres.log").write_text("FATAL: the reason of another day\n")
    broken_program(used_home, "#!/bin/sh\necho pg_ctl: error: of today; exit 1\n")
    with pytest.raises(EmbeddedPostgresError, match="of today") as caught:
        EmbeddedPostgres(used_home).acquire()
    assert "another day" not in str(caught.value)


@pytest.mark.parametrize("address", ["a b", "198.51.100.7"])
def test_a_server_that_cannot_listen_is_not_left_running(used_home, address):
    server = EmbeddedPostgres(used_home)
    with pytest.raises((EmbeddedPostgresError, NetworkError)):
        server.listen(address, 5432, tls=False)
    assert not server.is_running()
    assert server.network.url is None


def test_a_server_that_was_killed_and_that_nobody_has_waited_for_is_gone():
    """A zombie holds nothing, and may stay for as long as its parent likes."""
    child = subprocess.Popen(["true"])
    process = psutil.Process(child.pid)
    while process.status() != psutil.STATUS_ZOMBIE:
        continue
    assert not is_alive(process)
    child.wait()
    assert not is_alive(process)

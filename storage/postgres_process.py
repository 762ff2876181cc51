"""The process of a PostgreSQL server: whether it runs, what it notes, and what a crash leaves of it."""

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil


class ServerProcess:
    """The server of one data folder, if there is one."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def is_running(self) -> bool:
        """Whether the server of this home runs on this machine."""
        # Not `pg_ctl status`: after a crash any process may have the pid in postmaster.pid.
        try:
            return self._serves(psutil.Process(int(self.notes()[0])))
        except (OSError, ValueError, IndexError, psutil.Error):
            return False

    def notes(self) -> list[str]:
        """The server's own notes: 0 the pid, 3 the port, 4 the socket folder (late)."""
        return os.fsdecode((self.data / "postmaster.pid").read_bytes()).splitlines()

    def _serves(self, process: psutil.Process) -> bool:
        """Whether it is a PostgreSQL, or a process of one, that works in the data folder."""
        try:
            return process.name() == "postgres" and os.path.samefile(process.cwd(), self.data)
        except (OSError, psutil.Error):
            return False

    def has_lost_its_socket(self) -> bool:
        """Whether somebody has removed it from under a server that serves: waiting brings none back."""
        with suppress(OSError, ValueError, IndexError):
            _, _, _, port, folder, *_, state = self.notes()
            lost = not Path(folder, f".s.PGSQL.{port}").is_socket()
            return lost and state.strip() == "ready" and self.is_running()
        return False

    def sweep_after_crash(self) -> None:
        """Wait for, then remove, what PostgreSQL itself would stumble over after a crash."""
        family = [process for process in psutil.process_iter() if self._serves(process)]
        with suppress(OSError, ValueError, IndexError, psutil.Error):
            server = psutil.Process(int(self.notes()[0]))
            if server.name() == "postgres":  # dying, it has no folder any more
                family.append(server)
        deadline = time.monotonic() + 10
        while any(map(is_alive, family)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not any(self._serves(process) for process in family):
            self._remove_strangers_locks()

    def _remove_strangers_locks(self) -> None:
        """PostgreSQL does not start while a process of its user has the pid in its lock files.

        After a crash that may be any process. Without such a process the files stay: PostgreSQL
        itself judges them best.
        """
        with suppress(OSError, ValueError, IndexError):
            lines = self.notes()
            if psutil.pid_exists(int(lines[0])):
                for folder in lines[4:5]:
                    for lock in Path(folder).glob(".s.PGSQL.*.lock"):
                        lock.unlink()
                (self.data / "postmaster.pid").unlink()


def is_alive(process: psutil.Process) -> bool:
    """Whether it may still hold something; a zombie, for which nobody has waited yet, holds nothing."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""Observe the PostgreSQL server's process: whether it runs, its pid file, and the remains of a crash."""

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
        # Not `pg_ctl status`: after a crash, another program may have the pid in postmaster.pid.
        try:
            return self._serves(psutil.Process(int(self.notes()[0])))
        except (OSError, ValueError, IndexError, psutil.Error):
            return False

    def notes(self) -> list[str]:
        """The lines of postmaster.pid: 0 is the pid, 3 the port, 4 the socket folder (written late)."""
        return os.fsdecode((self.data / "postmaster.pid").read_bytes()).splitlines()

    def _serves(self, process: psutil.Process) -> bool:
        """Whether it is a process of a PostgreSQL that works in the data folder."""
        try:
            return process.name() == "postgres" and os.path.samefile(process.cwd(), self.data)
        except (OSError, psutil.Error):
            return False

    def has_lost_its_socket(self) -> bool:
        """Whether somebody deleted the socket of a running server: waiting does not bring it back."""
        with suppress(OSError, ValueError, IndexError):
            _, _, _, port, folder, *_, state = self.notes()
            lost = not Path(folder, f".s.PGSQL.{port}").is_socket()
            return lost and state.strip() == "ready" and self.is_running()
        return False

    def sweep_after_crash(self) -> None:
        """Wait for the processes that a crash left, then remove lock files that prevent a new start."""
        remaining = [process for process in psutil.process_iter() if self._serves(process)]
        with suppress(OSError, ValueError, IndexError, psutil.Error):
            server = psutil.Process(int(self.notes()[0]))
            if server.name() == "postgres":  # while it dies, it has no working folder
                remaining.append(server)
        deadline = time.monotonic() + 10
        while any(map(is_alive, remaining)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not any(self._serves(process) for process in remaining):
            self._remove_stale_locks()

    def _remove_stale_locks(self) -> None:
        """Remove lock files whose pid now belongs to another program.

        PostgreSQL does not start while a process of its user has that pid. If no process has it, the
        files stay: PostgreSQL removes them itself.
        """
        with suppress(OSError, ValueError, IndexError):
            lines = self.notes()
            if psutil.pid_exists(int(lines[0])):
                for folder in lines[4:5]:
                    for lock in Path(folder).glob(".s.PGSQL.*.lock"):
                        lock.unlink()
                (self.data / "postmaster.pid").unlink()


def is_alive(process: psutil.Process) -> bool:
    """Whether a process may still hold resources; a zombie holds none."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""Identify worker processes, and find out which holders of trials are still alive."""

import os
import resource
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import sqlalchemy as sa

from storage.clock import now
from storage.tables import ATTEMPTS, WORKERS


def process_identity(pid: int | None = None) -> str:
    """A name for a process; a later process with the same pid has another one.

    Raises psutil.NoSuchProcess.
    """
    pid = pid or os.getpid()
    return f"{_machine()}:{pid}:{_start_time(pid)}"


def peak_memory() -> int:
    """The most bytes of main memory that this process has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def host() -> str:
    """The name of the machine that this process runs on."""
    return socket.gethostname()


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _start_time(pid: int) -> str:
    try:
        # In ticks since the boot: setting the machine's clock does not change it.
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19]
    except OSError:
        return f"{psutil.Process(pid).create_time():.2f}"


def is_gone(process: str) -> bool:
    """True if the process ran on this machine and has ended; False if it lives, or ran elsewhere."""
    machine, pid, _ = process.rsplit(":", 2)
    if machine != _machine():
        return False
    try:
        if psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE:
            return True  # it has ended, but its parent has not waited for it
        return process_identity(int(pid)) != process
    except psutil.NoSuchProcess:
        return True


@dataclass(frozen=True)
class Holder:
    """A worker that holds a trial; a later process of the same job is another holder."""

    worker_id: str
    process: str
    slurm_cluster: str | None
    slurm_job: str | None
    slurm_restarts: int


# Selects attempts at trials that a worker holds: its lease lasts.
HELD = sa.and_(ATTEMPTS.c.released.is_(None), ATTEMPTS.c.lease_until > now())

# By worker id: True for an alive holder, False for a gone one; without an entry if nobody can say.
Liveness = Mapping[str, bool]


def probe_this_host(holders: Iterable[Holder]) -> dict[str, bool]:
    """The liveness that this machine can tell: False for workers that have ended on it."""
    return {holder.worker_id: False for holder in holders if is_gone(holder.process)}


def read_holders(connection: sa.Connection, study_id: int) -> list[Holder]:
    """The workers with open attempts at a study's trials."""
    query = (
        sa.select(
            WORKERS.c.id,
            WORKERS.c.process,
            WORKERS.c.slurm_cluster,
            WORKERS.c.slurm_job,
            WORKERS.c.slurm_restarts,
        )
        .join(ATTEMPTS, ATTEMPTS.c.worker_id == WORKERS.c.id)
        .where(ATTEMPTS.c.study_id == study_id, ATTEMPTS.c.released.is_(None))
    )
    return [Holder(*row) for row in connection.execute(query)]


def hosts_at_work(connection: sa.Connection, study_id: int) -> set[str]:
    """The hosts of workers that hold a trial of a study."""
    query = (
        sa.select(WORKERS.c.host)
        .distinct()
        .join(ATTEMPTS, ATTEMPTS.c.worker_id == WORKERS.c.id)
        .where(ATTEMPTS.c.study_id == study_id, HELD)
    )
    return set(connection.scalars(query))

"""What administrators do in the middle of a search: back up, restore elsewhere, upgrade the tables.

One of them is at work at a time. Who upgrades wants the tables alone, and a backup's COPY, during which
nobody else goes on, would wait for the upgrade's end.
"""

import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2
import sqlalchemy as sa

from search.verify.evidence import gather
from search.verify.rules import Holds, violations
from storage import backup, database, schema
from storage.archive import BackupError
from storage.optuna_storage import DATABASE_ERRORS
from storage.studies import study_entry
from storage.url import DatabaseError
from tests.simulation.process import KILLED, Process
from tests.simulation.scheduler import Actor, current

if TYPE_CHECKING:
    from tests.simulation.faults import Fault
    from tests.simulation.simulation import Simulation

LONGEST = 120  # seconds that the rest of a restored search may take
PACES = (0.0, 0.1, 0.3)
PAUSE = 10.0  # simulated seconds at most: those between two statements end no transaction
RENEWED_SINCE = """
SELECT DISTINCT trials.number FROM public.trials JOIN atelier.attempt USING (trial_id)
WHERE renewed >= to_timestamp(%s)
"""
REVISION = "9999"
MIGRATION = """
from alembic import op
import sqlalchemy as sa

revision, down_revision = "{revision}", "{before}"


def upgrade():
    op.add_column("epoch", sa.Column("newer", sa.Integer), schema="atelier")
"""


class Administrator:
    """What the administrators of a simulation have done, and which version of Atelier is whose."""

    def __init__(self, sim: "Simulation") -> None:
        self.sim = sim
        self.process = Process("admin", "login", 2)
        self.is_at_work = False
        self.backups = 0
        self._backup: Process | None = None  # the last one
        self._pace, self._chance = 0.0, random.Random(f"backups {sim.seed}")
        self.all_are_newer = False  # whether the workers are of the newer version too
        self._own = schema.migrations()
        self._newer: Path | None = None
        schema.migrations = lambda: self._migrations()

    def _is_newer(self) -> bool:
        """Whether the code that runs now is the newer version's."""
        actor = current()
        return self.all_are_newer or (actor is not None and actor.process is self.process)

    def _migrations(self) -> Path:
        if not self._is_newer():
            return self._own
        assert self._newer is not None
        return self._newer

    def make_newer(self, folder: Path) -> None:
        """Make the newer version, which has one migration more."""
        if self._newer is None:
            shutil.copytree(self._own, folder, ignore=shutil.ignore_patterns("__pycache__"))
            text = MIGRATION.format(revision=REVISION, before=schema.head_revision())
            (folder / "versions" / f"{REVISION}_newer.py").write_text(text)
            self._newer = folder

    def revision(self) -> str:
        """The revision of the tables."""
        [(revision,)] = self.sim.database.ask("SELECT version_num FROM atelier.alembic_version")
        return str(revision)

    def upgrade(self, fault: "Fault", seconds: float) -> None:
        """Upgrade the tables. After that it takes a while until the workers are of that version."""
        sim, before = self.sim, self.revision()
        try:
            schema.upgrade(engine := database.connect(sa.make_url(sim.url)))
            engine.dispose()
        except DATABASE_ERRORS as error:
            is_refusal = isinstance(error, DatabaseError) and "hold" in str(error)
            fault.hits = is_refusal
            sim.history.add("admin", fault, type(error).__name__, is_refusal)
            if is_refusal and self.revision() != before:
                sim.violations.append(f"{fault} was refused, yet the tables are {self.revision()}")
        else:
            fault.hits = True
            sim.history.add("admin", fault, "done")
            if self.revision() != REVISION:
                sim.violations.append(f"{fault} has left the tables at {self.revision()}")
        self.is_at_work = False
        if self.revision() == REVISION:
            sim.scheduler.sleep(seconds)
            self.all_are_newer = True
        sim.users.at_work -= 1

    def back_up(self, fault: "Fault") -> None:
        """Let a process back up, and restore that elsewhere."""
        sim, told, begun = self.sim, dict(self.sim.users.told), self.sim.scheduler.now
        checkpoints = _checkpoints(sim)
        path = sim.folder / f"{self.backups}.tar"
        self.backups += 1
        self._pace = self._chance.choice(PACES)
        process = self._backup = Process("backup", "login", 3)
        sim.machines.processes.append(process)  # a power failure ends it too
        sim.scheduler.spawn(process, "main", lambda: self._make(fault, process, path))
        sim.scheduler.wait_until("end", lambda: process.is_gone, None)
        if process.exit_code == KILLED:
            _close(sim.disk.home / "backup.lock")
        elif fault.hits and not self.all_are_newer:  # else its models would need the newer column
            # What has changed meanwhile may be trained again: checkpoints are held first.
            changed = {digest.parent for digest in checkpoints ^ _checkpoints(sim)}
            for run in sim.disk.home.glob("runs/*"):
                changed |= {run / f"trial-{n:05}" for (n,) in sim.database.ask(RENEWED_SINCE, begun)}
            found: list[str] = []
            sim.scheduler.outside(lambda: found.extend(_restore(sim, path, told, changed)))
            sim.violations += [f"{fault}, restored: {one}" for one in found]
        self.is_at_work = False
        sim.users.at_work -= 1

    def _make(self, fault: "Fault", process: Process, path: Path) -> None:
        """What the process does. If that fails, there is a cause, and nothing is left."""
        sim, begun = self.sim, self.sim.scheduler.now
        engine = database.make_engine(sa.make_url(sim.url), database.WORK)
        try:
            backup.back_up(engine, path)
            fault.hits = True
            sim.history.add("admin", fault, "done")
        except Exception as error:  # whether it may come is asked here
            sim.history.add("admin", fault, type(error).__name__)
            if not self._has_cause(error, begun):
                sim.violations.append(f"{fault} failed: {type(error).__name__}: {error}")
            left = [*sim.folder.glob(f"*{path.name}*"), *sim.disk.home.glob("backup")]
            sim.violations += [f"{fault} failed, and left {one}" for one in left]
        engine.dispose()
        process.end(0 if fault.hits else 1, sim.scheduler.now)

    def _has_cause(self, error: Exception, begun: float) -> bool:
        """Whether something that happened since then explains why a backup has failed."""
        if isinstance(error, OSError):
            return error.errno == errno.ENOSPC and self.sim.disk.full_until >= begun
        is_of_database = isinstance(error, (*DATABASE_ERRORS, psycopg2.Error))
        return is_of_database and self.sim.database.down_until >= begun

    def take_time(self, actor: Actor) -> None:
        """Let a backup take a while: now and then some seconds pass at a boundary of it."""
        process, now = actor.process, self.sim.scheduler.now
        if process is not self._backup:
            return
        if process.paused_until == now:
            process.paused_until = 0.0  # this boundary has taken its time
        elif self._chance.random() < self._pace:
            process.paused_until = now + self._chance.uniform(0, PAUSE)


def upgrade(sim: "Simulation", actor: Actor, fault: "Fault", chance: random.Random) -> bool:
    """An administrator of a newer version upgrades the tables. It must not while a trial is held."""
    administrator, seconds = sim.administrator, chance.uniform(0, 300)
    if administrator.is_at_work:
        return False
    administrator.make_newer(sim.folder / "migrations")
    administrator.is_at_work = True
    sim.users.at_work += 1
    sim.scheduler.spawn(
        administrator.process, f"admin {fault}", lambda: administrator.upgrade(fault, seconds)
    )
    return True


def back_up(sim: "Simulation", actor: Actor, fault: "Fault", chance: random.Random) -> bool:
    """An administrator backs up, and restores that elsewhere."""
    administrator = sim.administrator
    if administrator.is_at_work or administrator.revision() != schema.head_revision():
        return False
    administrator.is_at_work = True
    sim.users.at_work += 1
    sim.scheduler.spawn(sim.site, f"admin {fault}", lambda: administrator.back_up(fault))
    return True


def _checkpoints(sim: "Simulation") -> set[Path]:
    """The digests of all checkpoints."""
    return set(sim.disk.home.glob("runs/*/trial-*/*.sha256"))


def _close(path: Path) -> None:
    """Close a file, as the kernel does for a process that is gone: so its lock is free."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # of the listing itself
            if os.readlink(f"/proc/self/fd/{number}") == str(path):
                os.close(int(number))


def _restore(sim: "Simulation", path: Path, told: dict[int, Any], changed: set[Path]) -> list[str]:
    """Restore a backup into a new database and an empty home, and end the search there.

    `told` has the trials that were told before it. Folders in `changed` may lack the newest checkpoints.
    """
    name, home = f"{sim.name}_{path.stem}", sim.folder / f"home-{path.stem}"
    home.mkdir()
    url = sim.server.make_database(name)
    kept = {key: os.environ[key] for key in ("ATELIER_HOME", "ATELIER_DATABASE_URL")}
    os.environ.update(ATELIER_HOME=str(home), ATELIER_DATABASE_URL=url)
    try:
        with sim.database.blocking():
            clock = f"SELECT setval('simulation.clock', {round(sim.scheduler.now * 1e6)})"
            sim.server.ask(name, clock)
            engine = database.connect(sa.make_url(url))
            backup.restore(engine, path)
            with engine.connect() as connection:
                if study_entry(connection, sim.config.study.name) is None:
                    return []  # of a study that was deleted, or not yet made
                evidence = gather(connection, sim.config.study.name)
            engine.dispose()
        found = [str(finding) for finding in violations(evidence, Holds.ALWAYS, sim.curve)]
        sim.server.ask(name, "UPDATE atelier.study SET stop_requested = NULL")
        return found + _in_a_child(lambda: _finish(sim, name, url, home, told, changed))
    except BackupError as error:  # also of a table whose rows do not fit those of another
        return [str(error)]
    finally:
        os.environ.update(kept)
        sim.server.drop_database(name)
        shutil.rmtree(home)
        path.unlink()


def _in_a_child(work: Callable[[], list[Any]]) -> list[Any]:
    """What a function returns in a child of this process, which may hold one simulation only."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            signal.alarm(LONGEST)
            os.write(write, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return list(json.loads(text)) if text else ["the child did not come to its end"]


def _finish(
    sim: "Simulation", name: str, url: str, home: Path, told: dict[int, Any], changed: set[Path]
) -> list[str]:
    """Let one worker end a restored search, undisturbed. Returns what is wrong then."""
    scheduler, machines = sim.scheduler, sim.machines
    for actor in list(scheduler.actors):
        scheduler.park(actor)
    for process in machines.processes:
        if not process.is_gone:
            process.end(KILLED, scheduler.now)
        machines.slurm.note_end(process)
    machines.slurm.trouble_until = 0.0
    parents = sim.database  # kept: to close its connections would end them for the parent too
    sim.disk.spoilt.update(dict.fromkeys(changed, 2))
    sim.move(name, url, home)
    sim.users.at_work, sim.users.told = 0, told
    sim.users.forget()
    result = sim.run()
    assert parents is not sim.database
    return [*result.violations, *(["it did not end well"] if result.ends.get(0) != 1 else [])]

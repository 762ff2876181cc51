"""What administrators do in the middle of a search: back up, restore elsewhere, upgrade the tables."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg2 import extensions

from search.verify.evidence import gather
from search.verify.rules import Holds, violations
from storage import backup, database, schema
from storage.archive import read_backup
from storage.database import DATABASE_ERRORS
from storage.studies import study_entry
from storage.url import DatabaseError
from tests.simulation.process import KILLED, Process
from tests.simulation.scheduler import Actor, current

if TYPE_CHECKING:
    from tests.simulation.faults import Fault
    from tests.simulation.simulation import Simulation

LONGEST = 120  # seconds that the rest of a restored search may take
REVISION = "newer"
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
        self.backups = 0
        self.is_upgrading = False
        self.all_are_newer = False  # whether the workers are of the newer version too
        self._real = schema._migrations, schema._alembic
        self._newer: Config | None = None
        schema._migrations = lambda: self._migrations()
        schema._alembic = lambda: self._alembic()

    def _is_newer(self) -> bool:
        """Whether the code that runs now is the newer version's."""
        actor = current()
        return self.all_are_newer or (actor is not None and actor.process is self.process)

    def _alembic(self) -> Config:
        if not self._is_newer():
            return self._real[1]()
        assert self._newer is not None
        config = Config()
        config.set_main_option("script_location", self._newer.get_main_option("script_location") or "")
        return config

    def _migrations(self) -> ScriptDirectory:
        return ScriptDirectory.from_config(self._alembic()) if self._is_newer() else self._real[0]()

    def make_newer(self, folder: Path) -> None:
        """Make the newer version, which has one migration more."""
        if self._newer is None:
            shutil.copytree(schema._MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
            text = MIGRATION.format(revision=REVISION, before=schema.head_revision())
            (folder / "versions" / "9999_newer.py").write_text(text)
            self._newer = Config()
            self._newer.set_main_option("script_location", str(folder))

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
        self.is_upgrading = False
        if self.revision() == REVISION:
            sim.scheduler.sleep(seconds)
            self.all_are_newer = True
        sim.users.at_work -= 1


def upgrade(sim: "Simulation", actor: Actor, fault: "Fault", chance: random.Random) -> bool:
    """An administrator of a newer version upgrades the tables. It must not while a trial is held."""
    administrator, seconds = sim.administrator, chance.uniform(0, 300)
    if administrator.is_upgrading:
        return False
    administrator.make_newer(sim.folder / "migrations")
    administrator.is_upgrading = True
    sim.users.at_work += 1
    sim.scheduler.spawn(
        administrator.process, f"admin {fault}", lambda: administrator.upgrade(fault, seconds)
    )
    return True


def back_up(sim: "Simulation", actor: Actor, fault: "Fault", chance: random.Random) -> bool:
    """A backup of this moment must be whole, and a restored search must end as any other."""
    administrator = sim.administrator
    if administrator.is_upgrading or administrator.revision() != schema.head_revision():
        return False
    administrator.backups += 1
    path = sim.folder / f"{administrator.backups}.tar"
    with _blocking(sim):
        engine = database.connect(sa.make_url(sim.url))
        backup.back_up(engine, path)
        engine.dispose()
        read_backup(path)
    fault.hits = True
    if not administrator.all_are_newer:  # else its models would need the newer column
        found = _restore(sim, path, administrator.backups)
        sim.violations += [f"{fault}, restored: {one}" for one in found]
    return True


@contextmanager
def _blocking(sim: "Simulation") -> Iterator[None]:
    """Without psycopg2's callback, under which there is no COPY."""
    extensions.set_wait_callback(None)
    try:
        yield
    finally:
        extensions.set_wait_callback(sim.database.wait)


def _restore(sim: "Simulation", path: Path, number: int) -> list[str]:
    """Restore a backup into a new database and an empty home, and end the search there."""
    name, home = f"{sim.name}_{number}", sim.folder / f"home-{number}"
    home.mkdir()
    url = sim.server.make_database(name)
    kept = {key: os.environ[key] for key in ("ATELIER_HOME", "ATELIER_DATABASE_URL")}
    os.environ.update(ATELIER_HOME=str(home), ATELIER_DATABASE_URL=url)
    try:
        with _blocking(sim):
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
        return found + _in_a_child(lambda: _finish(sim, name, url, home))
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


def _finish(sim: "Simulation", name: str, url: str, home: Path) -> list[str]:
    """Let one worker end a restored search, undisturbed. Returns what is wrong then."""
    scheduler, machines = sim.scheduler, sim.machines
    for actor in list(scheduler.actors):
        scheduler.park(actor)
    for process in machines.processes:
        process.exit_code = KILLED
        machines.slurm.note_end(process)
    machines.slurm.trouble_until = 0.0
    parents = sim.database  # kept: to close its connections would end them for the parent too
    sim.move(name, url, home)
    sim.users.at_work = 0
    sim.users.forget()
    result = sim.run()
    assert parents is not sim.database
    return [*result.violations, *(["it did not end well"] if result.ends.get(0) != 1 else [])]

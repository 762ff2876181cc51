"""One simulated search: workers, a database and a disk, and a seed that says what goes wrong."""

import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from search.study_config import StudyConfig
from search.toml_file import load_study_file
from search.verify.evidence import gather
from storage import database
from storage.paths import RunFolder
from storage.usage import IS_SPENT
from tests.simulation import faults, interpreter, rules, training
from tests.simulation.administrators import Administrator
from tests.simulation.database import Database, Server
from tests.simulation.disk import Disk
from tests.simulation.faults import Fault
from tests.simulation.history import History
from tests.simulation.process import KILLED, Job, Machines, Process
from tests.simulation.scheduler import Actor, EndlessError, Scheduler
from tests.simulation.users import Users

STEP_SECONDS = (1.0, 5.0, 20.0)  # of training, before the next one of a run
CHECKPOINT_SECONDS = (0.0, 20.0, 1e6)
KEPT_EPOCHS = (0, 2, 100)  # of the stream: trials go through those one by one, whoever is beside them
# Faults after which records and files may come late: of one worker, or of all.
SLOW = {"pause", "cut", "terminate", "lost-answer", "slurm"}
TROUBLES, LONGEST_TROUBLE = {"read-only", "restart", "disk-full", "upgrade", "backup", "user"}, 120.0
# Why a worker may end with an exit code: a fault that it has met, or what it says.
ENDS = {
    1: ("the wall time is too short", "the database: ", "cannot reach the database", "has failed"),
    2: ("No space left on device", "takes no writes", "was deleted meanwhile", "does not know"),
    3: ("SIGTERM", "SIGINT", "atelier stop"),
    4: ("SIGUSR2", "wall-time", "clock"),
    130: ("SIGINT",),
}
# Seconds until a worker that has ended so is replaced.
AGAIN_AFTER = defaultdict(
    lambda: (1.0, 30.0), {0: (100.0,), 2: (100.0,), 3: (30.0, 100.0), KILLED: (1.0, 30.0, 200.0)}
)
CLAIM = re.compile(r"SELECT .* FROM atelier\.study .* FOR UPDATE", re.DOTALL)
# Budgets in GPU-seconds: a search without one takes 300 to 1,200.
LEAST_BUDGET, GREATEST_BUDGET = 50, 900
# Whether a study has ended: its trials have, or its GPU-hours are spent and no trial is unfinished.
HAS_ENDED = f"""
SELECT stop_requested IS NULL AND (
    max_trials <= (
        SELECT count(*) FROM public.trials AS ended
        WHERE ended.study_id = own.study_id AND state IN ('COMPLETE', 'PRUNED', 'FAIL')
    )
    OR ({IS_SPENT.replace(":study_id", "own.study_id")}) AND NOT EXISTS (
        SELECT FROM public.trials AS left_open
        WHERE left_open.study_id = own.study_id AND state = 'RUNNING'
    )
)
FROM atelier.study AS own
"""
STOPPED_BEFORE = "SELECT true FROM atelier.study WHERE stop_requested < to_timestamp(%s)"
STUDY = """
[study]
name = "simulated"
max_trials = {trials}
sampler = "{sampler}"
strategy = "{strategy}"
{more}

[space]
lr = {{ low = 1e-4, high = 1e-1, log = true }}
batch_size = [32, 64]

[train]
data = "nowhere"
backbone = "test_resnet"
weights = "none"
epochs = {epochs}
warmup_epochs = 1
"""


@dataclass
class Place:
    """Where a worker runs. One that has ended is replaced."""

    number: int
    host: str
    pack: int
    faults: list[Fault]
    job: Job | None = None
    boundaries: int = 0  # that its workers have come to
    started: int = 0  # workers


@dataclass
class Result:
    """What a simulation has shown."""

    seed: int
    digest: str
    boundaries: int
    given: list[str]  # faults that were to be delivered
    delivered: list[str]  # of them, in their order
    faults: list[str]  # that hit
    trials: dict[str, int]
    ends: dict[int, int]
    explained: dict[str, int]
    violations: list[str]
    lines: list[str] | None = None


class Simulation:
    """One search in this process, which can hold only one."""

    def __init__(
        self, server: Server, folder: Path, seed: int, given: list[Fault] | None, keep: bool = False
    ) -> None:
        self.seed, self.server, self.folder = seed, server, folder
        self.random = random.Random(f"world {seed}")
        self.history = History(keep)
        self.scheduler = Scheduler(seed)
        self.config = self._make_config()
        self.name = "simulated"
        home = folder / "home"
        home.mkdir(parents=True)
        os.environ["ATELIER_HOME"] = str(home)
        os.environ["ATELIER_DATABASE_URL"] = url = server.make_database(self.name)
        self.url = url
        interpreter.control(self.scheduler, seed)
        self.database = Database(server, self.name, self.scheduler, self.history)
        self.disk = Disk(home, self.scheduler, self.history, seed)
        kept_epochs = random.Random(f"kept {seed}").choice(KEPT_EPOCHS)
        self.world = training.World(self._step, self._check_resumed, kept_epochs)
        self.machines = Machines(self.scheduler, self.database, self.history, self.world, seed)
        self.uses_slurm = self.random.random() < 0.5
        self.is_calm = False  # whether nothing more goes wrong
        self.troubled_until = 0.0  # by when any worker may have to wait for the database or the disk
        self.site = Process("site", "login", 1)
        self.users = Users(self)
        self.administrator = Administrator(self)
        self.violations: list[str] = []
        self.ends: Counter[int] = Counter()
        self.explained: Counter[str] = Counter()
        self._make_places(given)
        self.scheduler.before_turn = self._before_turn
        self._follow_database()

    def _follow_database(self) -> None:
        self.scheduler.next_event = self.database.next_expiry
        self.scheduler.on_event = self.database.expire

    def move(self, name: str, url: str, home: Path) -> None:
        """Go on with another database and home, with one worker to whom nothing happens."""
        self.name, self.url = name, url
        self.database = Database(self.server, name, self.scheduler, self.history)
        self.machines.database = self.database
        self._follow_database()
        self.disk.move(home)
        self.places = [Place(0, "a", 1, [])]
        self.violations, self.ends = [], Counter()

    def _make_config(self) -> StudyConfig:
        chance = self.random
        strategy = chance.choice(["promote", "promote", "promote", "asha", "none", "median"])
        more = []
        epochs = chance.randint(3, 5)
        if strategy in ("promote", "asha"):
            more.append(f"rungs = {chance.choice([[1], [0, 2], [1, 2]])}")
        if chance.random() < 0.2:
            more.append("audit = 0.3")
        if chance.random() < 0.3:
            more.append('score = "balanced-log-loss"')
        budget = random.Random(f"budget {self.seed}")  # its own: the other draws stay what they are
        if budget.random() < 0.2:
            seconds = budget.uniform(LEAST_BUDGET, GREATEST_BUDGET)
            more.append(f"max_gpu_hours = {seconds / 3600}")
        saves = random.Random(f"saves {self.seed}")
        more.append(f"checkpoint_seconds = {saves.choice(CHECKPOINT_SECONDS)}")
        path = self.folder / "study.toml"
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(
            STUDY.format(
                trials=chance.randint(5, 9),
                sampler=chance.choice(["random", "random", "qmc", "tpe"]),
                strategy=strategy,
                more="\n".join(more),
                epochs=epochs,
            )
        )
        return load_study_file(path, [])

    def _make_places(self, given: list[Fault] | None) -> None:
        number = self.random.randint(2, 3)
        planned = faults.draw(self.seed, number) if given is None else given
        self._given = [str(fault) for fault in planned]
        self.places = [
            Place(
                index,
                self.random.choice("ab"),
                self.random.choice([1, 1, 2]),
                [fault for fault in planned if fault.place == index],
            )
            for index in range(number)
        ]
        self._delivered: list[Fault] = []

    def run(self) -> Result:
        """Search, break things, and judge."""
        tenders = [
            self.scheduler.spawn(
                self.site, f"place {place.number}", lambda place=place: self._tend(place)
            )
            for place in self.places
        ]
        try:
            self.scheduler.run(lambda: all(tender.dead for tender in tenders))
        except EndlessError as error:
            self.violations.append(f"endless: {error}: {self._who_waits()}")
        states = self._judge()
        self.database.close()
        hits = [str(fault) for fault in self._delivered if fault.hits]
        return Result(
            self.seed,
            self.history.digest,
            sum(place.boundaries for place in self.places),
            self._given,
            [str(fault) for fault in self._delivered],
            hits,
            states,
            dict(self.ends),
            dict(self.explained),
            self.violations,
            self.history.lines,
        )

    def _who_waits(self) -> list[str]:
        return [f"{actor.process.name}/{actor.name}: {actor.subject}" for actor in self.scheduler.actors]

    def _tend(self, place: Place) -> None:
        """See to it that a worker runs at a place, until one has found that the study has ended."""
        code = KILLED
        while code != 0 or not self._has_ended():
            process = self._start(place)
            self.scheduler.wait_until("end", lambda process=process: process.is_gone, None)
            assert process.exit_code is not None
            code = process.exit_code
            self.ends[code] += 1
            self._judge_end(process)
            self.scheduler.sleep(self.random.choice(AGAIN_AFTER[code]))

    def _judge_end(self, process: Process) -> None:
        """A worker ends as it was told to, or for a reason that a user can read and mend."""
        code, last = process.exit_code, process.said[-1] if process.said else "nothing"
        if code == 0 and self.database.ask(STOPPED_BEFORE, process.begun):
            self.violations.append(f"a_stop_is_told: {process.name} found a stopped study at its end")
        why = ENDS.get(code, ())
        explanations = [words for words in why if words in last or words in process.met]
        if explanations:
            self.explained[f"{code}: {explanations[0]}"] += 1
        elif code not in (0, KILLED):
            after = f"after {sorted(process.met)}" if process.met else "though nothing had hit it"
            self.violations.append(
                f"worker_ended_well: {process.name} ended with {code} {after}: {last}"
            )

    def _start(self, place: Place) -> Process:
        place.started += 1
        if self.uses_slurm and (place.job is None or place.job.state != "PENDING"):
            place.job = self.machines.slurm.new_job()
        return self.machines.start_worker(
            f"w{place.number}.{place.started}", place, self.config, place.job
        )

    def _has_ended(self) -> bool:
        self.database.set_clock()
        rows = self.database.ask(HAS_ENDED)
        self.is_calm = self.is_calm or (rows == [(True,)] and not self.users.at_work)
        return self.is_calm

    def _step(self, run: Any) -> None:
        actor = interpreter.current()
        assert actor is not None
        process = actor.process
        self.scheduler.sleep(self.random.choice(STEP_SECONDS), "step")
        if process.lacks_memory:
            process.lacks_memory = False
            [trial] = [trial for trial in process.worker.trials if trial.run is run]
            process.was_alone[trial.claim.trial_number] = len(process.worker.trials) == 1
            raise MemoryError("cannot allocate memory")

    def _check_resumed(self, run: Any) -> None:
        """A kill costs one epoch, or `checkpoint_seconds` of work before that."""
        checkpoints, actor = run._checkpoints, interpreter.current()
        assert actor is not None
        folder, saved = checkpoints.folder, len(run.history)
        here = self.world.lives[folder, checkpoints.attempt] = training.Life(
            actor.process, self.scheduler.now, saved
        )
        before = self.world.lives.get((folder, checkpoints.attempt - 1))
        if before is None or before.process.exit_code != KILLED or self.disk.spoilt[folder]:
            return
        lost = before.ended[max(saved - before.saved, 0) :]
        if len(lost) < 2 or before.began < self.troubled_until or before.process.met & SLOW:
            return
        kept = before.ended[: -len(lost)]
        seconds = lost[-2] - (kept[-1] if kept else before.began)
        if seconds > self.config.study.checkpoint_seconds and self._is_held(run):
            self.violations.append(
                f"a_kill_costs_little: {folder.name} goes on after {here.saved} epochs, and trains "
                f"{seconds} s of work again, and an epoch more"
            )

    def _is_held(self, run: Any) -> bool:
        """Whether a run's worker still holds its trial: else a successor may have ended it."""
        rows = self.database.ask(
            "SELECT true FROM atelier.attempt JOIN public.trials USING (trial_id) "
            "WHERE released IS NULL AND attempt.number = %s AND trials.number = %s",
            run._checkpoints.attempt,
            int(run._checkpoints.folder.name.removeprefix("trial-")),
        )
        return bool(rows)

    def _before_turn(self, actor: Actor) -> None:
        place = actor.process.place
        if place is None:
            self.administrator.take_time(actor)
            return
        place.boundaries += 1
        if self.is_calm:
            return
        if not place.faults or place.faults[0].at > place.boundaries or not faults.is_busy(actor):
            return
        for fault in place.faults:
            if fault.at > place.boundaries:
                return
            if faults.deliver(self, actor, fault):
                place.faults.remove(fault)
                actor.process.met.add(fault.kind)
                self._delivered.append(fault)
                if fault.kind in TROUBLES:
                    self.troubled_until = self.scheduler.now + LONGEST_TROUBLE
                self.history.add("fault", fault, actor.process.name, actor.name, actor.subject)
                return

    # What faults ask for.

    def later(self, seconds: float, action: Any) -> None:
        """Do something after so many seconds."""

        def wait() -> None:
            self.scheduler.sleep(seconds)
            action()

        self.scheduler.spawn(self.site, "later", wait)

    def wake_beside_successor(self, process: Process, boundaries: int) -> None:
        """Let a paused worker go on once another has held its trial for so many boundaries."""
        trials = {claim.trial_id for claim in process.held()}

        def successor() -> Place | None:
            workers = (one for one in self.machines.processes if one is not process and not one.is_gone)
            return next((one.place for one in workers if one.holds(trials)), None)

        self._wake_beside(process, successor, boundaries)

    def wake_beside_claim(self, process: Process, boundaries: int) -> None:
        """Let a paused worker go on so many boundaries after another claims, past the lease."""
        lease_end = self.scheduler.now + faults.LEASE

        def claimant() -> Place | None:
            if self.scheduler.now < lease_end:
                return None
            actors = (one for one in self.scheduler.actors if one.process is not process)
            return next((one.process.place for one in actors if CLAIM.match(one.statement)), None)

        self._wake_beside(process, claimant, boundaries)

    def _wake_beside(self, process: Process, find: Callable[[], Place | None], boundaries: int) -> None:
        patience = 3 * faults.LEASE
        process.paused_until = self.scheduler.now + 2 * patience

        def wait() -> None:
            self.scheduler.wait_until("another", lambda: find() is not None, patience)
            if place := find():
                then = place.boundaries + boundaries
                self.scheduler.wait_until("beside", lambda: place.boundaries >= then, patience)
            process.paused_until = self.scheduler.now

        self.scheduler.spawn(self.site, "later", wait)

    def newest_digest(self, runs: RunFolder, number: int) -> Path | None:
        """Of the newest checkpoint of a trial."""
        return max(runs.checkpoints(number).glob("*.pt.sha256"), default=None)

    def let_diverge(self, process: Process, fault: Fault) -> bool:
        """Let the loss of a trial in this worker be not finite in an epoch that nobody has begun."""
        trials = [] if process.worker is None else process.worker.trials
        for trial in trials:
            key = training.identity(trial.run.config)
            epoch = self.world.furthest.get(key, -1) + 1
            if key not in self.world.diverging and epoch < trial.run.config.epochs:
                self.world.diverging[key] = epoch
                fault.hits = True
                return True
        return False

    # Judgement.

    def curve(self, config: StudyConfig, trial: Any) -> list[Any]:
        """What a trial's curve would be without all this."""
        stream = [row.stream_epoch for row in trial.epochs]
        return training.undisturbed(config.config(trial.params), self.world, stream)

    def _judge(self) -> dict[str, int]:
        engine = database.connect(sa.make_url(self.url))
        with engine.connect() as connection:
            evidence = gather(connection, self.config.study.name)
        self.violations += self.users.violations(evidence)
        self.violations += rules.worker_violations(evidence, self.machines.processes)
        self.violations += self.database.deadlocks
        engine.dispose()
        return dict(Counter(trial.state for trial in evidence.trials))

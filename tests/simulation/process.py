"""A simulated worker process: the real command's code, on a host, maybe as a SLURM job."""

import logging
import math
import random
import subprocess
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer

import search.cli.errors
import search.cli.training
import search.slurm.commands
import search.slurm.environment
import search.slurm.queue
import search.study_config
import search.trial
import search.worker
import storage.ledger
import storage.liveness
import trainer.checkpoint
from search.cli.errors import errors_in_one_line
from search.cli.training import work_in
from search.study_config import StudyConfig
from storage.leases import LeaseKeeper
from tests.simulation.database import Database
from tests.simulation.history import History
from tests.simulation.scheduler import Scheduler, current
from tests.simulation.training import ATTRIBUTES, SimulatedRun, World, save, workspace
from trainer.checkpoint import Checkpoints, State

KILLED = -9
TRACEBACK = 70  # the exit code that stands for one
CLUSTER = "cluster"
EPOCHS = """
SELECT count(epoch.epoch) FROM public.trials LEFT JOIN atelier.epoch USING (trial_id)
WHERE trials.number = %s GROUP BY trials.trial_id
"""
UNCONTROLLED = SimpleNamespace(parent_process=lambda: None)


class Process:
    """A process. It runs not another line once it `is_gone`."""

    def __init__(self, name: str, host: str, pid: int, place: Any = None) -> None:
        self.name, self.host, self.pid = name, host, pid
        self.place = place  # of a worker
        self.paused_until = 0.0
        self.handlers: dict[int, Any] = {}
        self.environment: dict[str, str] = {}
        self.clock_offset = 0.0  # by how much its time of day is wrong
        self.lacks_memory = False  # for the step of training that it is at
        self.was_alone: dict[int, bool] = {}  # whether a trial ran out of memory while no other was here
        self.exit_code: int | None = None
        self.begun, self.ended = 0.0, math.inf  # when
        self.said: list[str] = []
        self.lies: list[float] = []  # when SLURM may have said wrongly that it is gone
        self.met: set[str] = set()  # the kinds of faults that it has met
        self.wrote: list[str] = []  # checkpoints that it must not write
        self.keeper: LeaseKeeper | None = None
        self.worker: Any = None

    @property
    def is_gone(self) -> bool:
        return self.exit_code is not None

    @property
    def identity(self) -> str:
        """What process_identity says of it."""
        return f"{self.host}:{self.pid}:0"

    def end(self, code: int, now: float) -> None:
        """It runs not another line."""
        self.exit_code, self.ended = code, now

    def held(self) -> list[Any]:
        """The claims that it renews."""
        return self.keeper.held() if self.keeper else []

    def holds(self, trials: Collection[int]) -> bool:
        """Whether it renews a claim of one of these trials."""
        return any(claim.trial_id in trials for claim in self.held())


class WatchedCheckpoints(Checkpoints):
    """A trial's checkpoints. They are of epochs on record, and none follows the trial's end."""

    machines: "Machines"
    is_cleared = False

    def save(self, epochs: int, step: int, state: State) -> Path:
        path = super().save(epochs, step, state)
        number = int(self.folder.name.removeprefix("trial-"))
        for (recorded,) in self.machines.database.ask(EPOCHS, number):  # none, if it was deleted
            if self.is_cleared or epochs > recorded:
                when = "after its end" if self.is_cleared else f"with {recorded} epochs on record"
                actor = current()
                assert actor is not None
                actor.process.wrote.append(f"wrote {path.name} of trial {number} {when}")
        return path

    def clear(self) -> None:
        super().clear()
        self.is_cleared = True


class Machines:
    """All processes, alive and gone, and what they see of each other."""

    def __init__(
        self, scheduler: Scheduler, database: Database, history: History, world: World, seed: int
    ) -> None:
        self._scheduler, self.database, self._history = scheduler, database, history
        self._world = world
        self._pids = iter(range(1000, 10**9))
        self.processes: list[Process] = []
        self.slurm = Slurm(scheduler, seed)
        logging.getLogger().addHandler(_Log())
        logging.getLogger().setLevel(logging.INFO)
        self._patch()

    def _patch(self) -> None:
        def process() -> Process:
            actor = current()
            assert actor is not None
            return actor.process

        class Keeper(LeaseKeeper):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                process().keeper = self

        class Worker(search.worker.Worker):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                process().worker = self

        WatchedCheckpoints.machines = self
        search.trial.Checkpoints = WatchedCheckpoints
        search.trial.Run = SimulatedRun
        trainer.checkpoint.torch = SimpleNamespace(save=save)
        search.trial.attach_curve = lambda *_: None
        search.study_config.attribute_table = lambda *_: ATTRIBUTES
        search.worker.LeaseKeeper = Keeper
        search.worker._log_file = lambda: None
        search.cli.training.Worker = Worker
        search.cli.training.multiprocessing = UNCONTROLLED
        search.stopping.multiprocessing = UNCONTROLLED
        search.cli.errors.say = search.cli.training.say = lambda text: process().said.append(text)
        search.slurm.queue.say = lambda text: process().said.append(text)
        storage.ledger.process_identity = lambda: process().identity
        storage.ledger.peak_memory = lambda: 0
        storage.liveness.is_gone = self._sees_gone
        search.slurm.environment.os = SimpleNamespace(
            environ=_Environment(process), getpid=lambda: process().pid
        )
        search.slurm.commands.subprocess = SimpleNamespace(
            run=self.slurm.run, TimeoutExpired=subprocess.TimeoutExpired
        )

    def _sees_gone(self, identity: str) -> bool:
        """Whether the process that asks can see that another has ended: only on its own host."""
        actor = current()
        assert actor is not None
        host, _, _ = identity.rsplit(":", 2)
        ended = all(one.is_gone for one in self.processes if one.identity == identity)
        return bool(host == actor.process.host) and ended

    def start_worker(self, name: str, place: Any, config: StudyConfig, job: "Job | None") -> Process:
        """A process that works as `atelier worker` does."""
        process = Process(name, place.host, next(self._pids), place)
        process.begun = self._scheduler.now
        if job is not None:
            job.begin(process)
        self.processes.append(process)

        def main() -> None:
            code = 0
            try:
                with errors_in_one_line():
                    work_in(workspace(self._world, config.shared), config, place.pack)
            except typer.Exit as end:
                code = end.exit_code
            except BaseException as error:  # what the user would see as a traceback
                process.said += traceback.format_exception(error)
                process.said.append(traceback.format_exception_only(error)[0].splitlines()[0])
                code = TRACEBACK
            self._end(process, code, leaves_work=False)

        self._scheduler.spawn(process, "main", main)
        return process

    def kill(self, process: Process, leaves_work: bool = False) -> None:
        """Let a process run not another line. With `leaves_work` the server ends its statements."""
        self._end(process, KILLED, leaves_work)

    def _end(self, process: Process, code: int, leaves_work: bool) -> None:
        process.end(code, self._scheduler.now)
        self._history.add(process.name, "ends", code)
        for actor in [one for one in self._scheduler.actors if one.process is process]:
            if actor is not current():
                self._scheduler.park(actor)
        self.database.abandon(process, leaves_work)
        self.slurm.note_end(process)


class _Environment(dict[str, str]):
    """os.environ of the process whose turn it is."""

    def __init__(self, process: Callable[[], Process]) -> None:
        super().__init__()
        self._process = process

    def get(self, name: str, default: Any = None) -> Any:
        return self._process().environment.get(name, default)

    def items(self) -> Any:
        return self._process().environment.items()


class _Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        actor = current()
        if actor is not None and record.name.split(".")[0] in ("search", "storage", "trainer"):
            actor.process.said.append(f"{actor.name}: {record.getMessage()}")
            if record.exc_info:
                actor.process.said.append(traceback.format_exception(record.exc_info[1])[-1])


class Job:
    """A SLURM job, one task of an array. It may begin several times."""

    def __init__(self, number: int, task: int) -> None:
        self.number, self.task = number, task
        self.restarts = -1
        self.state = "PENDING"
        self.process: Process | None = None
        self.is_requeued = False

    def begin(self, process: Process) -> None:
        self.restarts += 1
        self.state, self.process, self.is_requeued = "RUNNING", process, False
        process.environment = {
            "SLURM_JOB_ID": str(self.number),
            "SLURM_CLUSTER_NAME": CLUSTER,
            "SLURM_TASK_PID": str(process.pid),
        }


class Slurm:
    """What SLURM's commands answer; it may be silent, or wrong."""

    ARRAY = 100

    def __init__(self, scheduler: Scheduler, seed: int) -> None:
        self._scheduler = scheduler
        self._random = random.Random(f"slurm {seed}")
        self.jobs: list[Job] = []
        self.trouble: str | None = None
        self.trouble_until = 0.0

    def new_job(self) -> Job:
        job = Job(self.ARRAY + len(self.jobs), len(self.jobs))
        self.jobs.append(job)
        return job

    def note_cancel(self, process: Process) -> None:
        """From `scancel` on a job is COMPLETING, though its processes may still work."""
        for job in self.jobs:
            if job.process is process:
                job.state = "COMPLETING"

    def note_end(self, process: Process) -> None:
        for job in self.jobs:
            if job.process is process:
                job.state = (
                    "PENDING" if job.is_requeued else "FAILED" if process.exit_code else "COMPLETED"
                )

    def run(self, command: Any, **_: Any) -> Any:
        """Replaces subprocess.run."""
        self._scheduler.boundary(f"slurm {command[0]}")
        if self._has("silent"):
            return self._silence(command)
        if command[:2] == ("squeue", "--version"):
            return _answer("slurm 24.11.5")
        if command[0] == "squeue":
            return _answer("\n".join(self._lines(command)))
        if command[:2] == ("scontrol", "requeue"):
            return self._requeue(command[2])
        raise AssertionError(command)

    def _has(self, trouble: str) -> bool:
        return self.trouble == trouble and self._scheduler.now < self.trouble_until

    def _silence(self, command: Any) -> Any:
        if self._random.random() < 0.5:
            self._scheduler.sleep(20)
            raise subprocess.TimeoutExpired(command, 20)
        return _answer("", "slurm_load_jobs error: Unable to contact slurm controller", 1)

    def _lines(self, command: Any) -> list[str]:
        [wanted] = [
            word.removeprefix("--jobs=").split(",") for word in command if word.startswith("--jobs=")
        ]
        lines = [self._line(job) for job in self.jobs if str(job.number) in wanted]
        if self._has("hidden"):
            return []
        if self._has("strange line"):
            lines[self._random.randrange(len(lines) or 1) :] = ["?? slurmdbd: no such record"]
        return lines

    def _line(self, job: Job) -> str:
        state = job.state
        if self._has("wrong"):
            state = self._random.choice(["RUNNING", "NODE_FAIL", "PENDING"])
            if state != "RUNNING" and job.process is not None:
                job.process.lies.append(self._scheduler.now)
        elif self._has("strange state"):
            state = "MYSTERY"
        elif state == "COMPLETING":
            state = self._random.choice([state, f"CANCELLED+{state}"])
        return f"{job.number}|{state}|0:0|{max(job.restarts, 0)}|N/A|{self.ARRAY}|{job.task}|"

    def _requeue(self, name: str) -> Any:
        [job] = [one for one in self.jobs if f"{self.ARRAY}_{one.task}" == name]
        job.is_requeued = True
        return _answer("")


def _answer(output: str, complaint: str = "", code: int = 0) -> Any:
    return SimpleNamespace(stdout=output, stderr=complaint, returncode=code)

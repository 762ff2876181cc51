"""A private SLURM, a PostgreSQL that listens, and studies on them, for each process of pytest.

`make test-cluster` starts several such processes side by side. The verbs of `atelier` run inside pytest,
and as processes of their own where that is the point (`Campaign.command`). The jobs of most drills run
`slow_worker`, which trains as slowly as the drill needs it, and then hurries.
"""

import contextlib
import gc
import itertools
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from search.cli import app
from search.export import load_bundle
from storage import database, studies
from storage.embedded import EmbeddedPostgres
from storage.tables import ATTEMPTS, EPOCHS
from tests.conftest import STUDY
from trainer.demo import write_demo

SLURM = Path(__file__).with_name("slurm")
SLOW_WORKER = Path(__file__).with_name("slow_worker.py")
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
PROGRAMS_OF_ACCOUNTING = ("slurmdbd", "mariadbd")
# A job in one of these states has ended and will not begin again.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
ENDED |= {"PREEMPTED", "TIMEOUT"}
# The drills that wait the longest.
LONGEST = (
    "test_wall_time_in_the_middle_of_a_trial",
    "test_an_epoch_longer_than_the_wall_time",
    "test_confirmed_in_an_array_and_trained_across_wall_times",
    "test_the_database_is_away_for_a_minute",
    "test_a_node_that_goes_down_and_comes_back",
    "test_an_array_of_eight_finishes_a_study_of_24_trials",
    "test_preemption_by_a_job_of_more_weight",
    "test_cancelled_tasks_and_then_a_new_array",
    "test_stop_reaches_the_tasks_that_run_and_those_that_wait",
    "test_requeue_of_a_running_task",
    "test_a_killed_worker_is_replaced_at_once",
    "test_a_warning_that_comes_while_the_worker_starts_does_not_end_it",
)


def pytest_collection_modifyitems(items):
    """The longest first; with a short one after each, for xdist gives a process two tests at a time."""
    names = [item.originalname for item in items]
    longest = [items[names.index(name)] for name in LONGEST if name in names]
    short = [item for item in items if item not in longest]
    pairs = itertools.zip_longest(longest, short[: len(longest)])
    items[:] = [item for pair in pairs for item in pair if item] + short[len(longest) :]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """The folder of a running SLURM; its commands find it by SLURM_CONF."""
    with running_slurm(tmp_path_factory.mktemp("slurm")) as folder:
        yield folder


@contextlib.contextmanager
def running_slurm(folder, accounts=None):
    """A SLURM in this folder, for which `accounts` are sacctmgr's commands; None for no accounting."""
    root = os.environ.get("SLURM_ROOT", "/")  # see tests/cluster/slurm
    path = os.pathsep.join(f"{root}/{part}" for part in ("usr/bin", "usr/sbin"))
    programs = PROGRAMS if accounts is None else (*PROGRAMS, *PROGRAMS_OF_ACCOUNTING)
    missing = [name for name in programs if shutil.which(name, path=path) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"needs root and SLURM (CONTRIBUTING.md says which packages); no {', '.join(missing)}"
        )
    folder.chmod(0o755)
    verb = "up" if accounts is None else "accounts"
    subprocess.run([SLURM, verb, folder], input=accounts or "", text=True, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
        # In a session of its own: it comes down even if pytest is interrupted or killed.
        command = [SLURM, "down", folder, "--at-eof"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as down:
            yield folder
            down.communicate()
        assert down.returncode == 0


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The embedded server of a home, on TCP as a cluster needs it. Returns the home."""
    home = tmp_path_factory.mktemp("cluster") / "home"
    server = EmbeddedPostgres(home)
    server.listen("127.0.0.1", server_port(), tls=False)
    yield server
    server.stop()


def server_port():
    """A free one, not of those that the kernel takes for connections: the server has it later, too."""
    while True:
        port = random.SystemRandom().randrange(10000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Few images: four steps of 16 are an epoch."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    write_demo(folder, train=64, val=40, test=0)
    return folder


@pytest.fixture(scope="session")
def slow_python(tmp_path_factory):
    """What a job runs in place of Python; it becomes Python, so that the process stays SLURM's."""
    path = tmp_path_factory.mktemp("python") / "slow_python"
    path.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-P", str(SLOW_WORKER)])} "$@"\n')
    path.chmod(0o755)
    return path


PROFILE = """
[slurm.tuning]
partition = "q_amsai"
cpus = 1
gpus = 1
memory = "1G"
time = "{time}"
warning = {warning}
setup = {setup}
"""


ON_CPU = "export ATELIER_DEVICE=cpu"  # the GPUs of this SLURM are files
DEFAULTS = {"size": 32, "time": "30", "warning": 60, "setup": []}
# For jobs of a minute or less: what else runs on this machine must not take it from them while they
# import torch. Where the kernel groups processes by session, the group has to come before others.
BEFORE_OTHERS = ["renice --priority -15 $$ > /dev/null", "echo -15 > /proc/self/autogroup || true"]
# What two runs of the same epoch must have in common, bit for bit.
COMPARED = ("lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_overall")


@dataclass
class Campaign:
    """One study on the cluster."""

    name: str
    folder: Path
    home: Path
    engine: sa.Engine
    python: str  # what its jobs run
    jobs: list[str] = field(default_factory=list)
    workspace: object = None  # of `assert_as_in_one_go`

    def atelier(self, *words, code=0):
        """Run a verb, in this process, in the study's folder; returns what it prints.

        It has to end with this code; None stands for any.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(sys, "executable", self.python)
            result = CliRunner().invoke(app, [str(word) for word in words])
        error = "".join(traceback.format_exception(result.exception)) if result.exception else ""
        assert code in (result.exit_code, None), f"{result.stderr}{result.stdout}\n{error}"
        return result.stdout

    def command(self, *words):
        """The same as a process of its own, as a user starts it."""
        result = subprocess.run(
            [sys.executable, "-m", "atelier_command", *words],
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr + result.stdout
        return result.stdout

    def submit(self, array):
        """Returns the array job's id."""
        self.jobs.append(self.atelier("submit", "study.toml", "--array", array).split()[1])
        return self.jobs[-1]

    def hurry(self):
        """From now on no step of a slow worker sleeps."""
        (self.folder / "hurry").touch()

    @property
    def status(self):
        return json.loads(self.atelier("status", self.name, "--json"))

    def rows(self, *columns, order=None):
        """Rows of the table of `columns`, of this study's trials."""
        table = columns[0].table
        query = "SELECT trial_id FROM trials JOIN studies USING (study_id) WHERE study_name = :name"
        with self.engine.connect() as connection:
            ids = [row[0] for row in connection.execute(sa.text(query), {"name": self.name})]
            statement = sa.select(*columns).where(table.c.trial_id.in_(ids))
            return connection.execute(
                statement.order_by(order if order is not None else table.c.trial_id)
            ).all()

    @property
    def epochs(self):
        return len(self.rows(EPOCHS.c.epoch))

    @property
    def outcomes(self):
        """How the attempts ended, in the order of their beginning."""
        return [row[0] for row in self.rows(ATTEMPTS.c.outcome, order=ATTEMPTS.c.claimed)]

    @property
    def reasons(self):
        """Why the attempts ended, in words."""
        return [row[0] for row in self.rows(ATTEMPTS.c.reason, order=ATTEMPTS.c.claimed)]

    def wait_for_outcomes(self, outcome, number=1):
        wait_for(lambda: self.outcomes.count(outcome) >= number, f"{number} {outcome}", self)

    def wait_for_epochs(self, number):
        wait_for(lambda: self.epochs >= number, f"{number} epochs of {self.name}", self)

    def wait_for_the_end(self, job, seconds=600):
        """Until SLURM has no task of the array that runs or waits."""

        def ended():
            states = task_states(job)
            return states is not None and states <= ENDED

        wait_for(ended, f"the end of job {job}", self, seconds)

    @property
    def logs(self):
        """What the tasks of this campaign's arrays have written."""
        paths = [path for job in self.jobs for path in (self.home / "slurm").glob(f"{job}_*.log")]
        return "\n".join(path.read_text() for path in sorted(paths))

    def beginnings(self):
        """(trial id, attempt, epoch) of every attempt that the logs tell of: where training began."""
        numbers = (
            "SELECT number, trial_id FROM trials JOIN studies USING (study_id) WHERE study_name = :n"
        )
        with self.engine.connect() as connection:
            ids = dict(connection.execute(sa.text(numbers), {"n": self.name}).all())
        words = re.findall(r"trial (\d+): attempt (\d+)|goes on after epoch (\d+)", self.logs)
        found = []
        for trial, attempt, epoch in words:
            if trial:
                found.append((ids[int(trial)], int(attempt), 0))
            else:
                found[-1] = (*found[-1][:2], int(epoch))
        assert found
        return found

    def assert_as_if_nothing_had_happened(self, trials, epochs, rung=None):
        """Every trial finished, none failed, no epoch twice, each curve that of an unbroken run.

        With `rung`, the trials that were never among the best there ended after it.
        """
        status = self.status
        rows = status["trials"]
        complete = sum(row["state"] == "complete" for row in rows)
        counts = {"waiting": 0, "running": 0, "paused": 0, "failed": 0}
        counts |= {"complete": complete, "pruned": trials - complete}
        assert status["counts"] == counts, self.logs
        recorded = self.rows(EPOCHS.c.trial_id, EPOCHS.c.epoch, EPOCHS.c.attempt)
        wanted = complete * epochs
        if rung is None:
            assert complete == trials
        else:
            assert 0 < trials // 3 <= complete < trials
            wanted += (trials - complete) * (rung + 1)
        assert len({row[:2] for row in recorded}) == len(recorded) == wanted
        # An epoch is recorded, then saved. So a kill between the two costs that epoch, and no more.
        for trial, attempt, epoch in self.beginnings():
            done = [row for row in recorded if row.trial_id == trial and row.attempt < attempt]
            assert len(done) - 1 <= epoch <= len(done), (
                f"attempt {attempt} began in epoch {epoch}\n{self.logs}"
            )
        assert sorted(recorded) == sorted(
            recorded, key=lambda row: (row.trial_id, row.attempt, row.epoch)
        )
        assert not {"error", "failed"} & set(self.outcomes)
        self.atelier("verify", self.name)
        for row in rows:
            self.assert_as_in_one_go(row["number"])

    def assert_as_in_one_go(self, trial):
        """The trial's numbers are those of its exported settings, trained without an interruption."""
        import torch

        from trainer.loop import train
        from trainer.workspace import Workspace

        torch.set_num_threads(1)  # as on the node
        self.atelier("export", self.name, "--trial", trial, "-o", f"{trial}.toml")
        config = load_bundle(self.folder / f"{trial}.toml").config
        entry = studies.study_entry(self.engine, self.name)
        recorded = studies.epochs_of(self.engine, entry.study_id, trial)
        self.workspace = self.workspace or Workspace(config, self.home / "cache")
        for row, result in zip(recorded, train(config, self.workspace), strict=False):
            again = result.columns()
            for name in COMPARED:
                assert row[name] == again[name], f"{name} in epoch {result.epoch} of trial {trial}"
        assert result.epoch == recorded[-1]["epoch"]


def task_states(job):
    """The states of a job's tasks, empty once SLURM has forgotten it; None if SLURM is too busy."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%T"]
    result = subprocess.run(command, capture_output=True, text=True)
    if "Invalid job id" in result.stderr:
        return set()
    return set(result.stdout.split()) if result.returncode == 0 else None


def wait_for(condition, what, campaign, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert "\nerror: " not in f"\n{campaign.logs}", campaign.logs
        assert time.monotonic() < deadline, f"waited in vain for {what}\n{campaign.logs}"
        time.sleep(1)


@pytest.fixture
def campaign(slurm, server, demo, slow_python, tmp_path, monkeypatch, request):
    """Makes a study file, with the environment of a user of the cluster.

    With `step_seconds` its jobs run `slow_worker`. When the drill has ended, no process may be left.
    """
    monkeypatch.setenv("ATELIER_HOME", str(server.home))
    monkeypatch.delenv("ATELIER_DATABASE_URL", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    engine = database.connect()

    def make(name=None, change=lambda text: text, step_seconds=None, **values):
        name = name or request.node.name
        values = {"name": name, "data": demo, **DEFAULTS, **values}
        python = sys.executable
        if step_seconds is not None:
            python = str(slow_python)
            values["setup"] = [*values["setup"], f"export STEP_SECONDS={step_seconds}"]
        values["setup"] = json.dumps([ON_CPU, *values["setup"]])
        text = (STUDY + PROFILE).format(**values).replace("[32, 64]", "[8, 16]")  # there are few images
        (tmp_path / "study.toml").write_text(change(text))
        return Campaign(name, tmp_path, server.home, engine, python)

    yield make
    left = processes_in(tmp_path)
    engine.dispose()
    gc.collect()  # closes the connections of the verbs
    subprocess.run(["scancel", "--signal=KILL", "--full", f"--user={os.environ.get('USER', 'root')}"])
    subprocess.run(["scancel", f"--user={os.environ.get('USER', 'root')}"])
    assert left == [], "they train on without a job"


def processes_in(folder):
    """What works in this folder, as a study's jobs do: workers, and the long run."""
    every = psutil.process_iter(["cwd"])
    return [process for process in every if (process.info["cwd"] or "").startswith(str(folder))]

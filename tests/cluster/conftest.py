"""A real SLURM, a PostgreSQL that listens, and the `atelier` command as a user types it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa

from storage import database, ledger
from storage.embedded import EmbeddedPostgres
from storage.models import Attempt, Epoch
from tests.conftest import STUDY, free_port

SLURM = Path(__file__).with_name("slurm")
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
# A job in one of these states has ended and will not begin again.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
ENDED |= {"PREEMPTED", "TIMEOUT"}


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """The folder of a running SLURM; its commands find it by SLURM_CONF."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and SLURM (apt-get install slurm-wlm munge); no {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    subprocess.run([SLURM, "up", folder], check=True)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield folder
    subprocess.run([SLURM, "down", folder], check=True)
    del os.environ["SLURM_CONF"]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The embedded server of a home, on TCP as a cluster needs it. Returns the home."""
    home = tmp_path_factory.mktemp("cluster") / "home"
    server = EmbeddedPostgres(home)
    server.listen("127.0.0.1", free_port(), tls=False)
    yield server
    server.stop()


PROFILE = """
[slurm.tuning]
partition = "q_amsai"
cpus = 1
gpus = 1
memory = "1G"
time = "{time}"
warning = {warning}
"""


DEFAULTS = {"size": 96, "time": "10", "warning": 60}


@dataclass
class Campaign:
    """One study on the cluster."""

    name: str
    folder: Path
    home: Path
    engine: sa.Engine
    jobs: list[str] = field(default_factory=list)

    def atelier(self, *words, code=0):
        """Run the command in the study's folder; returns what it prints."""
        result = subprocess.run(
            [sys.executable, "-m", "search", *words],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == code, result.stderr + result.stdout
        return result.stdout

    def submit(self, array):
        """Returns the array job's id."""
        self.jobs.append(self.atelier("submit", "study.toml", "--array", array).split()[1])
        return self.jobs[-1]

    @property
    def status(self):
        return json.loads(self.atelier("status", self.name, "--json"))

    def rows(self, *columns, order=None):
        """Rows of the table of `columns`, of this study's trials."""
        table = columns[0].class_
        query = "SELECT trial_id FROM trials JOIN studies USING (study_id) WHERE study_name = :name"
        with self.engine.connect() as connection:
            ids = [row[0] for row in connection.execute(sa.text(query), {"name": self.name})]
            statement = sa.select(*columns).where(table.trial_id.in_(ids))
            return connection.execute(statement.order_by(order or table.trial_id)).all()

    @property
    def epochs(self):
        return len(self.rows(Epoch.epoch))

    @property
    def outcomes(self):
        """How the attempts ended, in the order of their beginning."""
        return [row[0] for row in self.rows(Attempt.outcome, order=Attempt.claimed)]

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
        words = re.findall(r"trial (\d+): attempt (\d+)|goes on after (\d+) epochs", self.logs)
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
        recorded = self.rows(Epoch.trial_id, Epoch.epoch, Epoch.attempt)
        wanted = complete * epochs
        if rung is None:
            assert complete == trials
        else:
            assert 0 < trials // 3 <= complete < trials
            wanted += (trials - complete) * (rung + 1)
        assert len({row[:2] for row in recorded}) == len(recorded) == wanted
        # Each attempt went on at the epoch after the last one on record: none went back further.
        for trial, attempt, epoch in self.beginnings():
            done = [row for row in recorded if row.trial_id == trial and row.attempt < attempt]
            assert epoch == len(done), f"attempt {attempt} began in epoch {epoch}\n{self.logs}"
        assert sorted(recorded) == sorted(
            recorded, key=lambda row: (row.trial_id, row.attempt, row.epoch)
        )
        assert not {"error", "failed"} & set(self.outcomes)
        entry = ledger.study_entry(self.engine, self.name)
        numbers = [row["number"] for row in status["trials"]]
        curves = [ledger.curve(self.engine, entry.study_id, number) for number in numbers]
        assert curves == self.unbroken({n: len(c) for n, c in zip(numbers, curves, strict=True)})

    def unbroken(self, trials):
        """The curves of trials, so many epochs of each, in one go and with one thread as on the node."""
        for trial in trials:
            self.atelier("export", self.name, "--trial", str(trial), "-o", f"{trial}.toml")
        code = (
            "import sys, json; from pathlib import Path\n"
            "from search.export import load_bundle\n"
            "from trainer.loop import train\n"
            "from trainer.workspace import Workspace\n"
            "cache, lengths = Path(sys.argv[1]), json.loads(sys.argv[2])\n"
            "configs = [load_bundle(Path(f'{trial}.toml')).config for trial in lengths]\n"
            "workspace = Workspace(configs[0], cache)\n"
            "runs = zip(lengths.values(), (train(config, workspace) for config in configs))\n"
            "curves = [[next(run).val_accuracy for _ in range(length)] for length, run in runs]\n"
            "print(json.dumps(curves))"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, self.home / "cache", json.dumps(trials)],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(result.stdout)


def task_states(job):
    """The states of a job's tasks, empty once SLURM has forgotten it; None if SLURM is too busy."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%T"]
    result = subprocess.run(command, capture_output=True, text=True)
    if "Invalid job id" in result.stderr:
        return set()
    return set(result.stdout.split()) if result.returncode == 0 else None


def wait_for(condition, what, campaign, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert "\nerror: " not in f"\n{campaign.logs}", campaign.logs
        assert time.monotonic() < deadline, f"waited in vain for {what}\n{campaign.logs}"
        time.sleep(0.5)


@pytest.fixture
def campaign(slurm, server, demo, tmp_path, monkeypatch, request):
    """Makes a study file, with the environment of a user of the cluster."""
    monkeypatch.setenv("ATELIER_HOME", str(server.home))
    monkeypatch.delenv("ATELIER_DATABASE_URL", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    engine = database.connect()

    def make(name=None, change=lambda text: text, **values):
        name = name or request.node.name
        text = change((STUDY + PROFILE).format(**{"name": name, "data": demo, **DEFAULTS, **values}))
        (tmp_path / "study.toml").write_text(text)
        return Campaign(name, tmp_path, server.home, engine)

    yield make
    engine.dispose()
    subprocess.run(["scancel", "--signal=KILL", "--full", f"--user={os.environ.get('USER', 'root')}"])
    subprocess.run(["scancel", f"--user={os.environ.get('USER', 'root')}"])

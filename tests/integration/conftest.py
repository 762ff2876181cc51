"""The command as a user types it, in the test's process; and a worker inside the test."""

import os
import subprocess
import time

import pytest
import tomli_w
import torch
from typer.testing import CliRunner

import search.local
import search.trial
from dashboards.plot import attach_curve
from search import forking
from search.cli import app, main
from search.study import open_study
from search.toml_file import load_study_file
from search.verify.look import verify
from search.worker import Worker
from storage import ledger, optuna_storage, studies
from storage.embedded import EmbeddedPostgres
from storage.paths import RunFolder
from trainer.config import TrainConfig
from trainer.demo import write_demo
from trainer.loop import train
from trainer.model_file import ModelFiles
from trainer.run import Run
from trainer.workspace import Workspace


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Half as many images as elsewhere: here they are trained on a hundred times."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    write_demo(folder, train=150, val=80, test=10)
    return folder


@pytest.fixture
def start_process(tmp_path):
    """Starts a function in a process of its own, with a file for its output; ends what is left."""
    processes = []

    def start(function, arguments, environment):
        output = tmp_path / f"{len(processes)}.log"
        output.touch()  # it is read before the process has written
        process = forking.start(function, arguments, environment=environment, output=output)
        process.output = output
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def slow_steps(seconds):
    """Let each step of this process take longer, so that a signal meets an epoch before it has ended."""
    train_step = Run.train_step

    def slow_step(*details):
        time.sleep(seconds)
        train_step(*details)

    Run.train_step = slow_step


@pytest.fixture
def config(tmp_path, tiny):
    """The configuration of a run, of 4 epochs of 5 steps, in the file c.toml."""
    values = tiny.model_dump(exclude_none=True) | {"epochs": 4, "image_size": 96, "batch_size": 32}
    (tmp_path / "c.toml").write_text(tomli_w.dumps({"format": 1, "train": values}))
    return tmp_path / "c.toml"


@pytest.fixture
def start(tmp_path, home, monkeypatch, start_process):
    """Starts `atelier train` in a process of its own."""
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return lambda *words: start_process(_slowly, ["train", *map(str, words)], environment)


def _slowly(arguments):
    slow_steps(0.05)
    main(arguments)


def wait_for_epoch(process, number):
    """Wait until it says that an epoch is finished, and go into the next one."""
    while f"epoch {number}/" not in process.output.read_text():
        assert process.is_alive(), process.output.read_text()
        time.sleep(0.02)
    time.sleep(0.3)


def end_of(process, seconds=300):
    """The exit code of a process that ends by itself."""
    process.join(seconds)
    assert process.exitcode is not None, process.output.read_text()
    return process.exitcode


@pytest.fixture
def atelier(tmp_path, study_text, prepared_url, home, monkeypatch):
    """Runs `atelier WORDS` beside a study.toml, in this process, and checks the exit code."""
    (tmp_path / "study.toml").write_text(study_text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search.local, "POLL_SECONDS", 0.1)
    threads = torch.get_num_threads()

    def run(*words, code=0, typed=None):
        result = CliRunner().invoke(app, [*map(str, words)], input=typed, catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result

    yield run
    torch.set_num_threads(threads)  # a verb that trains has set its own


@pytest.fixture(scope="session")
def give_data(tmp_path_factory):
    """Puts the data of a server that was made before into a home: quicker than to make them."""
    made = EmbeddedPostgres(tmp_path_factory.mktemp("made"))
    made.acquire()
    made.release()
    with (made.data / "postgresql.auto.conf").open("a") as file:
        file.write("fsync = off\n")  # no test crashes the machine

    def give(home):
        home.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", made.data, home], check=True)  # they belong to the system user
        return home

    return give


@pytest.fixture(scope="session")
def workspaces(tmp_path_factory):
    """Workspaces by training settings: to make one takes a second."""
    made, cache = {}, tmp_path_factory.mktemp("cache")

    def workspace(config):
        key = config.model_dump_json()
        made[key] = made.get(key) or Workspace(config, cache)
        return made[key]

    return workspace


def no_picture(*_):
    return None


@pytest.fixture
def make_worker(engine, study_text, tmp_path, monkeypatch, workspaces):
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    path = tmp_path / "study.toml"
    path.write_text(study_text)

    def worker(*settings, wall_end=None, pack=1, pictures=False):
        # A picture of each trial's curve takes as long as its training.
        monkeypatch.setattr(search.trial, "attach_curve", attach_curve if pictures else no_picture)
        file = load_study_file(path, list(settings))
        storage = optuna_storage.optuna_storage(engine)
        workspace = workspaces(file.shared)
        study, entry = open_study(file, engine, storage, workspace.dataset, lead=True)
        runs = RunFolder(entry.name, entry.created)
        trials = ledger.Ledger(engine, storage, entry.study_id)
        return Worker(file, study, trials, workspace, runs, wall_end, pack)

    return worker


@pytest.fixture
def all_holds(engine):
    """After the test, all that must hold of its studies holds. Some tests make one without settings."""
    yield
    for name in studies.study_names(engine):
        if studies.study_entry(engine, name).settings:
            assert [str(one) for one in verify(engine, name).findings] == []


@pytest.fixture(scope="session")
def train_one_epoch(demo):
    """Trains a small network for one epoch, into a run folder, which it returns."""

    def go(run, seed=0):
        config = TrainConfig(
            data=str(demo),
            backbone="test_resnet",
            weights="none",
            trainable="head",
            image_size=32,
            epochs=1,
            warmup_epochs=0,
            seed=seed,
        )
        workspace = Workspace(config, run.parent / "cache")
        files = ModelFiles(run, workspace.dataset)
        assert len(list(train(config, workspace, keep=files.keep))) == 1
        return run

    return go


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, train_one_epoch):
    """The run folder of a network that was trained for one epoch."""
    return train_one_epoch(tmp_path_factory.mktemp("run") / "run")

"""How many epochs of training a search needs until it has found the best configuration, simulated.

    python -m benchmarks.search_efficiency [--replays 50] [--figure FILE.svg]

Searches are replayed on recorded learning curves (record_curves.py, data/curves.parquet): an epoch takes
one unit of simulated time, and its numbers are looked up. All else is real: `atelier`'s searches run
the worker's own code, claims, epochs and decisions on PostgreSQL; a rival is a script of Optuna's ask and
tell. What a sampler suggests becomes the nearest configuration of the table that the search has not
had; a configuration with several seeds gets one of them by chance.

A search is done when the trial that it would export, the complete one with the highest score as it saw
it, is in truth (the mean over the seeds) within TARGET of the table's best.
"""

import heapq
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import optuna
import pandas as pd
import sqlalchemy as sa
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

import search.worker
from benchmarks.server import temporary_home
from search.score import score
from search.study import StudyFile, load_study_file
from search.worker import Worker
from storage import database, ledger
from storage.runs import RunFolder
from trainer.config import EpochResult, TrainConfig
from trainer.predictions import Predictions

CURVES = Path(__file__).parent / "data" / "curves.parquet"
STUDY = Path("studies/fashion.toml")
TARGET = 0.005
WORKERS = 8
OURS = [(sampler, strategy) for sampler in ("tpe", "gp") for strategy in ("asha", "promote")]
MOST_EPOCHS = 12_000  # all of the table


class Table:
    """Recorded learning curves by configuration: how a trial goes, and what it is worth in truth."""

    def __init__(self, path: Path, space: dict[str, BaseDistribution]) -> None:
        rows = pd.read_parquet(path).sort_values(["configuration", "seed", "epoch"])
        self.space = space
        configurations = rows.drop_duplicates("configuration")
        self.params = configurations[[*space]].to_dict("records")
        self.curves = [
            np.array([curve.val_accuracy.to_numpy() for _, curve in one.groupby("seed")])
            for _, one in rows.groupby("configuration")
        ]
        scores = [[score([*curve], "mean-last-5") for curve in seeds] for seeds in self.curves]
        self.truth = np.array([np.mean(one) for one in scores])
        self._places = np.array([self._place(params) for params in self.params])
        self._numbers = {self._key(params): number for number, params in enumerate(self.params)}

    def _key(self, params: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(params[name] for name in self.space)

    def _place(self, params: dict[str, Any]) -> np.ndarray:
        """In the unit cube."""
        transform = _SearchSpaceTransform(self.space, transform_0_1=True)
        return transform.transform(params)

    def number(self, params: dict[str, Any]) -> int:
        """Of the configuration with exactly these parameters."""
        return self._numbers[self._key(params)]

    def nearest(self, params: dict[str, Any], besides: set[int]) -> int:
        """The number of a configuration."""
        distances = ((self._places - self._place(params)) ** 2).sum(1)
        distances[[*besides]] = np.inf
        return int(distances.argmin())


class Replay:
    """One search's way over the table."""

    def __init__(self, table: Table, random: np.random.Generator) -> None:
        self.table = table
        self._random = random
        self._tried: set[int] = set()
        self._curves: dict[int, np.ndarray] = {}
        self.epochs = 0  # that were trained
        self.regret = float(np.ptp(table.truth))  # of the trial that would be exported
        self._best = -np.inf

    def place(self, params: dict[str, Any]) -> dict[str, Any]:
        """The nearest configuration that it has not had."""
        number = self.table.nearest(params, self._tried)
        self._tried.add(number)
        curves = self.table.curves[number]
        self._curves[number] = curves[self._random.integers(len(curves))]
        return self.table.params[number]

    @property
    def is_over(self) -> bool:
        """Whether the table has no further configuration."""
        return len(self._tried) == len(self.table.params)

    def curve(self, params: dict[str, Any]) -> np.ndarray:
        """How a configuration goes in this search."""
        return self._curves[self.table.number(params)]

    def train(self, params: dict[str, Any], epoch: int) -> float:
        """An epoch's value."""
        self.epochs += 1
        curve = self.curve(params)
        if epoch + 1 == len(curve) and (found := score([*curve], "mean-last-5")) > self._best:
            self._best = found
            self.regret = float(self.table.truth.max() - self.table.truth[self.table.number(params)])
        return float(curve[epoch])


class OnTable(BaseSampler):
    """Another sampler, whose suggestions become configurations of the table."""

    def __init__(self, inner: BaseSampler, replay: Replay) -> None:
        self._inner, self._replay = inner, replay

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return self._replay.table.space

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        known = self._inner.infer_relative_search_space(study, trial)
        params = self._inner.sample_relative(study, trial, known)
        for name in search_space.keys() - params.keys():
            params[name] = self._inner.sample_independent(study, trial, name, search_space[name])
        return self._replay.place(params)

    def sample_independent(self, *_: Any) -> Any:
        raise AssertionError("the whole space is relative")


class Simulated(Protocol):
    """A worker in simulated time."""

    def begin(self) -> bool:
        """Take up a trial where it has none. Returns whether it has one."""

    def end_epoch(self) -> None:
        """Let the trial's epoch be over."""


class Script:
    """What people write with Optuna: ask, report, should_prune, tell."""

    def __init__(self, study: optuna.Study, replay: Replay) -> None:
        self._study, self._replay = study, replay
        self._trial: optuna.Trial | None = None

    def begin(self) -> bool:
        if self._trial is None and not self._replay.is_over:
            self._trial, self._epoch = self._study.ask(self._replay.table.space), 0
        return self._trial is not None

    def end_epoch(self) -> None:
        trial = self._trial
        assert trial is not None
        self._trial.report(self._replay.train(trial.params, self._epoch), self._epoch)
        self._epoch += 1
        curve = self._replay.curve(trial.params)
        if self._epoch == len(curve):
            self._study.tell(trial, score([*curve], "mean-last-5"))
            self._trial = None
        elif trial.should_prune():
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            self._trial = None


class TableRun:
    """In place of trainer.loop.Run: its epochs are looked up."""

    def __init__(
        self, config: TrainConfig, workspace: Any, checkpoints: object, stream_epochs: Sequence[int]
    ) -> None:
        self.config, self.stream_epoch, self._replay = config, None, workspace.replay
        self._params = {name: getattr(config, name) for name in self._replay.table.space}
        curve = self._replay.curve(self._params)
        self.history = [_result(epoch, curve[epoch]) for epoch in stream_epochs]

    def save(self) -> None:
        """There is nothing to keep."""

    def train(self) -> EpochResult:
        """The next epoch."""
        epoch = len(self.history)
        self.history.append(_result(epoch, self._replay.train(self._params, epoch)))
        return self.history[-1]


def _result(epoch: int, value: float) -> EpochResult:
    return EpochResult(
        epoch=epoch,
        stream_epoch=epoch,
        lr=0.0,
        train_loss=0.0,
        train_accuracy=0.0,
        val_loss=0.0,
        val_accuracy=float(value),
        val_category=(0.0,),
        seconds=1.0,
        images=1,
        peak_memory=0,
        predictions=Predictions(
            np.zeros((1, 1), np.uint8), np.zeros((1, 1, 1), np.uint8), np.zeros((1, 1, 1), np.float16)
        ),
    )


class _AtOnce:
    """In place of the worker's thread."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


class Atelier:
    """The project's own worker, on the table."""

    def __init__(
        self, file: StudyFile, study: optuna.Study, engine: sa.Engine, runs: RunFolder, replay: Replay
    ) -> None:
        dataset = SimpleNamespace(attribute_table=lambda _: [])
        workspace = SimpleNamespace(dataset=dataset, replay=replay)
        # No lease ends: time is simulated, and nobody renews.
        trials = ledger.Ledger(engine, study._storage, study._study_id, lease_seconds=1e9)
        trials.register()
        self.worker = Worker(file, study, trials, workspace, runs)
        self.worker._executor = _AtOnce()

    def begin(self) -> bool:
        self.worker._fill()
        return bool(self.worker._trials)

    def end_epoch(self) -> None:
        self.worker._turn()


def _turn(runs: Sequence[TableRun], _: object) -> Iterator[tuple[TableRun, EpochResult]]:
    for run in runs:
        yield run, run.train()


# What is looked up, or not worth drawing, in this process's workers.
search.worker.Run, search.worker.turn = TableRun, _turn
search.worker.attach_curve = lambda *_: None


def simulate(
    workers: Sequence[Simulated], replay: Replay, random: np.random.Generator, target: float = TARGET
) -> float:
    """Epochs trained until the search is done; infinite if it never is."""
    order = itertools.count()
    queue: list[tuple[float, int, Simulated]] = []

    def begin(worker: Simulated, now: float) -> None:
        if worker.begin():
            # Machines differ a little, so that nobody goes in step.
            heapq.heappush(queue, (now + random.uniform(1.0, 1.1), next(order), worker))

    for worker in workers:
        begin(worker, 0.0)
    while queue and replay.epochs < MOST_EPOCHS:
        now, _, worker = heapq.heappop(queue)
        worker.end_epoch()
        if replay.regret <= target:
            return replay.epochs
        begin(worker, now)
    return float("inf")


def script(
    sampler: Callable[[], BaseSampler], pruner: Callable[[], BasePruner], replay: Replay
) -> list[Simulated]:
    """Workers that share a study of Optuna's."""
    study = optuna.create_study(
        direction="maximize", sampler=OnTable(sampler(), replay), pruner=pruner()
    )
    return [Script(study, replay) for _ in range(WORKERS)]


def atelier(
    file: StudyFile, engine: sa.Engine, replay: Replay, workers: int = WORKERS
) -> list[Simulated]:
    """Workers of a study of ours; `file` names it."""
    storage = database.optuna_storage(engine)
    sampler = OnTable(file.make_sampler(), replay)
    study = optuna.create_study(
        storage=storage, study_name=file.study.name, direction="maximize", sampler=sampler
    )
    values = {"max_trials": len(replay.table.params), "settings": {}, "dataset": ""}
    hours = file.study.max_gpu_hours
    seconds = None if hours is None else 3600 * hours
    ledger.enter_study(engine, study._study_id, max_gpu_seconds=seconds, **values)
    entry = ledger.study_entry(engine, file.study.name)
    assert entry is not None  # it was just entered
    runs = RunFolder(entry.name, entry.created)
    return [Atelier(file, study, engine, runs, replay) for _ in range(workers)]


# By name: what makes the workers of one replay.
def strategies() -> dict[str, Callable[[sa.Engine, Replay, str], list[Simulated]]]:
    """Who competes, the reference first."""
    rivals = {
        "random": (RandomSampler, NopPruner),
        "Optuna's defaults: TPE, median": (TPESampler, MedianPruner),
        "Optuna: TPE, successive halving": (TPESampler, SuccessiveHalvingPruner),
    }
    found: dict[str, Callable[[sa.Engine, Replay, str], list[Simulated]]] = {
        name: lambda _, replay, __, parts=parts: script(*parts, replay) for name, parts in rivals.items()
    }
    for sampler, strategy in OURS:
        settings = [f"study.sampler={sampler}", f"study.strategy={strategy}"]

        def make(
            engine: sa.Engine, replay: Replay, name: str, settings: list[str] = settings
        ) -> list[Simulated]:
            return atelier(load_study_file(STUDY, [*settings, f"study.name={name}"]), engine, replay)

        found[f"atelier: {sampler}, {strategy}"] = make
    return found


def replay_once(name: str, number: int, home: Path, curves: Path) -> float:
    """Epochs of one replay. To be called in any process."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    engine = _engine(home)
    replay = Replay(_table(curves), np.random.default_rng([number, 0]))
    workers = strategies()[name](engine, replay, f"{name} {number} {time.time_ns()}".replace(":", ""))
    return simulate(workers, replay, np.random.default_rng([number, 1]))


@cache
def _engine(home: Path) -> sa.Engine:
    os.environ["ATELIER_HOME"] = str(home)
    return database.connect()


@cache
def _table(path: Path) -> Table:
    return Table(path, load_study_file(STUDY).distributions())

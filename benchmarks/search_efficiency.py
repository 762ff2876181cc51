"""Simulate how many epochs of training a search needs until it has found the best configuration.

    python -m benchmarks.search_efficiency [--replays 50] [--figure FILE.svg]

Searches are replayed on recorded learning curves (record_curves.py, data/curves.parquet). An epoch
takes one unit of simulated time, and its numbers are looked up. All else is real. Our searches run the
worker's own code, with claims, epochs and decisions on PostgreSQL. Each rival is a script with Optuna's
ask and tell. A sampler's suggestion is replaced by the nearest configuration of the table that the
search has not tried. A configuration with several seeds gets one of them at random.

A search would export its complete trial with the highest score. A trial's true score is the mean over
the seeds. The search is done when the true score of that trial is within TARGET of the table's best.
"""

import argparse
import heapq
import itertools
import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import optuna
import pandas as pd
import sqlalchemy as sa
import torch
from matplotlib import pyplot as plt
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

import search.trial
import search.worker
from benchmarks.server import temporary_home
from search.sampling import distributions, make_sampler, whole_sample
from search.score import score
from search.study_config import StudyConfig
from search.toml_file import load_study_file
from search.worker import Worker
from storage import database, ledger, optuna_storage, studies
from storage.paths import RunFolder
from storage.status import read_status
from tests.studies import open_storage
from trainer.config import TrainConfig
from trainer.metrics import EpochResult
from trainer.predictions import Predictions

CURVES = Path(__file__).parent / "data" / "curves.parquet"
STUDY = Path("studies/fashion.toml")
TARGET = 0.005
WORKERS = 8
OURS = {  # changes to studies/fashion.toml
    "TPE, asha": ["study.strategy=asha"],
    "TPE, promote": [],
    "GP, promote": ["study.sampler=gp"],
}
MOST_EPOCHS = 12_000  # as many as the whole table has


class Table:
    """Recorded learning curves and true scores, by configuration."""

    def __init__(self, path: Path, space: dict[str, BaseDistribution]) -> None:
        rows = pd.read_parquet(path).sort_values(["configuration", "seed", "epoch"])
        self.space = space
        configurations = rows.drop_duplicates("configuration")
        self.params = configurations[[*space]].to_dict("records")
        self.curves = [
            np.array([curve.val_accuracy.to_numpy() for _, curve in runs.groupby("seed")])
            for _, runs in rows.groupby("configuration")
        ]
        scores = [[score([*curve], "mean-last-5") for curve in seeds] for seeds in self.curves]
        self.truth = np.array([np.mean(by_seed) for by_seed in scores])
        self._places = np.array([self._place(params) for params in self.params])
        self._numbers = {self._key(params): number for number, params in enumerate(self.params)}

    def _key(self, params: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(params[name] for name in self.space)

    def _place(self, params: dict[str, Any]) -> np.ndarray:
        """Where a configuration is in the unit cube."""
        transform = _SearchSpaceTransform(self.space, transform_0_1=True)
        return transform.transform(params)

    def number(self, params: dict[str, Any]) -> int:
        """The number of the configuration with exactly these parameters."""
        return self._numbers[self._key(params)]

    def nearest(self, params: dict[str, Any], besides: set[int]) -> int:
        """The number of the configuration that is nearest to these parameters, except `besides`."""
        distances = ((self._places - self._place(params)) ** 2).sum(1)
        distances[[*besides]] = np.inf
        return int(distances.argmin())


class Replay:
    """One simulated search: what it has tried, trained and found."""

    def __init__(self, table: Table, random: np.random.Generator) -> None:
        self.table = table
        self._random = random
        self._tried: set[int] = set()
        self._curves: dict[int, np.ndarray] = {}
        self.epochs = 0  # trained so far
        self.regret = math.inf  # how far the trial that would be exported is from the table's best
        self.epochs_to_target = math.inf  # until a trial within TARGET was complete, exported or not
        self._best = -math.inf

    def place(self, params: dict[str, Any]) -> dict[str, Any]:
        """Take the nearest configuration that the search has not tried. Returns its parameters."""
        number = self.table.nearest(params, self._tried)
        self._tried.add(number)
        curves = self.table.curves[number]
        self._curves[number] = curves[self._random.integers(len(curves))]
        return self.table.params[number]

    @property
    def is_over(self) -> bool:
        """Whether the search has tried every configuration of the table."""
        return len(self._tried) == len(self.table.params)

    def curve(self, params: dict[str, Any]) -> np.ndarray:
        """The learning curve of a configuration in this search."""
        return self._curves[self.table.number(params)]

    def train(self, params: dict[str, Any], epoch: int) -> float:
        """Train an epoch. Returns its value."""
        self.epochs += 1
        curve = self.curve(params)
        if epoch + 1 == len(curve):
            regret = float(self.table.truth.max() - self.table.truth[self.table.number(params)])
            if regret <= TARGET:
                self.epochs_to_target = min(self.epochs_to_target, self.epochs)
            if (trial_score := score([*curve], "mean-last-5")) > self._best:
                self._best, self.regret = trial_score, regret
        return float(curve[epoch])


class OnTable(BaseSampler):
    """A sampler that turns another one's suggestions into configurations of the table."""

    def __init__(self, inner: BaseSampler, replay: Replay) -> None:
        self._inner, self._replay = inner, replay

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return self._replay.table.space

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return self._replay.place(whole_sample(self._inner, study, trial, search_space))

    def sample_independent(self, *_: Any) -> Any:
        raise AssertionError("the whole space is relative")


class Simulated(Protocol):
    """A worker in simulated time."""

    def begin(self) -> bool:
        """Take a trial if the worker has none. Returns whether it has one then."""

    def end_epoch(self) -> None:
        """End the trial's current epoch."""


class Script:
    """A worker as people write it with Optuna: ask, report, should_prune, tell."""

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
    """Replaces trainer.run.Run: its epochs are looked up in the table."""

    position = (0, 0)  # it never changes: there is nothing to save

    def __init__(
        self, config: TrainConfig, workspace: Any, checkpoints: object, stream_epochs: Sequence[int]
    ) -> None:
        self.config, self.stream_epoch, self._replay = config, None, workspace.replay
        self._params = {name: getattr(config, name) for name in self._replay.table.space}
        curve = self._replay.curve(self._params)
        self.history = [_result(epoch, curve[epoch]) for epoch in stream_epochs]

    def train(self) -> EpochResult:
        """Look up the next epoch. Returns its result."""
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
            np.zeros((1, 1), np.uint8),
            np.zeros((1, 1, 1), np.uint8),
            np.zeros((1, 1, 1), np.float16),
            np.zeros(1, np.int32),
            np.zeros(1, np.int32),
        ),
    )


class _AtOnce(Executor):
    """Replaces a worker's thread: what is submitted runs at once."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **keywords))
        except Exception as error:  # the worker looks at it
            future.set_exception(error)
        return future


class Atelier:
    """The project's own worker, trained on the table."""

    def __init__(
        self, file: StudyConfig, study: optuna.Study, engine: sa.Engine, runs: RunFolder, replay: Replay
    ) -> None:
        workspace = SimpleNamespace(attributes=[], config=None, device_name=None, replay=replay)
        # No lease may end, because time is simulated and nobody renews.
        trials = ledger.Ledger(engine, study._storage, study._study_id, lease_seconds=1e9)
        trials.register()
        self.worker = Worker(file, study, trials, workspace, runs, make_thread=lambda _: _AtOnce())

    def begin(self) -> bool:
        return bool(self.worker.fill())

    def end_epoch(self) -> None:
        self.worker.train()


def _train_epoch(runs: Sequence[TableRun], _: object) -> Iterator[tuple[TableRun, EpochResult]]:
    for run in runs:
        yield run, run.train()


# This process's workers look their epochs up, and draw no curves.
search.trial.Run, search.worker.train_epoch = TableRun, _train_epoch
search.trial.attach_curve = lambda *_: None


def simulate(
    workers: Sequence[Simulated],
    replay: Replay,
    random: np.random.Generator,
    target: float = TARGET,
    at: Callable[[float], None] = lambda _: None,
) -> float:
    """Simulate a search. Returns the epochs trained until it is done, or infinity if it never is.

    `at` is called with the time, in epochs, before anything happens at that time.
    """
    order = itertools.count()
    queue: list[tuple[float, int, Simulated]] = []

    def begin(worker: Simulated, now: float) -> None:
        if worker.begin():
            # Machines differ a little, so no two workers stay in step.
            heapq.heappush(queue, (now + random.uniform(0.9, 1.1), next(order), worker))

    at(0.0)
    for worker in workers:
        begin(worker, 0.0)
    while queue and replay.epochs < MOST_EPOCHS:
        now, _, worker = heapq.heappop(queue)
        at(now)
        worker.end_epoch()
        if replay.regret <= target:
            return replay.epochs
        begin(worker, now)
    return math.inf


def script(sampler: BaseSampler, pruner: BasePruner, replay: Replay) -> list[Simulated]:
    """Workers of Optuna that share a study."""
    study = optuna.create_study(direction="maximize", sampler=OnTable(sampler, replay), pruner=pruner)
    return [Script(study, replay) for _ in range(WORKERS)]


def atelier(
    file: StudyConfig, engine: sa.Engine, replay: Replay, workers: int = WORKERS
) -> list[Simulated]:
    """Our own workers on the study that `file` names."""
    storage = optuna_storage.optuna_storage(engine)
    # No first configurations, because rivals get none either.
    sampler = OnTable(make_sampler(file, first=[]), replay)
    study = optuna.create_study(
        storage=storage, study_name=file.study.name, direction="maximize", sampler=sampler
    )
    hours = file.study.max_gpu_hours
    studies.enter_study(
        engine,
        study._study_id,
        max_trials=file.study.max_trials,
        max_gpu_seconds=None if hours is None else 3600 * hours,
        settings={"train": {"epochs": file.epochs}},
        dataset="",
    )
    entry = studies.study_entry(engine, file.study.name)
    assert entry is not None  # it was just entered
    runs = RunFolder(entry.name, entry.created)
    return [Atelier(file, study, engine, runs, replay) for _ in range(workers)]


def strategies() -> dict[str, Callable[[sa.Engine, Replay, str], list[Simulated]]]:
    """All competitors, the reference first: how to make the workers of a replay with a given name."""
    rivals = {
        "random": (RandomSampler, NopPruner),
        "TPE, median": (TPESampler, MedianPruner),
        "TPE, successive halving": (TPESampler, SuccessiveHalvingPruner),
    }
    return {f"Optuna: {name}": partial(_script, *parts) for name, parts in rivals.items()} | {
        f"atelier: {name}": partial(_atelier, settings) for name, settings in OURS.items()
    }


def _script(
    sampler: type[BaseSampler], pruner: type[BasePruner], _: sa.Engine, replay: Replay, __: str
) -> list[Simulated]:
    return script(sampler(), pruner(), replay)


def _atelier(settings: list[str], engine: sa.Engine, replay: Replay, name: str) -> list[Simulated]:
    all_settings = [
        *settings,
        f"study.name={name}",
        f"study.max_trials={len(replay.table.params)}",
    ]
    return atelier(load_study_file(STUDY, all_settings), engine, replay)


def replay_once(name: str, number: int, home: Path) -> tuple[float, float]:
    """Epochs of one replay until the search is done, and until a trial within TARGET was complete."""
    replay = Replay(_table(), np.random.default_rng([number, 0]))
    workers = strategies()[name](_engine(home), replay, f"replay {number} of {name}".replace(":", ""))
    return simulate(workers, replay, np.random.default_rng([number, 1])), replay.epochs_to_target


@cache
def _engine(home: Path) -> sa.Engine:
    """The engine of this process, which is made quiet."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")  # Optuna warns about its experimental parts
    os.environ["ATELIER_HOME"] = str(home)
    torch.set_num_threads(1)
    return database.connect()


@cache
def _table() -> Table:
    return Table(CURVES, distributions(load_study_file(STUDY)))


def efficiency(home: Path, replays: int, figure: Path | None) -> None:
    """Print for each strategy how many epochs it takes until the best is found."""
    context = multiprocessing.get_context("spawn")
    names = [*strategies()]
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        jobs = {
            name: [pool.submit(replay_once, name, number, home) for number in range(replays)]
            for name in names
        }
        epochs_by_name: dict[str, np.ndarray] = {}
        for name, futures in jobs.items():
            epochs, epochs_to_target = np.array([future.result() for future in futures]).T
            epochs_by_name[name] = epochs
            never = int(np.isinf(epochs).sum())
            times = [
                f"{_interval(epochs, epochs_by_name[rival])} times fewer than {rival}"
                for rival in names[:2]
                if rival in epochs_by_name and rival != name and never < replays / 2
            ]
            print(
                f"{name}: {_interval(epochs)} epochs, never in {never} of {replays} replays", flush=True
            )
            print(f"    such a trial was complete after {_interval(epochs_to_target)}", flush=True)
            for line in times:
                print(f"    {line}", flush=True)
    if figure:
        draw(epochs_by_name, figure)


def _interval(epochs: np.ndarray, rival: np.ndarray | None = None) -> str:
    """The median with a 95 % bootstrap interval. With a rival, the rival's median divided by it."""
    random = np.random.default_rng(0)

    def median(values: np.ndarray, resample: bool) -> float:
        # Not interpolated, because a value can be infinite.
        drawn = random.choice(values, len(values)) if resample else values
        return float(np.quantile(drawn, 0.5, method="lower"))

    def once(resample: bool) -> float:
        middle = median(epochs, resample)
        return middle if rival is None else median(rival, resample) / middle

    low, high = np.quantile([once(True) for _ in range(2000)], [0.025, 0.975], method="nearest")
    digits = 0 if rival is None else 2
    return f"{once(False):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def draw(epochs_by_name: dict[str, np.ndarray], path: Path) -> None:
    """Draw the share of replays that are done, over the epochs."""
    _, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, epochs in epochs_by_name.items():
        finite = np.sort(epochs[np.isfinite(epochs)])
        share = np.arange(1, len(finite) + 1) / len(epochs)
        style = "-" if name.startswith("atelier") else "--"
        axes.step([0, *finite], [0, *share], style, where="post", label=name)
    axes.set(xlabel="GPU-epochs", ylabel="searches that have found it", xlim=(0, 4000), ylim=(0, 1))
    axes.legend(fontsize=8)
    plt.savefig(path, dpi=120)


SIMULATED_CLOCK = """
CREATE SCHEMA simulated;
CREATE TABLE simulated.clock AS SELECT now() AS beginning, now() AS now;
CREATE FUNCTION simulated.clock_timestamp() RETURNS timestamptz
    STABLE LANGUAGE sql AS 'SELECT now FROM simulated.clock'
"""


def crowd(home: Path, workers: int, epochs: int) -> None:
    """Print how busy many workers are, and how well a budget of `epochs` for each worker is kept.

    An epoch takes a minute. The ledger reads a simulated clock in place of the database's.
    """
    engine = _engine(home)
    with engine.begin() as connection:
        connection.execute(sa.text(SIMULATED_CLOCK))
    engine.dispose()
    sa.event.listen(engine, "connect", lambda raw, _: _use_simulated_clock(raw))
    file = load_study_file(STUDY, [f"study.max_gpu_hours={workers * epochs / 60}"])
    replay = Replay(_table(), np.random.default_rng(0))
    all_workers = atelier(file, engine, replay, workers)
    entry = studies.study_entry(engine, file.study.name)
    assert entry is not None  # it was just entered
    moments: list[tuple[int, bool]] = []  # idle workers, and whether there was something to do

    def at(now: float) -> None:
        """Set the clock, and note how many workers are idle and whether there is something to do."""
        shift = "UPDATE simulated.clock SET now = beginning + make_interval(secs => :seconds)"
        with engine.begin() as connection:
            connection.execute(sa.text(shift), {"seconds": now * 60})
        if now:
            status = read_status(engine, entry.study_id, entry.name)
            begun = len(status.trials)
            more = status.counts["waiting"] + status.counts["paused"] + status.max_trials - begun
            moments.append((workers - status.processes, more > 0 and not status.budget_spent))

    simulate(all_workers, replay, np.random.default_rng(1), target=-math.inf, at=at)
    status = read_status(engine, entry.study_id, entry.name)
    over = (status.gpu_hours - workers * epochs / 60) * 60
    idle = sum(count for count, something_to_do in moments if something_to_do)
    print(
        f"{workers} workers, {status.counts}, {replay.epochs} epochs trained\n"
        f"idle although there was something to do: {idle} of {len(moments) * workers} looks\n"
        f"over the budget of {workers * epochs} epochs by {over:.1f}, {over / workers:.2f} a worker"
    )


def _use_simulated_clock(connection: Any) -> None:
    connection.autocommit = True  # otherwise a rollback would undo the setting
    with connection.cursor() as cursor:
        cursor.execute("SET search_path = simulated, pg_catalog, public")
    connection.autocommit = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--only", choices=("efficiency", "crowd"))
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    with temporary_home() as home:
        open_storage(_engine(home))
        if options.only != "crowd":
            efficiency(home, options.replays, options.figure)
        if options.only != "efficiency":
            crowd(home, workers=64, epochs=40)


if __name__ == "__main__":
    main()

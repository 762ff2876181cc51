"""What the service costs on top of training: per trial-epoch, and with 200 workers on one database.

    python -m benchmarks.control_plane [--trials 100 --trials 1000 --trials 5000] [--epoch 0.4]

A real worker runs in studies of --trials finished trials. It claims, samples, saves checkpoints,
records, prunes and tells. A pause of --epoch seconds replaces each epoch's training. The cost is the
time of a trial-epoch without that pause. The checkpoint is that of a small network, so its cost is the
disk's. The sizes take turns.

Apart from that, 200 simulated workers claim, record and prune, each with its own connection. They write
100 records a second in all, and after that as many as they can.

The server is an embedded PostgreSQL in a temporary folder.
"""

import argparse
import multiprocessing
import random
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna

import search.worker
from benchmarks.server import temporary_home
from search.sampling import make_sampler
from search.study_config import StudyConfig
from search.worker import Worker
from storage import database, optuna_storage, studies
from storage.ledger import Ledger
from storage.paths import RunFolder
from tests.studies import fill, open_storage
from trainer.demo import write_demo
from trainer.loop import EpochOutcome
from trainer.metrics import EpochResult
from trainer.predictions import Predictions
from trainer.run import Run
from trainer.workspace import Workspace

ROUNDS, NEW_TRIALS = 5, 6  # for each size: rounds, and trials in a round
WORKERS, PROCESSES = 200, 4
RATE, SECONDS = 100, 30.0  # records per second, and how long each load lasts
LABELS = np.zeros((1000, 6), np.uint8)  # of the validation images
CLASSES = LABELS[np.newaxis]


def result(epoch: int, value: float) -> EpochResult:
    return EpochResult(
        epoch=epoch,
        stream_epoch=epoch,
        lr=1e-3,
        train_loss=1.0,
        train_accuracy=value,
        val_loss=1.0,
        val_accuracy=value,
        val_overall=value,
        val_category=(value,) * 6,
        val_hits=(1,) * 26,
        val_log_loss=1.0,
        seconds=1.0,
        images=5000,
        peak_memory=1,
        predictions=Predictions(
            LABELS,
            CLASSES,
            CLASSES.astype(np.float16),
            np.zeros(1, np.int32),
            np.arange(len(LABELS), dtype=np.int32),
        ),
    )


class Pause:
    """Replaces `train_epoch`: an epoch is a pause."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.epochs, self.began = seconds, 0, 0.0

    def __call__(self, runs: list[Run], _: object) -> Iterator[tuple[Run, EpochOutcome]]:
        self.began = self.began or time.perf_counter()
        time.sleep(self.seconds)
        for run in runs:
            self.epochs += 1
            run.step += run.steps_per_epoch
            run.history.append(result(len(run.history), random.uniform(0.4, 0.6)))
            yield run, run.history[-1]


def beside_training(sizes: list[int], epoch: float, folder: Path) -> None:
    engine = database.connect()
    write_demo(folder / "demo", 60, 20, 1)
    workers = {}
    for size in sizes:
        study_id = fill(engine, ["complete", "pruned", "pruned"] * (size // 3), name=f"{size} trials")
        workers[size] = (study_id, f"{size} trials")
    costs: dict[int, list[float]] = {size: [] for size in sizes}
    starts: dict[int, list[float]] = {size: [] for size in sizes}
    workspace = None
    for number in range(ROUNDS):
        for size, (study_id, name) in workers.items():
            done = size // 3 * 3 + NEW_TRIALS * (number + 1)
            studies.update_study(engine, study_id, max_trials=done)
            entry = studies.study_entry(engine, name)
            assert entry is not None
            file = StudyConfig.from_record(entry).with_paths(str(folder / "demo"), "none")
            train = file.train | {"image_size": 32, "warmup_epochs": 5}
            file = file.model_copy(update={"train": train})
            workspace = workspace or Workspace(file.shared, folder / "cache")
            storage = optuna_storage.optuna_storage(engine)
            study = optuna.load_study(study_name=name, storage=storage, sampler=make_sampler(file, []))
            worker = Worker(
                file,
                study,
                Ledger(engine, storage, study_id),
                workspace,
                RunFolder(entry.name, entry.created),
            )
            pause = Pause(epoch)
            search.worker.train_epoch = pause  # type: ignore[assignment]
            started = time.perf_counter()
            worker.run()
            outside = time.perf_counter() - pause.began - pause.epochs * epoch
            costs[size].append(1000 * outside / pause.epochs)
            starts[size].append(pause.began - started)
    print(f"ms per trial-epoch on top of an epoch of {epoch} s (median of {ROUNDS}, lowest to highest):")
    smallest = statistics.median(costs[sizes[0]])
    for size, values in costs.items():
        middle = statistics.median(values)
        print(
            f"  {size:>5} finished trials: {middle:.1f} ({min(values):.1f} to {max(values):.1f}), "
            f"{middle / smallest:.2f}x; first suggestion, once per worker: {max(starts[size]):.1f} s"
        )


class Simulated(threading.Thread):
    """A worker that trains nothing. A trial has 12 epochs, with a rung at the sixth."""

    def __init__(self, study_id: int, storage: optuna.storages.BaseStorage, pause: float) -> None:
        super().__init__(daemon=True)
        self.engine = database.connect()
        self.ledger = Ledger(self.engine, storage, study_id)
        self.pause, self.claims, self.records = pause, [], []
        self.until = time.monotonic() + SECONDS

    def run(self) -> None:
        self.ledger.register()
        time.sleep(random.uniform(0, self.pause))
        while time.monotonic() < self.until:
            started = time.perf_counter()
            claim = self.ledger.claim()
            self.claims.append(time.perf_counter() - started)
            assert claim is not None
            for epoch in range(12):
                value = random.random()
                started = time.perf_counter()
                self.ledger.record(claim, result(epoch, value).columns(), value)
                self.records.append(time.perf_counter() - started)
                if epoch == 5 and self.ledger.rank(epoch, value).better > 3:
                    break
                if time.monotonic() > self.until:
                    break
                time.sleep(random.uniform(0.5, 1.5) * self.pause)
            self.ledger.finish(claim, "pruned", value)


def simulate(
    study_id: int, pause: float, count: int, pipe: "multiprocessing.connection.Connection"
) -> None:
    storage = optuna_storage.optuna_storage(database.connect())
    workers = [Simulated(study_id, storage, pause) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    claims = [seconds for worker in workers for seconds in worker.claims]
    records = [seconds for worker in workers for seconds in worker.records]
    pipe.send([claims, records])


def many_workers(pause: float, name: str) -> None:
    study_id = fill(database.connect(), [], name=name, max_trials=1_000_000)
    context = multiprocessing.get_context("spawn")
    started, pipes, processes = time.perf_counter(), [], []
    for _ in range(PROCESSES):
        receiver, sender = context.Pipe()
        pipes.append(receiver)
        arguments = (study_id, pause, WORKERS // PROCESSES, sender)
        processes.append(context.Process(target=simulate, args=arguments))
        processes[-1].start()
    answers = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    print(f"{WORKERS} workers, {name} ({time.perf_counter() - started:.0f} s with their start):")
    for kind, index in (("claims", 0), ("records", 1)):
        times = sorted(seconds for answer in answers for seconds in answer[index])
        print(
            f"  {len(times) / SECONDS:.1f} {kind}/s, p50 {1000 * times[len(times) // 2]:.0f} ms, "
            f"p99 {1000 * times[int(0.99 * len(times))]:.0f} ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, action="append")
    parser.add_argument("--epoch", type=float, default=0.4)
    options = parser.parse_args()
    with temporary_home() as folder:
        open_storage(database.connect())
        many_workers(WORKERS / RATE, f"{RATE} records a second")
        many_workers(0.0, "as fast as they can")
        beside_training(options.trials or [100, 1000, 5000], options.epoch, folder)


if __name__ == "__main__":
    main()

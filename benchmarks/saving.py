"""What recording and saving beside the training costs: a snapshot, and a worker's epoch.

    python -m benchmarks.saving --data DIR [--rounds 5]

In every round the bare loop trains an epoch, and then a worker does, with its database, its records and
its checkpoints. Both read the trunk's output from memory, and validate. Once the network is that of
studies/fashion.toml, with few images, and once a small one with short epochs. A ratio compares the two
epochs of a round. The median of the rounds is shown, with the lowest and the highest.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.server import temporary_home
from benchmarks.speed import seconds
from search.slurm.granted import take_granted
from search.study import open_study
from search.study_config import StudyConfig
from search.toml_file import load_study_file
from search.worker import Worker
from storage import database, optuna_storage, schema
from storage.ledger import Ledger
from storage.paths import RunFolder, files_in
from trainer.demo import write_demo
from trainer.device import prepare_process
from trainer.loop import train_epoch
from trainer.run import Run
from trainer.saving import Snapshots
from trainer.workspace import Workspace

# So that every epoch looks the same, and is kept; and that no epoch is the last one or a rung.
SETTINGS = ("train.augment='none'", "train.epochs=100000", "study.strategy='none'")
LARGE = ("train.weights='none'", "train.train_images=384")


def spread(values: list[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def make_worker(config: StudyConfig, workspace: Workspace, pack: int = 1) -> Worker:
    engine = database.connect()
    schema.ensure_tables(engine)
    storage = optuna_storage.optuna_storage(engine)
    study, entry = open_study(config, engine, storage, workspace.dataset, lead=True)
    runs = RunFolder(entry.name, entry.created).make()
    ledger = Ledger(engine, storage, entry.study_id)
    ledger.register()
    return Worker(config, study, ledger, workspace, runs, pack=pack)


def compare(name: str, config: StudyConfig, cache: Path, rounds: int) -> None:
    workspace = Workspace(config.shared, cache)
    worker = make_worker(config, workspace)
    [trial] = worker.fill()
    bare, snapshots = Run(trial.run.config, workspace), Snapshots()

    def epoch_of_worker() -> None:
        worker.fill()
        worker.train()

    list(train_epoch([bare]))  # fills the memory that is kept
    epoch_of_worker()
    snapshots.free(snapshots.take(bare))
    alone, beside, copies = [], [], []
    for _ in range(rounds):
        alone.append(seconds(lambda: list(train_epoch([bare]))))
        beside.append(seconds(epoch_of_worker))
        copies.append(1000 * seconds(lambda: snapshots.free(snapshots.take(bare))))
    trial.finish_jobs()
    written = sum(path.stat().st_size for path in files_in(worker.runs.path))
    print(f"{name}: {trial.run.steps_per_epoch} steps, epochs of {spread(alone, 2)} s")
    print(f"  a worker's epoch: {spread([b / a for a, b in zip(alone, beside, strict=True)], 3)}x")
    print(f"  a snapshot: {spread(copies, 1)} ms; files of {written / 1e6:.1f} MB at the end")
    worker.recorder.shutdown()
    worker.writer.shutdown()
    workspace.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    take_granted()
    prepare_process()
    with temporary_home() as home, tempfile.TemporaryDirectory() as folder:
        write_demo(Path(folder, "demo"), 2000, 500, 1)
        large = load_study_file(
            Path("studies/fashion.toml"), [*SETTINGS, *LARGE, f"train.data={json.dumps(options.data)}"]
        )
        small = load_study_file(
            Path("studies/demo.toml"), [*SETTINGS, f"train.data={json.dumps(str(Path(folder, 'demo')))}"]
        )
        compare("small network", small, home / "cache", 10 * options.rounds)
        compare("SE-ResNeXt50", large, home / "cache", options.rounds)


if __name__ == "__main__":
    main()

"""Record a table of real learning curves, on which search_efficiency.py simulates searches.

    python -m benchmarks.record_curves --data FOLDER --lite0 FILE --work FOLDER -o curves.parquet

Optuna's QMC sampler draws the configurations from the space of studies/fashion.toml. Each trains the
report's head for 30 epochs by the project's own loop. The frozen trunk is tf_efficientnet_lite0, and
IMAGES of the training images are used. The trunk's output is computed once, for VIEWS augmented epochs.
Each epoch then draws one of these views for each image, so a run takes only seconds.

The REPEATED best configurations are trained with SEEDS seeds. How a seed changes a result is the noise
in which a search has to find the best. Each row of the table is an epoch of a run. Finished runs are
kept in --work, so the same command goes on where it stopped.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import torch
from torch import nn

from search.sampling import distributions
from search.score import score
from search.study_config import StudyConfig
from search.toml_file import load_study_file
from trainer.config import TUNABLE
from trainer.loop import train
from trainer.workspace import Block, Workspace

COLUMNS = (
    *("configuration", "seed", *TUNABLE, "epoch", "train_loss", "train_accuracy"),
    *("val_loss", "val_accuracy", "val_overall", "val_log_loss", "seconds"),
)
VIEWS = 8
IMAGES = 2500
CONFIGURATIONS, REPEATED, SEEDS = 400, 64, 3


class Views(Workspace):
    """A workspace that reads the trunk's output for augmented images from a file."""

    def __init__(self, file: StudyConfig, work: Path) -> None:
        super().__init__(file.shared, work / "cache")
        path = work / "views.npy"
        if not path.exists():
            self._write(path)
        self._views = np.load(path, mmap_mode="r")

    def _write(self, path: Path) -> None:
        partial = path.with_suffix(".partial.npy")
        shape = (VIEWS, len(self.train_labels), self.runtime.backbone.features)
        views = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        images = self.division(self.config).train
        for view in range(VIEWS):
            for features, indices in super().train_blocks(self.frozen, images, 0, view, 256):
                views[view, indices.numpy()] = features.numpy()
            print(f"view {view + 1} of {VIEWS}", flush=True)
        views.flush()
        partial.rename(path)

    def train_blocks(
        self,
        trunk: nn.Module,
        indices: np.ndarray,
        seed: int,
        epoch: int,
        block: int,
        first: int = 0,
    ) -> Iterator[Block]:
        """One epoch in the order of (seed, epoch), which also draw a view for each image."""
        order = self.stream.order(indices, seed, epoch)
        drawn = np.random.default_rng([seed, epoch, VIEWS]).integers(VIEWS, size=len(order))
        for start in range(first * block, len(order), block):
            part = slice(start, start + block)
            features = torch.from_numpy(self._views[drawn[part], order[part]])
            yield features, torch.from_numpy(order[part])


def configurations(file: StudyConfig) -> list[dict[str, Any]]:
    """The parameters of each configuration."""
    sampler = optuna.samplers.QMCSampler(seed=0, warn_independent_sampling=False)
    study = optuna.create_study(sampler=sampler)
    parameters = []
    for _ in range(CONFIGURATIONS):
        trial = study.ask(distributions(file))
        parameters.append(trial.params)
        study.tell(trial, 0.0)
    return parameters


_workspace: Views  # of this process of the pool


def _begin(file: StudyConfig, work: Path) -> None:
    global _workspace  # each process of the pool has one
    torch.set_num_threads(1)
    _workspace = Views(file, work)


def _record(file: StudyConfig, number: int, seed: int, params: dict[str, Any]) -> list[dict[str, Any]]:
    config = file.config(params).model_copy(update={"seed": seed})
    key = {"configuration": number, "seed": seed}
    return [result.columns() | key for result in train(config, _workspace)]


class Recorder:
    """Keeps finished runs in a file, and trains the others in a pool of processes."""

    def __init__(self, file: StudyConfig, done: Path, pool: ProcessPoolExecutor) -> None:
        self._file, self._done, self._pool = file, done, pool
        self._params = configurations(file)
        done.touch()

    def _table(self) -> pd.DataFrame:
        rows = [json.loads(line) for line in self._done.read_text().splitlines()]
        # The configuration's learning rate replaces that of the epoch.
        return pd.DataFrame([row | self._params[row["configuration"]] for row in rows], columns=COLUMNS)

    def record(self, runs: list[tuple[int, int]]) -> pd.DataFrame:
        """Train runs, given by configuration and seed. Returns a row per epoch."""
        finished = {*self._runs(self._table())}
        futures = [
            self._pool.submit(_record, self._file, number, seed, self._params[number])
            for number, seed in runs
            if (number, seed) not in finished
        ]
        with self._done.open("a") as done:
            for future in as_completed(futures):
                done.writelines(json.dumps(row) + "\n" for row in future.result())
                done.flush()
        table = self._table()
        is_of_runs = [run in {*runs} for run in self._runs(table)]
        return table[is_of_runs].sort_values(["seed", "configuration", "epoch"])

    @staticmethod
    def _runs(table: pd.DataFrame) -> Iterator[tuple[int, int]]:
        return zip(table.configuration, table.seed, strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--lite0", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    settings = {
        "data": options.data,
        "weights": options.lite0,
        "backbone": "tf_efficientnet_lite0",
        "trainable": "head",
        "train_images": IMAGES,
    }
    file = load_study_file(
        Path("studies/fashion.toml"),
        [f"train.{name}={json.dumps(value)}" for name, value in settings.items()],
    )
    options.work.mkdir(exist_ok=True)
    Views(file, options.work)  # once, before the pool
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, _begin, (file, options.work)) as pool:
        recorder = Recorder(file, options.work / "runs.jsonl", pool)
        table = recorder.record([(number, 0) for number in range(CONFIGURATIONS)])
        scores = table.groupby("configuration").val_accuracy.agg(
            lambda curve: score([*curve], "mean-last-5")
        )
        best = scores.nlargest(REPEATED).index
        again = recorder.record([(number, seed) for seed in range(1, SEEDS) for number in best])
    table = pd.concat([table, again], ignore_index=True)
    table.to_parquet(options.output, index=False)
    print(f"{len(table)} epochs, {options.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

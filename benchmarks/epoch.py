"""Seconds per epoch and images per second of a study file, by part.

    python benchmarks/epoch.py STUDY.toml --images 320 [--data DIR] [--weights none] [--epochs 1]

Parts: `data` makes the augmented images, `trunk` is the frozen forward pass, `tail` the trained part's
forward, backward and step, `evaluation` the validation tail; `first` is what only the
first epoch pays (the validation images' trunk output). Compare ratios, not absolute times.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from search.study import load_study_file
from trainer.allocation import prepare_process
from trainer.loop import Run, Workspace


class Stopwatch:
    """Adds up the seconds spent in named parts of a run, by wrapping the run's own methods."""

    def __init__(self, run: Run) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = run.device
        workspace, stream = run.workspace, run.workspace.stream(run.block)
        run.train_step = self._timed("tail", run.train_step)
        run.evaluate = self._timed("evaluation", run.evaluate)
        workspace.features = self._timed("trunk", workspace.features)
        stream.epoch = self._timed_items("data", stream.epoch)

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = self.now()
            result = function(*arguments)
            self.seconds[part] += self.now() - started
            return result

        return timed

    def _timed_items(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Iterator[Any]:
            items = function(*arguments)
            following = self._timed(part, lambda: next(items, None))
            while (item := following()) is not None:
                yield item

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--images", type=int, help="use only so many training images")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--data")
    parser.add_argument("--weights")
    options = parser.parse_args()
    settings = {"train_images": options.images, "data": options.data, "weights": options.weights}
    overrides = [f"train.{key}={value}" for key, value in settings.items() if value is not None]
    config = load_study_file(options.study, overrides).shared
    threads = prepare_process()
    with tempfile.TemporaryDirectory() as cache:
        workspace = Workspace(config, Path(cache))
        run = Run(config, workspace)
        started = time.perf_counter()
        run.evaluate()
        first = time.perf_counter() - started
        watch = Stopwatch(run)
        started = watch.now()
        for _ in range(options.epochs):
            run.train_epoch()
        total = watch.now() - started
    images = len(workspace.indices) * options.epochs
    parts = dict(watch.seconds)
    parts["everything else"] = total - sum(parts.values())
    print(f"{config.backbone} at {config.image_size}, batch {config.batch_size}, {threads} threads")
    for name, seconds in parts.items():
        print(f"  {name:<16}{seconds / options.epochs:8.2f} s/epoch  {100 * seconds / total:5.1f} %")
    print(f"  {'epoch':<16}{total / options.epochs:8.2f} s/epoch  {images / total:.1f} images/s")
    print(f"  {'first':<16}{first:8.2f} s once")
    print(json.dumps({"parts": parts, "first": first, "seconds": total, "images": images}))


if __name__ == "__main__":
    main()

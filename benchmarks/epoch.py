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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from search.study import load_study_file
from trainer.loop import Run, Workspace, use_allotted_cpus


class Stopwatch:
    """Adds up the seconds spent in named parts."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds[name] += self._now() - started

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def timed_epoch(run: Run, epoch: int, watch: Stopwatch) -> None:
    """One epoch in the loop's own parts, so that what is timed is what trains."""
    workspace, config = run.workspace, run.config
    run.tail.train()
    blocks = workspace.stream(run.block).epoch(epoch)
    while True:
        with watch.part("data"):
            block = next(blocks, None)
        if block is None:
            break
        images, indices = block
        with watch.part("trunk"):
            features = workspace.features(run.trunk, images)
        with watch.part("tail"):
            targets = workspace.train_targets[indices.to(workspace.device)]
            for part, goal in zip(
                features.split(config.batch_size), targets.split(config.batch_size), strict=True
            ):
                run.train_step(part, goal)
    with watch.part("evaluation"):
        run.evaluate()


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
    threads = use_allotted_cpus()
    with tempfile.TemporaryDirectory() as cache:
        workspace = Workspace(config, Path(cache))
        watch = Stopwatch(workspace.device)
        run = Run(config, workspace)
        with watch.part("first"):
            run.evaluate()
        for epoch in range(options.epochs):
            started = time.perf_counter()
            timed_epoch(run, epoch, watch)
            watch.seconds["epochs"] += time.perf_counter() - started
    images = len(workspace.indices) * options.epochs
    parts = dict(watch.seconds)
    total, first = parts.pop("epochs"), parts.pop("first")
    parts["everything else"] = total - sum(parts.values())
    print(f"{config.backbone} at {config.image_size}, batch {config.batch_size}, {threads} threads")
    for name, seconds in parts.items():
        print(f"  {name:<16}{seconds / options.epochs:8.2f} s/epoch  {100 * seconds / total:5.1f} %")
    print(f"  {'epoch':<16}{total / options.epochs:8.2f} s/epoch  {images / total:.1f} images/s")
    print(f"  {'first':<16}{first:8.2f} s once")
    print(json.dumps({"parts": parts, "first": first, "seconds": total, "images": images}))


if __name__ == "__main__":
    main()

"""Training as a pure function of (configuration, seed, epochs of the stream): no network, no images.

It stands in for trainer.run.Run. The loop, checkpoints, resumption and all that a worker does with an
epoch's result are the real ones.
"""

import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from trainer.checkpoint import Checkpoints, State
from trainer.config import TrainConfig
from trainer.division import Division
from trainer.metrics import EpochResult
from trainer.predictions import Predictions
from trainer.run import FORMAT, PartialEpoch, Run

IMAGES, BLOCK = 96, 64
VALIDATION = 8  # images, in one category of two attributes
ATTRIBUTES = [{"name": name, "category": "fit", "images": 4} for name in ("tight", "loose")]
LABELS = np.array([[0], [1]] * (VALIDATION // 2), np.uint8)


class Rows:
    """Targets that are their own indices."""

    def __getitem__(self, rows: Any) -> Any:
        return rows


@dataclass
class Life:
    """A trial's training in a worker: where it went on, and when its epochs have ended."""

    process: Any
    began: float
    saved: int  # epochs that it found
    ended: list[float] = field(default_factory=list)


class World:
    """What the runs of one simulation share.

    `step` is called before each step of a run: it takes its time, and may fail. `resume` is called as a
    run begins or goes on from its checkpoint.
    """

    def __init__(
        self,
        step: Callable[["SimulatedRun"], None],
        resume: Callable[["SimulatedRun"], None],
        kept_epochs: int,
    ) -> None:
        self.step, self.resume = step, resume
        self.kept_epochs = kept_epochs  # so many epochs of the stream are kept
        self.diverging: dict[str, int] = {}  # the epoch after which a configuration's loss is NaN
        self.furthest: dict[str, int] = {}  # the last epoch that any run of a configuration has begun
        self.lives: dict[tuple[Path, int], Life] = {}  # of trials in workers, by folder and attempt


class SimulatedRun(Run):
    """A run whose state is a digest of all that it went through."""

    def __init__(
        self,
        config: TrainConfig,
        workspace: Any,
        checkpoints: Checkpoints | None = None,
        stream_epochs: Sequence[int] = (),
    ) -> None:
        self.config, self.workspace, self._world = config, workspace, workspace.world
        self._checkpoints, self._stream_epochs = checkpoints, stream_epochs
        self.owns_trunk, self.runnable_trunk = False, None
        self.images = Division(np.arange(IMAGES), np.arange(VALIDATION))
        self.device = torch.device("cpu")
        self.block_size = BLOCK
        self.steps_per_block = BLOCK // config.batch_size
        self.steps_per_epoch = math.ceil(IMAGES / config.batch_size)
        self.digest = _digest(identity(config))
        self.step = 0
        self.stream_epoch = None
        self.partial = PartialEpoch()
        self.history: list[EpochResult] = []
        self._resume()
        self._world.resume(self)

    def begin(self, stream_epoch: int) -> None:
        self.stream_epoch = stream_epoch
        key = identity(self.config)
        self._world.furthest[key] = max(self._world.furthest.get(key, -1), len(self.history))

    def stream_blocks(self, stream_epoch: int, first: int) -> Iterator[Any]:
        for start in range(first * BLOCK, IMAGES, BLOCK):
            rows = range(start, min(start + BLOCK, IMAGES))
            yield rows, rows

    def train_step(self, features: Any, target: Any) -> None:
        self._world.step(self)
        self.digest = _digest(self.digest, self.stream_epoch, self.step, *features)
        self.step += 1

    def evaluate_epoch(self) -> None:
        pass

    def give_up(self) -> None:
        pass

    def end_epoch(self) -> EpochResult:
        assert self.stream_epoch is not None
        assert self._checkpoints is not None
        result = epoch_result(
            self.config,
            self._world,
            self.digest,
            len(self.history),
            self.stream_epoch,
            self._checkpoints.attempt,
        )
        life = self._world.lives[self._checkpoints.folder, self._checkpoints.attempt]
        life.ended.append(time.monotonic())
        self.history.append(result)
        self.partial, self.stream_epoch = PartialEpoch(), None
        return result

    def state(self) -> State:
        return {
            "format": FORMAT,
            "config": self.config.model_dump(),
            "digest": self.digest,
            "step": self.step,
            "stream_epoch": self.stream_epoch,
            "history": [result.columns() for result in self.history],
            "predictions": [result.predictions for result in self.history],
        }

    def load(self, state: State) -> None:
        self._check_config(state["config"])
        self.digest, self.step, self.stream_epoch = state["digest"], state["step"], state["stream_epoch"]
        kept = zip(state["history"], state["predictions"], strict=True)
        self.history = [EpochResult(**columns, predictions=part) for columns, part in kept]


def workspace(world: World, config: TrainConfig) -> Any:
    """What the runs of one process share."""
    dataset = SimpleNamespace(fingerprint="d" * 64)
    return SimpleNamespace(
        world=world,
        config=config,
        dataset=dataset,
        attributes=ATTRIBUTES,
        device_name=None,
        stream=SimpleNamespace(seconds_read=lambda: 0.0),
        agree=lambda on_record: on_record("a simulated device", "what its trunk computes"),
        keeps=lambda images, seed, epoch, block: epoch < world.kept_epochs,
        train_targets=Rows(),
    )


def save(state: State, file: Any) -> None:
    """Replaces torch.save, which writes from C++: there no other actor can have its turn."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    file.write(buffer.getvalue())


def identity(config: TrainConfig) -> str:
    """What tells configurations apart."""
    return f"{config.seed} {config.lr!r} {config.batch_size}"


def undisturbed(config: TrainConfig, world: World, stream_epochs: Sequence[int]) -> list[EpochResult]:
    """The curve of a run that nothing has disturbed, through these epochs of the stream."""
    digest, step, results = _digest(identity(config)), 0, []
    for epoch, stream_epoch in enumerate(stream_epochs):
        for block in range(0, IMAGES, BLOCK):
            for start in range(block, min(block + BLOCK, IMAGES), config.batch_size):
                end = min(start + config.batch_size, block + BLOCK, IMAGES)
                digest = _digest(digest, stream_epoch, step, *range(start, end))
                step += 1
        results.append(epoch_result(config, world, digest, epoch, stream_epoch))
    return results


def epoch_result(
    config: TrainConfig, world: World, digest: str, epoch: int, stream_epoch: int, attempt: int = 0
) -> EpochResult:
    """An epoch's metrics: its configuration counts, and all that the run went through."""
    diverges = world.diverging.get(identity(config)) == epoch
    classes = np.array([[int(digit, 16) % 2] for digit in digest[:VALIDATION]], np.uint8)
    right = classes == LABELS
    quality = math.exp(-abs(math.log10(config.lr) + 3)) * (1 - 0.5 ** (epoch + 1))
    value = (quality + int(digest[:6], 16) / 16**6 / 4) / 1.25
    return EpochResult(
        epoch=epoch,
        stream_epoch=stream_epoch,
        lr=config.lr,
        train_loss=math.nan if diverges else 2 - value,
        train_accuracy=value,
        val_loss=2 - value,
        val_accuracy=value,
        val_overall=float(right.mean()),
        val_category=(float(right.mean()),),
        val_hits=tuple(int(right[label == LABELS].sum()) for label in (0, 1)),
        val_log_loss=math.nan if diverges else 1 - value,
        seconds=1.0,
        images=IMAGES,
        peak_memory=0,
        predictions=Predictions(
            LABELS,
            classes[np.newaxis],
            np.zeros((1, *classes.shape), np.float16),
            np.array([attempt], np.int32),
            np.arange(VALIDATION, dtype=np.int32),
        ),
    )


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()

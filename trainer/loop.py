"""The training loop: `train(config, workspace)` yields one EpochResult per epoch.

Whoever consumes it decides after each epoch whether to go on; a checkpoint of the epoch is already on
disk by then. The loop knows nothing of trials, databases or clusters.
"""

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.allocation import cpu_count, memory_limit, peak_memory
from trainer.checkpoint import CheckpointError, Checkpoints, State
from trainer.config import TUNABLE, EpochResult, TrainConfig
from trainer.dataset import Dataset, DatasetError, Split, read_dataset
from trainer.loss import AttributeLoss, accuracy, class_weights, predict
from trainer.model import make_head
from trainer.predictions import Predictions
from trainer.runtime import Runtime
from trainer.stream import BLOCK, Stream, epoch_order, prepared_images

log = logging.getLogger(__name__)

# Trunk output that is the same in every epoch is kept up to this size, else computed again; of a
# memory grant it takes at most a quarter.
FEATURE_CACHE_BYTES = 2 << 30
# Settings that may differ between a checkpoint and the run that goes on from it.
MOVABLE = ("data", "weights")
# Settings in which the runs of one process may differ from its workspace.
OWN = ("seed", *TUNABLE)
FORMAT = 2  # of `Run.state`

Block = tuple[torch.Tensor, torch.Tensor]  # trunk output [n, ...], int64 indices into train
Interrupt = Callable[[float], bool]  # see `train`


def learning_rate(position: float, config: TrainConfig) -> float:
    """The rate at `position`, in epochs from the start: linear from 0, then a cosine to 0.

    The schedule always spans `config.epochs`; a pruned trial is a prefix of it.
    """
    if position < config.warmup_epochs:
        return config.lr * position / config.warmup_epochs
    share = (position - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.lr * (1 + math.cos(math.pi * min(share, 1.0))) / 2


class Workspace(Runtime):
    """What the trials of a study share in one process: data, trunk and validation features.

    Raises DatasetError, ModelError. `cache` is the folder for prepared images; `processes` is the
    number of loader processes, by default none on a CPU and one less than the CPUs beside a GPU.
    """

    def __init__(
        self,
        config: TrainConfig,
        cache: Path,
        device: torch.device | None = None,
        processes: int | None = None,
    ) -> None:
        self.dataset = read_dataset(config.data)  # whose errors are the quickest to find
        super().__init__(config, device)
        self.sizes = self.dataset.sizes
        self.trunk, self.stages = self.backbone.split(config.trainable)
        self.place(self.trunk).requires_grad_(False).train(config.frozen_batchnorm == "train")
        train = self.dataset.split(config.train_on)
        self.indices = _subset(len(train), config.train_images)
        self._train_images = prepared_images(self.dataset, train, config.image_size, cache)
        self.train_targets = self._targets(train)
        self._val_images: Path | None = None
        if config.validates:  # else nothing is left to validate on
            val = self.dataset.split("val")
            self._val_images = prepared_images(self.dataset, val, config.image_size, cache)
            self.val_targets = self._targets(val)
        if processes is None:
            processes = max(cpu_count() - 1, 0) if self.device.type == "cuda" else 0
        self._processes = processes
        self._streams: dict[int, Stream] = {}
        self._constant: dict[str, torch.Tensor | None] = {}
        self._cache_bytes = min(FEATURE_CACHE_BYTES, (memory_limit() or math.inf) / 4)

    def _targets(self, split: Split) -> torch.Tensor:
        assert split.labels is not None  # only the test split may have none
        return torch.from_numpy(split.labels).to(self.device)

    def train_order(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of the training images in the order in which an epoch visits them."""
        return epoch_order(self.indices, seed, epoch)

    def train_blocks(
        self, trunk: nn.Module, seed: int, epoch: int, block: int, first: int = 0
    ) -> Iterator[Block]:
        """One epoch of trunk output in the order of (seed, epoch), from block `first` on."""
        constant = None
        if self.config.augment == "none":
            constant = self._constant_features("train", trunk, self._train_images, self.indices)
        if constant is not None:
            order = self.train_order(seed, epoch)
            rows = torch.from_numpy(np.searchsorted(self.indices, order)).to(self.device)
            blocks = torch.split(rows, block), torch.split(torch.from_numpy(order), block)
            for part, indices in itertools.islice(zip(*blocks, strict=True), first, None):
                yield constant[part], indices.to(self.device)
        else:
            for images, indices in self.stream(block).epoch(seed, epoch, first):
                yield self.features(trunk, images), indices.to(self.device)

    def stream(self, block: int) -> Stream:
        """The training images in blocks of this size; made once."""
        if block not in self._streams:
            augment = self.config.augment == "report"
            self._streams[block] = Stream(
                self._train_images, self.indices, augment, block, self._processes
            )
        return self._streams[block]

    def val_features(self, trunk: nn.Module) -> Iterator[torch.Tensor]:
        """The validation images' trunk output, in file order, BLOCK images at a time."""
        assert self._val_images is not None  # else there is nothing to evaluate
        every = np.arange(len(self.val_targets))
        constant = self._constant_features("val", trunk, self._val_images, every)
        if constant is not None:
            yield from torch.split(constant, BLOCK)
        else:
            yield from self._in_order(trunk, self._val_images, every)

    def _constant_features(
        self, name: str, trunk: nn.Module, path: Path, indices: np.ndarray
    ) -> torch.Tensor | None:
        """Trunk output of images that look the same in every epoch, made once; None if too large."""
        if self.config.frozen_batchnorm == "train":
            return None  # the trunk is not the same in every epoch
        if name not in self._constant:
            [one] = self._in_order(trunk, path, indices[:1])
            fits = one.nbytes * len(indices) <= self._cache_bytes
            self._constant[name] = self._gather(one, trunk, path, indices) if fits else None
        return self._constant[name]

    def _gather(
        self, one: torch.Tensor, trunk: nn.Module, path: Path, indices: np.ndarray
    ) -> torch.Tensor:
        layout = torch.channels_last if one.dim() == 4 else torch.contiguous_format
        shape = (len(indices), *one.shape[1:])
        gathered = torch.empty(shape, dtype=one.dtype, device=one.device, memory_format=layout)
        parts = torch.split(gathered, BLOCK), self._in_order(trunk, path, indices)
        for part, features in zip(*parts, strict=True):
            part.copy_(features)
        return gathered

    def _in_order(self, trunk: nn.Module, path: Path, indices: np.ndarray) -> Iterator[torch.Tensor]:
        images = np.load(path, mmap_mode="r")
        for start in range(0, len(indices), BLOCK):
            yield self.features(trunk, torch.from_numpy(images[indices[start : start + BLOCK]]))

    @property
    def device_name(self) -> str | None:
        """The GPU's name; None on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None


def rehearse(config: TrainConfig, cache: Path) -> Dataset:
    """Prepare the images and build the network once, on the CPU, for the errors that this brings.

    Returns the dataset. Raises DatasetError, ModelError.
    """
    return Workspace(config, cache, torch.device("cpu")).dataset


def train(
    config: TrainConfig,
    workspace: Workspace,
    checkpoints: Checkpoints | None = None,
    interrupt: Interrupt = lambda _: False,
    keep: "Callable[[Run, EpochResult], None]" = lambda _, __: None,
) -> Iterator[EpochResult]:
    """Train and yield every epoch's result; with `checkpoints`, go on from the latest.

    A resumed run first yields the epochs that its checkpoint remembers, so the consumer sees the whole
    curve either way, and the curve is the same, bit for bit (on one machine, with as many threads).
    `interrupt` is asked after every step, with an estimate of the seconds until the epoch's result;
    once it returns True the iteration ends early, with a checkpoint in the middle of the epoch. `keep`
    is called with every new result before its checkpoint is written, so what it keeps is never older.
    Raises CheckpointError if the checkpoint belongs to another configuration.
    """
    run = Run(config, workspace)
    state = checkpoints.latest() if checkpoints else None
    if checkpoints and state is not None:
        try:
            run.load(state)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoints.folder}: {error}") from None
        log.info("goes on after %d epochs, %d steps", len(run.history), run.step)
        yield from list(run.history)
    while len(run.history) < config.epochs:
        result = run.train_epoch(interrupt)
        if result is not None:
            keep(run, result)
        if checkpoints:
            checkpoints.save(len(run.history), run.step, run.state())
        if result is None:
            return
        yield result


class Run:
    """One run's own parts: tail, optimizer, generator, position, history."""

    def __init__(self, config: TrainConfig, workspace: Workspace) -> None:
        shared = set(TrainConfig.model_fields) - set(OWN)
        assert all(getattr(config, k) == getattr(workspace.config, k) for k in shared)
        self.config, self.workspace = config, workspace
        self.device = workspace.device
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        # Batch statistics in the trunk make it a part of the run, and tie blocks to its batches.
        self.owns_trunk = config.frozen_batchnorm == "train"
        self.trunk = copy.deepcopy(workspace.trunk) if self.owns_trunk else workspace.trunk
        self.block = config.batch_size if self.owns_trunk else _block_size(config.batch_size)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.tail = self._make_tail()
        self.optimizer = torch.optim.Adam(
            self.tail.parameters(), lr=config.lr, weight_decay=config.weight_decay, foreach=True
        )
        targets = workspace.train_targets[torch.from_numpy(workspace.indices).to(self.device)]
        self.loss = AttributeLoss(
            workspace.sizes,
            class_weights(targets, workspace.sizes),
            config.epsilon,
            config.smoothing,
        )
        self.steps_per_epoch = sum(
            math.ceil(min(self.block, len(targets) - start) / config.batch_size)
            for start in range(0, len(targets), self.block)
        )
        self.step = 0  # the schedule's position
        self.partial = _Partial()
        self.history: list[EpochResult] = []

    def _make_tail(self) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.seed)
            head = make_head(
                self.workspace.backbone.features,
                sum(self.workspace.sizes),
                self.config.dropout,
                self.generator,
            )
        tail = nn.Sequential(copy.deepcopy(self.workspace.stages), head)
        self.workspace.place(tail).requires_grad_(True)
        return tail

    def train_epoch(self, interrupt: Interrupt = lambda _: False) -> EpochResult | None:
        """Train to the end of the running epoch and evaluate; None if it was interrupted."""
        epoch = len(self.history)
        done = self.step - epoch * self.steps_per_epoch  # more than 0 after an interruption
        # Every block but the last has as many steps.
        first, skip = divmod(done, self.block // self.config.batch_size)
        pace = _Pace(self.steps_per_epoch - done, self._evaluation_steps())
        self.tail.train()
        seed = self.config.seed
        for features, indices in self.workspace.train_blocks(self.trunk, seed, epoch, self.block, first):
            steps = zip(
                torch.split(features, self.config.batch_size),
                torch.split(self.workspace.train_targets[indices], self.config.batch_size),
                strict=True,
            )
            for part, target in itertools.islice(steps, skip, None):
                self.partial.add(*self.train_step(part, target))
                if interrupt(pace.seconds_left()):
                    self.partial.seconds += pace.seconds
                    return None
            skip = 0
        result = self._result(epoch, pace)
        self.history.append(result)
        self.partial = _Partial()
        return result

    def _result(self, epoch: int, pace: "_Pace") -> EpochResult:
        workspace, partial = self.workspace, self.partial
        order = torch.from_numpy(workspace.train_order(self.config.seed, epoch)).to(self.device)
        targets = workspace.train_targets[order]
        trained = accuracy(torch.cat(partial.logits), targets, workspace.sizes)
        validated = self._validated() if self.config.validates else {}
        return EpochResult(
            epoch=epoch,
            lr=self._rate(self.step - 1),
            train_loss=float(torch.cat(partial.losses).sum()) / len(targets),
            train_accuracy=trained.per_class,
            seconds=partial.seconds + pace.seconds,
            images=len(targets),
            peak_memory=peak_memory(self.device),
            **validated,
        )

    def _validated(self) -> dict[str, Any]:
        logits, targets, sizes = self.evaluate(), self.workspace.val_targets, self.workspace.sizes
        valued = accuracy(logits, targets, sizes)
        return {
            "val_loss": float(self.loss(logits, targets)),
            "val_accuracy": valued.per_class,
            "val_overall": valued.overall,
            "val_category": valued.category,
            "val_hits": valued.hits,
            "val_log_loss": valued.log_loss,
            "predictions": predict(logits, targets, sizes),
        }

    def _evaluation_steps(self) -> int:
        """How many training steps take as long as the evaluation, at most: it is forward only."""
        images = len(self.workspace.val_targets) if self.config.validates else 0
        return math.ceil(images / self.config.batch_size)

    def train_step(
        self, features: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on trunk output. Returns detached logits and loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        output = self.workspace.logits(self.tail, features)
        loss = self.loss(output, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        return output.detach(), loss.detach()

    def _rate(self, step: int) -> float:
        return learning_rate(step / self.steps_per_epoch, self.config)

    def evaluate(self) -> torch.Tensor:
        """Logits of all validation images, float [images, attributes]."""
        self.tail.eval()
        trunk = self.trunk.eval() if self.owns_trunk else self.trunk
        with torch.no_grad():
            parts = self.workspace.val_features(trunk)
            logits = torch.cat([self.workspace.logits(self.tail, part) for part in parts])
        if self.owns_trunk:
            self.trunk.train()
        return logits

    def state(self) -> State:
        """All that the next epoch depends on, as plain tensors, numbers and strings."""
        return {
            "format": FORMAT,
            "config": self.config.model_dump(),
            "tail": self.tail.state_dict(),
            "trunk": self.trunk.state_dict() if self.owns_trunk else {},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "partial": vars(self.partial),
            "history": [result.columns() for result in self.history],
            "predictions": [_tensors(result.predictions) for result in self.history],
        }

    def load(self, state: State) -> None:
        """Raises CheckpointError if another configuration, or another version, made the state."""
        if state.get("format") != FORMAT:
            raise CheckpointError(
                f"the checkpoint has format {state.get('format')}, this version reads {FORMAT}; go on "
                "with the version that made it, or delete the checkpoint"
            )
        self._compare(state["config"])
        self.tail.load_state_dict(state["tail"])
        if self.owns_trunk:
            self.trunk.load_state_dict(state["trunk"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]
        self.partial = _Partial(
            losses=[part.to(self.device) for part in state["partial"]["losses"]],
            logits=[part.to(self.device) for part in state["partial"]["logits"]],
            seconds=state["partial"]["seconds"],
        )
        kept = zip(state["history"], state["predictions"], strict=True)
        self.history = [EpochResult(**values, predictions=_arrays(part)) for values, part in kept]

    def _compare(self, saved: dict[str, object]) -> None:
        mine = self.config.model_dump()
        for key in mine.keys() - set(MOVABLE):
            if saved.get(key) != mine[key]:
                raise CheckpointError(
                    f"the checkpoint was made with {key} = {saved.get(key)!r}, this run has "
                    f"{mine[key]!r}; use the same configuration, or another run folder"
                )


def _tensors(predictions: Predictions | None) -> dict[str, torch.Tensor]:
    """As a checkpoint holds them: loading with `weights_only` knows no NumPy."""
    every = vars(predictions) if predictions else {}
    return {name: torch.from_numpy(array) for name, array in every.items()}


def _arrays(tensors: dict[str, torch.Tensor]) -> Predictions | None:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Predictions(**arrays) if arrays else None


@dataclass
class _Partial:
    """What the running epoch has gathered so far; a checkpoint in its middle holds it."""

    losses: list[torch.Tensor] = field(default_factory=list)  # [1], a step's loss times its images
    logits: list[torch.Tensor] = field(default_factory=list)  # [images of the step, attributes]
    seconds: float = 0.0  # spent before an interruption

    def add(self, logits: torch.Tensor, loss: torch.Tensor) -> None:
        self.losses.append((loss * len(logits)).reshape(1))
        self.logits.append(logits)


class _Pace:
    """How fast an epoch goes, to say when it will end. Times are those of this process."""

    def __init__(self, steps: int, evaluation_steps: int) -> None:
        self._left, self._evaluation_steps = steps, evaluation_steps
        self._done = 0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def seconds_left(self) -> float:
        """To be asked after each step: the estimated seconds until the epoch's result."""
        self._left, self._done = self._left - 1, self._done + 1
        return self.seconds / self._done * (self._left + self._evaluation_steps)


def _block_size(batch_size: int) -> int:
    """The largest multiple of the batch size that fits a block, so that only the last batch is short."""
    return max(BLOCK // batch_size, 1) * batch_size


def _subset(images: int, wanted: int | None) -> np.ndarray:
    """Indices of the training images that are used; the same ones for every seed."""
    if wanted is None:
        return np.arange(images)
    if wanted > images:
        raise DatasetError(f"train_images = {wanted}: the dataset has {images} training images")
    return np.sort(np.random.default_rng(0).permutation(images)[:wanted])

"""The training loop: `train(config, workspace)` yields one EpochResult per epoch.

Whoever consumes it decides after each epoch whether to go on; a checkpoint of the epoch is already on
disk by then. The loop knows nothing of trials, databases or clusters.
"""

import copy
import math
import os
import resource
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer.checkpoint import CheckpointError, Checkpoints, State
from trainer.config import TUNABLE, EpochResult, TrainConfig
from trainer.dataset import DatasetError, read_dataset
from trainer.loss import AttributeLoss, accuracy, class_weights
from trainer.model import load_backbone, make_head
from trainer.stream import BLOCK, Stream, epoch_order, prepared_images

# Trunk output that is the same in every epoch is kept up to this size, else computed again.
FEATURE_CACHE_BYTES = 2 << 30
# Settings that may differ between a checkpoint and the run that goes on from it.
MOVABLE = ("data", "weights")

Block = tuple[torch.Tensor, torch.Tensor]  # trunk output [n, ...], int64 indices into the split


def learning_rate(position: float, config: TrainConfig) -> float:
    """The rate at `position`, in epochs from the start: linear from 0, then a cosine to 0.

    The schedule always spans `config.epochs`; a pruned trial is a prefix of it.
    """
    if position < config.warmup_epochs:
        return config.lr * position / config.warmup_epochs
    share = (position - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.lr * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Workspace:
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
        self.config = config
        self.device = device or pick_device()
        _set_precision(config, self.device)
        self.dataset = read_dataset(config.data)
        self.sizes = self.dataset.sizes
        self.backbone = load_backbone(config)
        self.trunk, self.stages = self.backbone.split(config.trainable)
        self._place(self.trunk)
        train, val = self.dataset.splits["train"], self.dataset.splits["val"]
        assert train.labels is not None
        assert val.labels is not None
        self.indices = _subset(len(train), config.train_images)
        self._train_images = prepared_images(self.dataset, train, config.image_size, cache)
        self._val_images = prepared_images(self.dataset, val, config.image_size, cache)
        self.train_targets = torch.from_numpy(train.labels).to(self.device)
        self.val_targets = torch.from_numpy(val.labels).to(self.device)
        if processes is None:
            processes = max(cpu_count() - 1, 0) if self.device.type == "cuda" else 0
        self._processes = processes
        self._streams: dict[int, Stream] = {}
        self._cached: dict[str, list[Block]] = {}

    def train_blocks(self, trunk: nn.Module, epoch: int, block: int) -> Iterator[Block]:
        """One epoch of trunk output in the order of (seed, epoch)."""
        if self.config.augment == "none" and self._frozen:
            yield from self._replay(trunk, epoch, block)
            return
        for images, indices in self.stream(block).epoch(epoch):
            yield self.features(trunk, images), indices.to(self.device)

    def stream(self, block: int) -> Stream:
        """The training images in blocks of this size; made once."""
        if block not in self._streams:
            self._streams[block] = Stream(
                self._train_images,
                self.indices,
                self.config.seed,
                block,
                self.config.augment == "report",
                self._processes,
            )
        return self._streams[block]

    def val_blocks(self, trunk: nn.Module) -> Iterator[Block]:
        """The validation images' trunk output, in file order."""
        return self._constant("val", trunk, self._val_images, np.arange(len(self._val_images)))

    @property
    def _frozen(self) -> bool:
        return self.config.frozen_batchnorm == "eval"

    def _replay(self, trunk: nn.Module, epoch: int, block: int) -> Iterator[Block]:
        """Un-augmented images look the same in every epoch, only their order changes."""
        blocks = list(self._constant("train", trunk, self._train_images, self.indices))
        features = torch.cat([block_features for block_features, _ in blocks])
        order = epoch_order(len(self.indices), self.config.seed, epoch)
        for start in range(0, len(order), block):
            part = torch.from_numpy(order[start : start + block])
            indices = torch.from_numpy(self.indices)[part].to(self.device)
            yield features[part.to(self.device)], indices

    def _constant(
        self, name: str, trunk: nn.Module, images: np.ndarray, indices: np.ndarray
    ) -> Iterator[Block]:
        if name in self._cached:
            yield from self._cached[name]
            return
        kept: list[Block] | None = [] if self._frozen else None
        size = 0
        for start in range(0, len(indices), BLOCK):
            part = indices[start : start + BLOCK]
            features = self.features(trunk, torch.from_numpy(images[part]))
            block = features, torch.from_numpy(part).to(self.device)
            size += features.nbytes
            if kept is not None and size <= FEATURE_CACHE_BYTES:
                kept.append(block)
            else:
                kept = None
            yield block
        if kept is not None:
            self._cached[name] = kept

    def features(self, trunk: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """The trunk's output for uint8 images [n, 3, size, size]."""
        with torch.no_grad(), self.autocast():
            features: torch.Tensor = trunk(self.normalise(images))
        return features

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, s, s] to float on the device, as the backbone's weights expect it."""
        images = images.to(self.device, non_blocking=True)
        mean = torch.tensor(self.backbone.mean, device=self.device).view(1, 3, 1, 1)
        std = torch.tensor(self.backbone.std, device=self.device).view(1, 3, 1, 1)
        scaled = (images.float() / 255 - mean) / std
        return scaled.contiguous(memory_format=torch.channels_last)

    @property
    def device_name(self) -> str | None:
        """The GPU's name; None on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None

    def autocast(self) -> AbstractContextManager[object]:
        wanted = self.config.precision
        if wanted == "bf16" or (wanted == "auto" and self.device.type == "cuda"):
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _place(self, module: nn.Module) -> None:
        module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        module.requires_grad_(False)
        module.train(not self._frozen)


def train(
    config: TrainConfig, workspace: Workspace, checkpoints: Checkpoints | None = None
) -> Iterator[EpochResult]:
    """Train and yield every epoch's result; with `checkpoints`, go on from the latest.

    A resumed run first yields the epochs that its checkpoint remembers, so the consumer sees the whole
    curve either way, and the curve is the same, bit for bit (on one machine, with as many threads).
    Raises CheckpointError if the checkpoint belongs to another configuration.
    """
    run = Run(config, workspace)
    state = checkpoints.latest() if checkpoints else None
    if state is not None:
        run.load(state)
        yield from list(run.history)
    while len(run.history) < config.epochs:
        result = run.train_epoch(len(run.history))
        run.history.append(result)
        if checkpoints:
            checkpoints.save(result.epoch, run.state())
        yield result


class Run:
    """One run's own parts: tail, optimizer, generator, position, history."""

    def __init__(self, config: TrainConfig, workspace: Workspace) -> None:
        shared = set(TrainConfig.model_fields) - set(TUNABLE)
        assert all(getattr(config, k) == getattr(workspace.config, k) for k in shared)
        self.config, self.workspace = config, workspace
        self.device = workspace.device
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
        tail.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return tail.requires_grad_(True)

    def train_epoch(self, epoch: int) -> EpochResult:
        started = time.monotonic()
        self.tail.train()
        losses, logits, targets = [], [], []
        for features, indices in self.workspace.train_blocks(self.trunk, epoch, self.block):
            target = self.workspace.train_targets[indices]
            for part, goal in zip(
                torch.split(features, self.config.batch_size),
                torch.split(target, self.config.batch_size),
                strict=True,
            ):
                output, loss = self.train_step(part, goal)
                losses.append(loss * len(goal))
                logits.append(output)
            targets.append(target)
        every_target = torch.cat(targets)
        trained = accuracy(torch.cat(logits), every_target, self.workspace.sizes)
        val_logits = self.evaluate()
        val_targets = self.workspace.val_targets
        valued = accuracy(val_logits, val_targets, self.workspace.sizes)
        return EpochResult(
            epoch=epoch,
            lr=self._rate(self.step - 1),
            train_loss=float(torch.stack(losses).sum()) / len(every_target),
            val_loss=float(self.loss(val_logits, val_targets)),
            train_accuracy=trained.per_class,
            val_accuracy=valued.per_class,
            val_overall=valued.overall,
            val_category=valued.category,
            seconds=time.monotonic() - started,
            images=len(every_target),
            peak_memory=_peak_memory(self.device),
        )

    def train_step(
        self, features: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on trunk output. Returns detached logits and loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        with self.workspace.autocast():
            output = self.tail(features)
        loss = self.loss(output, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        return output.detach().float(), loss.detach()

    def _rate(self, step: int) -> float:
        return learning_rate(step / self.steps_per_epoch, self.config)

    def evaluate(self) -> torch.Tensor:
        """Logits of all validation images, float [images, attributes]."""
        self.tail.eval()
        trunk = self.trunk.eval() if self.owns_trunk else self.trunk
        with torch.no_grad(), self.workspace.autocast():
            blocks = self.workspace.val_blocks(trunk)
            logits = torch.cat([self.tail(features).float() for features, _ in blocks])
        if self.owns_trunk:
            self.trunk.train()
        return logits

    def state(self) -> State:
        """All that the next epoch depends on, as plain tensors, numbers and strings."""
        return {
            "config": self.config.model_dump(),
            "tail": self.tail.state_dict(),
            "trunk": self.trunk.state_dict() if self.owns_trunk else {},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "history": [asdict(result) for result in self.history],
        }

    def load(self, state: State) -> None:
        """Raises CheckpointError if the state was made by another configuration."""
        self._compare(state["config"])
        self.tail.load_state_dict(state["tail"])
        if self.owns_trunk:
            self.trunk.load_state_dict(state["trunk"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]
        self.history = [EpochResult.from_dict(values) for values in state["history"]]

    def _compare(self, saved: dict[str, object]) -> None:
        mine = self.config.model_dump()
        for key in mine.keys() - set(MOVABLE):
            if saved.get(key) != mine[key]:
                raise CheckpointError(
                    f"the checkpoint was made with {key} = {saved.get(key)!r}, this run has "
                    f"{mine[key]!r}; use the same configuration, or another run folder"
                )


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


def _set_precision(config: TrainConfig, device: torch.device) -> None:
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        torch.backends.cudnn.allow_tf32 = config.allow_tf32
        torch.backends.cudnn.deterministic = True  # the same config gives the same curve
        torch.backends.cudnn.benchmark = False


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_count() -> int:
    """CPUs that this process may use, not those of the machine."""
    return len(os.sched_getaffinity(0))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the trial does not fit into the memory there is."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def use_allotted_cpus() -> int:
    """Let torch use the CPUs that this process was given. Returns their number."""
    given = os.environ.get("OMP_NUM_THREADS") or os.environ.get("SLURM_CPUS_PER_TASK")
    threads = int(given) if given and given.isdecimal() else cpu_count()
    torch.set_num_threads(max(threads, 1))
    return torch.get_num_threads()

"""What the runs of one process share: data, the frozen trunk, and the output of it that is kept."""

import contextvars
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import nn
from torch._inductor import config as inductor

from trainer.augment import Augmentation
from trainer.config import TrainConfig
from trainer.dataset import Split, read_dataset
from trainer.device import device_model, pick_device, wait_for
from trainer.division import Division, attribute_table, divide_all
from trainer.feature_places import Places, constant_only, open_store, places
from trainer.features import CONSTANT, FeatureStore, Make, Rows, View, equal_bits
from trainer.images import READER
from trainer.model import check_batches, check_size
from trainer.runtime import Runtime
from trainer.stream import BLOCK, Stream, prepared_images, read_images
from trainer.utilization import Utilization

log = logging.getLogger(__name__)

# The augmentation is compiled if an epoch has at least so many pixels. Compiling takes half a minute,
# once.
COMPILED_PIXELS = 20_000_000
# Changes if our own code changes a bit of the trunk's output: augmentation, normalisation, folding.
KIND = 1

EVALUATED_ON_GPU = 1024  # validation images at once; on a CPU it is BLOCK
DIGESTED = 4  # images whose output tells whether two workers compute the same

Block = tuple[torch.Tensor, torch.Tensor]  # trunk output [n, ...], int64 indices into train


class TrunkError(RuntimeError):
    """The trunk computes something else here than in the study's other workers. One line."""

    exit_code = 1  # not the input's fault, because another machine may do


class Init(NamedTuple):
    """The network of a finished run, with which other runs begin."""

    path: Path  # of its model file
    digest: str  # of that file
    attributes: tuple[str, ...]  # that it learned
    head: Mapping[str, torch.Tensor]  # the head's state dict


class _Tried(NamedTuple):
    """What a trial of the trunk has shown."""

    rows: Rows
    images: int  # that went through it together
    seconds: float  # that they took
    rows_depend: bool  # whether an image's output depends on those beside it


class Workspace:
    """Data, trunk and the output of it that is kept, shared by the runs of one process.

    `cache` is the folder for prepared images and compiled code. All `batch_sizes` that runs may have are
    checked. `places` says where the trunk's output is kept, and how much of it. With `init` runs begin
    with its weights and not with the configuration's, and with its head if the attributes are the same.
    Raises DatasetError, ImageError, ModelError, and the errors of `pick_device` and `places`.
    """

    def __init__(
        self,
        config: TrainConfig,
        cache: Path,
        device: torch.device | None = None,
        batch_sizes: Iterable[int] = (),
        places: Callable[[torch.device], Places] = constant_only,
        init: Init | None = None,
    ) -> None:
        # First, because its errors are found fastest.
        self.dataset = read_dataset(config.data, unknown_labels=config.unknown_labels)
        self.config, self.init = config, init
        weights = config.weights if init is None else str(init.path)
        self.runtime = Runtime(config.model_copy(update={"weights": weights}), device)
        self.head: Mapping[str, torch.Tensor] | None = None
        if init is not None and init.attributes == self.dataset.attributes:
            self.head = init.head
        self.device, backbone = self.runtime.device, self.runtime.backbone
        self._places = places(self.device)
        _prepare_compiler(cache / "compiled")
        self.sizes = self.dataset.sizes
        self.trunk, self.stages = backbone.split(config.trainable)
        self.runtime.place(self.trunk)
        self._eager = self.runtime.freeze(self.trunk)
        self.utilization = Utilization(self.device)
        train = self.dataset.split(config.train_split)
        self._divisions = divide_all(self.dataset, config)  # by fold
        check_size(config, backbone)
        for images in {len(division.train) for division in self._divisions}:
            check_batches(config, backbone, images, batch_sizes)
        # Compiles in this context, which has the compiler's settings, while the images are prepared and
        # a worker opens its study.
        thread, here = ThreadPoolExecutor(1, "compiler"), contextvars.copy_context()
        self._compiled = thread.submit(here.run, self.runtime.compiled, self._eager)
        thread.shutdown(wait=False)
        self._train_images = prepared_images(self.dataset, train, config.image_size, cache)
        self._val_images: Path | None = None
        if config.validates:  # else no images are left to validate on
            val = self.dataset.split(config.val_split)
            self._val_images = prepared_images(self.dataset, val, config.image_size, cache)
            self.val_labels = _labels(val)
            self.val_targets = self.val_labels.to(self.device)
        self.stream = Stream(self._train_images, self._augmentation(), self.device)
        self.train_labels = _labels(train)
        self.train_targets = self.train_labels.to(self.device)

    @cached_property
    def frozen(self) -> nn.Module:
        """The trunk that all runs share, in its fastest form."""
        return self._compiled.result()

    @property
    def attributes(self) -> list[dict[str, Any]]:
        """See `attribute_table`."""
        return attribute_table(self.dataset, self.config, self.division(self.config))

    def _augmentation(self) -> Augmentation | None:
        if self.config.augment == "none":
            return None
        pixels = len(self.division(self.config).train) * self.config.image_size**2
        return Augmentation(self.config.compile != "none" and pixels >= COMPILED_PIXELS)

    def division(self, config: TrainConfig) -> Division:
        """Which images a run learns from and is validated on."""
        return self._divisions[config.fold]

    def train_blocks(
        self,
        trunk: nn.Module,
        indices: np.ndarray,
        seed: int,
        epoch: int,
        block: int,
        first: int = 0,
    ) -> Iterator[Block]:
        """The trunk's output of these images in the order of (seed, epoch), from block `first` on."""
        parts = self.stream.parts(indices, seed, epoch, block)

        def make(part: np.ndarray) -> torch.Tensor:
            return self.runtime.features(trunk, self.stream.images(seed, epoch, part))

        view = self._view("train", indices, block, seed, epoch)
        blocks = self._blocks(view, parts, make, first)
        for part in parts[first:]:  # the consumer's block is the only one that stays in memory
            yield next(blocks), torch.from_numpy(part).to(self.device, non_blocking=True)

    def val_features(self, trunk: nn.Module, indices: np.ndarray) -> Iterator[torch.Tensor]:
        """The trunk's output of these validation images, some at a time."""
        path = self._val_images
        assert path is not None  # else there is nothing to evaluate
        size = EVALUATED_ON_GPU if self.device.type == "cuda" else BLOCK
        parts = [indices[start : start + size] for start in range(0, len(indices), size)]

        def make(part: np.ndarray) -> torch.Tensor:
            return self.runtime.features(trunk, read_images(path, part))

        yield from self._blocks(self._view("val", indices, size), parts, make)

    def keeps(self, indices: np.ndarray, seed: int, epoch: int, block: int) -> bool:
        """Whether the trunk's output of an epoch of the stream is kept, or would be if it was made."""
        view = self._view("train", indices, block, seed, epoch)
        return view is not None and self.store.keeps(view)

    def _blocks(
        self, view: View | None, parts: list[np.ndarray], make: Make, first: int = 0
    ) -> Iterator[torch.Tensor]:
        if view is None:
            return map(make, parts[first:])
        return self.store.blocks(view, parts, make, first)

    def _view(
        self, split: str, indices: np.ndarray, block: int, seed: int = 0, epoch: int = CONSTANT
    ) -> View | None:
        """What the output is kept as. None if no other epoch or run needs it."""
        is_constant = split == "val" or self.config.augment == "none"
        if self.config.folds and self.config.augment == "none":
            split = "train"  # an image looks the same, whether it is learned or judged
        images = len(indices) if not self.config.folds else len(self.train_labels)
        if self.config.frozen_batchnorm == "train":  # then the trunk changes
            return None
        if not (is_constant or self._places.every_epoch):
            return None
        if self._tried.rows_depend:
            cut = hashlib.sha256(indices.tobytes()).hexdigest()[:16]
            return View(split, len(indices), seed, epoch, f"{block}-{cut}")
        if is_constant:
            return View(split, images)
        return View(split, images, seed, epoch)

    @cached_property
    def store(self) -> FeatureStore:
        """The trunk's output that is kept. The first use tries the trunk."""
        tried = self._tried
        splits = {"train": len(self.train_labels)}
        if self.config.validates:
            splits["val"] = len(self.val_labels)
        return open_store(self._places, tried.rows, self._kind, splits, tried.images, tried.seconds)

    @cached_property
    def _tried(self) -> "_Tried":
        some = self.division(self.config).train[: self.runtime.images_at_once]

        def make(part: np.ndarray) -> torch.Tensor:
            return self.runtime.features(self.frozen, self.stream.images(0, 0, part))

        forwards, alone = make(some), make(some[-1:])
        wait_for(self.device)
        started = time.monotonic()
        backwards = make(some[::-1].copy())
        wait_for(self.device)
        seconds = time.monotonic() - started
        depend = not (equal_bits(forwards, backwards.flip(0)) and equal_bits(alone, forwards[-1:]))
        if depend:
            log.info("the trunk's output of an image depends on those beside it: it is kept by blocks")
        rows = Rows(tuple(forwards.shape[1:]), forwards.dtype, self.device)
        return _Tried(rows, len(some), seconds, depend)

    def agree(self, on_record: Callable[[str, str], str]) -> None:
        """Let the trunk compute what it computes in other workers: compiled and not may differ in bits.

        `on_record` takes this device's name and a digest of the trunk's output. It returns the digest
        that counts. Raises TrunkError if this machine cannot compute that.
        """
        if self.config.frozen_batchnorm == "train":  # every run has a trunk of its own
            return
        device = f"{device_model(self.device)}, torch {torch.__version__}"
        agreed = on_record(device, self._digest)
        if agreed != self._digest and self.frozen is not self._eager:
            log.info("the trunk is not compiled, as in the study's first worker")
            self.frozen = self._eager
            del self._digest
        if agreed != self._digest:
            raise TrunkError(
                f"the trunk computes other bits on {socket.gethostname()} than where the study's first "
                "worker with such a device ran; a node without a C compiler may be the reason: mend "
                "that, or use another node"
            )

    @cached_property
    def _digest(self) -> str:
        """What the trunk computes from images of noise."""
        size = self.config.image_size
        noise = np.random.default_rng(0).integers(0, 256, (DIGESTED, 3, size, size), np.uint8)
        output = self.runtime.features(self.frozen, torch.from_numpy(noise)).contiguous().cpu()
        data = output.flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(data).hexdigest()[:32]

    def _kind(self) -> str:
        """A digest of all that the trunk's output depends on, beside the view."""
        config, runtime, backbone = self.config, self.runtime, self.runtime.backbone
        weights = hashlib.sha256()
        for name, tensor in self.frozen.state_dict().items():
            weights.update(f"{name} {tuple(tensor.shape)} ".encode() + tensor.cpu().numpy().tobytes())
        splits = [config.train_split, config.val_split] if config.validates else [config.train_split]
        parts = {
            "version": [KIND, READER],
            "images": [self.dataset.images_digest(self.dataset.split(name)) for name in splits],
            "settings": [config.image_size, config.augment, config.allow_tf32],
            "output": self._digest,  # the same settings may be compiled or not
            "network": [config.backbone, config.trainable, weights.hexdigest()],
            "normalisation": [backbone.mean, backbone.std],
            "arithmetic": [runtime.rounds, runtime.images_at_once],
            "libraries": [torch.__version__, timm.__version__, np.__version__],
            "device": device_model(self.device),
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def close(self) -> None:
        """Leave what is kept on a disk to other workers. The last one deletes it."""
        self.utilization.close()
        if "store" in vars(self):
            self.store.close()

    @property
    def device_name(self) -> str | None:
        """The GPU's name. None on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None


def prepare_images(config: TrainConfig, batch_sizes: Iterable[int], cache: Path) -> None:
    """Prepare the images, so that later processes find them. Also tries the device and the network.

    Raises DatasetError, ImageError, ModelError, DeviceError, UnknownDeviceError, FeaturesError.
    """
    pick_device()
    Workspace(config, cache, torch.device("cpu"), batch_sizes, places)


def _prepare_compiler(cache: Path) -> None:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.absolute()))
    # Compiler processes would not survive the signals that a job gets.
    inductor.compile_threads = 1
    # Cached code must not be tied to this process's number of threads.
    inductor.cpp.dynamic_threads = True


def _labels(split: Split) -> torch.Tensor:
    assert split.labels is not None  # only the test split may have none
    return torch.from_numpy(split.labels)

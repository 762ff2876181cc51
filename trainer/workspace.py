"""What the runs of one process share: data, frozen trunk, and the trunk's output for fixed images."""

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch._inductor import config as inductor

from trainer.allocation import memory_limit
from trainer.augment import Augmentation
from trainer.config import TrainConfig
from trainer.dataset import Split, read_dataset
from trainer.device import pick_device
from trainer.model import check_batches, check_size
from trainer.runtime import Runtime, concatenate
from trainer.stream import BLOCK, Stream, prepared_images, read_images

# Trunk output that is the same in every epoch is kept up to this size. It takes at most a quarter of the
# granted memory. Larger output is computed again each time.
FEATURE_CACHE_BYTES = 2 << 30
# The augmentation is compiled if an epoch has at least so many pixels. Compiling takes half a minute,
# once.
COMPILED_PIXELS = 20_000_000

Block = tuple[torch.Tensor, torch.Tensor]  # trunk output [n, ...], int64 indices into train


class Workspace:
    """Data, trunk and validation features, shared by the runs of one process.

    `cache` is the folder for prepared images and compiled code. All `batch_sizes` that runs may have are
    checked. Raises DatasetError, ImageError, ModelError, and the errors of `pick_device`.
    """

    def __init__(
        self,
        config: TrainConfig,
        cache: Path,
        device: torch.device | None = None,
        batch_sizes: Iterable[int] = (),
    ) -> None:
        self.dataset = read_dataset(config.data)  # first, because its errors are found fastest
        self.config = config
        self.runtime = Runtime(config, device)
        self.device, backbone = self.runtime.device, self.runtime.backbone
        _prepare_compiler(cache / "compiled")
        self.sizes = self.dataset.sizes
        self.trunk, self.stages = backbone.split(config.trainable)
        self.runtime.place(self.trunk)
        self.frozen = self.runtime.freeze(self.trunk)
        train = self.dataset.split(config.train_on)
        self.indices = self.dataset.training_rows(config)
        check_size(config, backbone)
        check_batches(config, backbone, len(self.indices), batch_sizes)
        self._train_images = prepared_images(self.dataset, train, config.image_size, cache)
        self.stream = Stream(self._train_images, self.indices, self._augmentation(), self.device)
        self.train_labels = _labels(train)
        self.train_targets = self.train_labels.to(self.device)
        self._val_images: Path | None = None
        if config.validates:  # else no images are left to validate on
            val = self.dataset.split("val")
            self._val_images = prepared_images(self.dataset, val, config.image_size, cache)
            self.val_labels = _labels(val)
            self.val_targets = self.val_labels.to(self.device)
        self._constant: dict[str, torch.Tensor | None] = {}
        self._cache_bytes = min(FEATURE_CACHE_BYTES, (memory_limit() or math.inf) / 4)

    def _augmentation(self) -> Augmentation | None:
        if self.config.augment == "none":
            return None
        pixels = len(self.indices) * self.config.image_size**2
        return Augmentation(self.config.compile != "none" and pixels >= COMPILED_PIXELS)

    def train_blocks(
        self, trunk: nn.Module, seed: int, epoch: int, block: int, first: int = 0
    ) -> Iterator[Block]:
        """One epoch of trunk output in the order of (seed, epoch), from block `first` on."""
        constant = None
        if self.config.augment == "none":
            constant = self._constant_features("train", trunk, self._train_images, self.indices)
        if constant is not None:
            order = self.stream.order(seed, epoch)
            rows_and_indices = np.searchsorted(self.indices, order), order
            blocks = (
                torch.split(torch.from_numpy(part).to(self.device), block) for part in rows_and_indices
            )
            for rows, indices in itertools.islice(zip(*blocks, strict=True), first, None):
                yield constant[rows], indices
        else:
            for images, indices in self.stream.epoch(seed, epoch, block, first):
                yield self.runtime.features(trunk, images), indices

    def val_features(self, trunk: nn.Module) -> Iterator[torch.Tensor]:
        """The validation images' trunk output, in file order, BLOCK images at a time."""
        assert self._val_images is not None  # else there is nothing to evaluate
        all_indices = np.arange(len(self.val_labels))
        constant = self._constant_features("val", trunk, self._val_images, all_indices)
        if constant is not None:
            yield from torch.split(constant, BLOCK)
        else:
            yield from self._in_order(trunk, self._val_images, all_indices)

    def _constant_features(
        self, name: str, trunk: nn.Module, path: Path, indices: np.ndarray
    ) -> torch.Tensor | None:
        """Trunk output for images that are equal in every epoch, computed once. None if too large."""
        if self.config.frozen_batchnorm == "train":
            return None  # the trunk is not the same in every epoch
        if name not in self._constant:
            [first] = self._in_order(trunk, path, indices[:1])
            fits = first.nbytes * len(indices) <= self._cache_bytes
            parts = self._in_order(trunk, path, indices)
            self._constant[name] = concatenate(parts, len(indices)) if fits else None
        return self._constant[name]

    def _in_order(self, trunk: nn.Module, path: Path, indices: np.ndarray) -> Iterator[torch.Tensor]:
        for start in range(0, len(indices), BLOCK):
            yield self.runtime.features(trunk, read_images(path, indices[start : start + BLOCK]))

    @property
    def device_name(self) -> str | None:
        """The GPU's name. None on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None


def prepare_images(config: TrainConfig, batch_sizes: Iterable[int], cache: Path) -> None:
    """Prepare the images, so that later processes find them. Also tries the device and the network.

    Raises DatasetError, ImageError, ModelError, DeviceError, UnknownDeviceError.
    """
    pick_device()
    Workspace(config, cache, torch.device("cpu"), batch_sizes)


def _prepare_compiler(cache: Path) -> None:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.absolute()))
    # Compiler processes would not survive the signals that a job gets.
    inductor.compile_threads = 1
    # Cached code must not be tied to this process's number of threads.
    inductor.cpp.dynamic_threads = True


def _labels(split: Split) -> torch.Tensor:
    assert split.labels is not None  # only the test split may have none
    return torch.from_numpy(split.labels)

"""The stream of training images: prepared once, then augmented by (seed, epoch, image).

The first three steps of the report's transform are not random. Their uint8 result is kept in a
memory-mapped file, which all processes of a machine share. The random steps depend only on the seed, the
epoch and the image's index. So any process can repeat any epoch, from any block on.
"""

import errno
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from filelock import FileLock
from torchvision import transforms
from torchvision.transforms import functional

from trainer.allocation import cpu_count
from trainer.augment import Augmentation, draw
from trainer.dataset import Dataset, Split
from trainer.images import READER, load_image

BLOCK = 256  # images per pass through the trunk; a multiple of every batch size in the report
# A GPU keeps the prepared images if they take at most this share of its memory. Otherwise each block is
# copied to it.
RESIDENT_SHARE = 1 / 8
AT_ONCE = 256  # images in memory while they are prepared

T = TypeVar("T")
R = TypeVar("R")

_draw = lru_cache(maxsize=1)(draw)  # for a whole split at once: the blocks of an epoch share it


def deterministic_transform(size: int) -> transforms.Compose:
    """The report's Resize, CenterCrop(200, 160) and Resize, scaled for sizes other than 224."""
    crop = [round(200 / 224 * size), round(160 / 224 * size)]
    return transforms.Compose(
        [
            transforms.Resize([size, size]),
            transforms.CenterCrop(crop),
            transforms.Resize([size, size]),
        ]
    )


def prepared_images(dataset: Dataset, split: Split, size: int, cache: Path) -> Path:
    """The .npy file of a split's prepared images: uint8 [images, 3, size, size].

    The first process that asks for it builds it. Splits with the same images in the same order share it,
    if the image reader has the same version. Raises ImageError for the first image that cannot be used.
    """
    path = cache / f"{dataset.images_digest(split)}-{size}-reader{READER}.npy"
    shape = (len(split), 3, size, size)
    if not _is_valid(path, shape):
        for _ in of_each(split.paths, lambda name: load_image(dataset.folder / name)):
            pass  # a broken image ends the command before anything is written
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not _is_valid(path, shape):
            _prepare(dataset, split, size, path)
    return path


def _is_valid(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        images = np.lib.format.open_memmap(path, mode="r")
    except Exception:  # absent or damaged; the error depends on where it is damaged
        return False
    return images.shape == shape and images.dtype == np.uint8


def _prepare(dataset: Dataset, split: Split, size: int, path: Path) -> None:
    partial = path.with_suffix(".partial")
    shape = (len(split), 3, size, size)
    try:
        # Not mapped: on a full disk, a write to a mapped file ends the process by SIGBUS.
        with partial.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            _reserve(file, math.prod(shape))
            for image in of_each(split.paths, lambda name: prepared(dataset.folder / name, size)):
                file.write(image.numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def prepared(path: Path, size: int) -> torch.Tensor:
    """An image after the steps that are not random: uint8 [3, size, size]. Raises ImageError."""
    image = deterministic_transform(size)(load_image(path))
    pixels: torch.Tensor = functional.pil_to_tensor(image)
    return pixels.contiguous()


def of_each(items: Sequence[T], function: Callable[[T], R]) -> Iterator[R]:
    """The function's results in the items' order, from a thread for each CPU. Raises its first error."""
    # The reader of images changes Python's filters of warnings, which all threads share.
    with warnings.catch_warnings(), ThreadPoolExecutor(cpu_count()) as threads:
        for start in range(0, len(items), AT_ONCE):  # so that few results wait in memory
            yield from threads.map(function, items[start : start + AT_ONCE])


def _reserve(file: BinaryIO, size: int) -> None:
    """Reserve disk space for so many bytes, so that a full disk is noticed at once."""
    file.flush()
    try:
        os.posix_fallocate(file.fileno(), file.tell(), size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # else the file system cannot reserve space
            what = f"{error.strerror} for {size / 1e6:,.1f} MB of prepared images"
            raise OSError(error.errno, what) from None


def read_images(path: Path, indices: np.ndarray) -> torch.Tensor:
    """Read some of the prepared images: uint8 [n, 3, size, size].

    The file is mapped only during the call, because mapped pages count as the process's memory.
    """
    return torch.from_numpy(np.load(path, mmap_mode="r")[indices])  # indexing by an array copies


class Stream:
    """Training images, equal for every trial with the same seed."""

    def __init__(
        self,
        path: Path,
        augmentation: Augmentation | None,
        device: torch.device,
    ) -> None:
        """Use the images of the file at `path`."""
        self.device, self._augmentation = device, augmentation
        self._path, self._shape = path, np.load(path, mmap_mode="r").shape
        self._seconds_read = 0.0

    def order(self, indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """The indices in the order in which an epoch visits them."""
        return indices[np.random.default_rng([seed, epoch]).permutation(len(indices))]

    def parts(self, indices: np.ndarray, seed: int, epoch: int, block: int) -> list[np.ndarray]:
        """The indices in that order, block by block."""
        order = self.order(indices, seed, epoch)
        return [order[start : start + block] for start in range(0, len(order), block)]

    def images(self, seed: int, epoch: int, part: np.ndarray) -> torch.Tensor:
        """The images with these indices, as an epoch shows them: uint8 [n, 3, size, size]."""
        images = self._block(part)
        if self._augmentation is None:
            return images
        return self._augmentation(images, _draw(seed, epoch, self._shape[0], self._shape[-1])[part])

    def _block(self, part: np.ndarray) -> torch.Tensor:
        if self._resident is not None:
            return self._resident[torch.from_numpy(part).to(self.device, non_blocking=True)]
        images = self._read(part)
        if self.device.type == "cuda":
            images = images.pin_memory()  # otherwise the copy waits for the device
        return images.to(self.device, non_blocking=True)

    @cached_property
    def _resident(self) -> torch.Tensor | None:
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            if math.prod(self._shape) <= total * RESIDENT_SHARE:
                return self._read(np.arange(self._shape[0])).to(self.device)
        return None

    def _read(self, part: np.ndarray) -> torch.Tensor:
        started = time.monotonic()
        images = read_images(self._path, part)
        self._seconds_read += time.monotonic() - started
        return images

    def seconds_read(self) -> float:
        """For how long images were read from their file since the last call."""
        seconds, self._seconds_read = self._seconds_read, 0.0
        return seconds

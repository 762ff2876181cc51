"""Images on their way to the network: prepared once, then augmented by (seed, epoch, image).

The first three steps of the report's transform have no randomness, so their uint8 result is kept in a
memory-mapped file that all processes of a machine share. What is random depends on nothing but the
seed, the epoch and the image's index: any epoch can be made again, in any process, in any order.
"""

import atexit
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms
from torchvision.transforms import functional

from trainer.dataset import Dataset, Split, load_image

BLOCK = 256  # images per pass through the trunk; every allowed batch size of the report divides it


class LoaderError(RuntimeError):
    """A loader process has died, which says nothing about the run; this process needs a new start."""


def deterministic_transform(size: int) -> transforms.Compose:
    """The report's Resize, CenterCrop(200, 160), Resize, in proportion for sizes other than 224."""
    crop = [round(200 / 224 * size), round(160 / 224 * size)]
    return transforms.Compose(
        [
            transforms.Resize([size, size]),
            transforms.CenterCrop(crop),
            transforms.Resize([size, size]),
        ]
    )


def random_transform() -> transforms.Compose:
    """The report's augmentation: flip, colour jitter, affine."""
    return transforms.Compose(
        [
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.3),
            transforms.RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.5, 1.5), shear=15),
        ]
    )


def prepared_images(dataset: Dataset, split: Split, size: int, cache: Path) -> Path:
    """The .npy file of a split: uint8 [images, 3, size, size], built by the first process that asks.

    Raises DatasetError for the first image that cannot be used.
    """
    path = cache / f"{dataset.fingerprint[:16]}-{split.name}-{size}.npy"
    shape = (len(split), 3, size, size)
    if not _is_whole(path, shape):
        for name in split.paths:  # a broken image ends the command before anything is written
            load_image(dataset.folder / name)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not _is_whole(path, shape):
            _prepare(dataset, split, size, path)
    return path


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        return bool(np.load(path, mmap_mode="r").shape == shape)
    except (OSError, ValueError):  # absent, or cut off
        return False


def _prepare(dataset: Dataset, split: Split, size: int, path: Path) -> None:
    transform = deterministic_transform(size)
    partial = path.with_suffix(".partial")
    shape = (len(split), 3, size, size)
    try:
        images = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        for index, name in enumerate(split.paths):
            images[index] = functional.pil_to_tensor(transform(load_image(dataset.folder / name)))
        images.flush()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def epoch_order(indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The indices in the order in which an epoch visits them, which depends on (seed, epoch)."""
    return indices[np.random.default_rng([seed, epoch]).permutation(len(indices))]


class AugmentedImages(TorchDataset[tuple[torch.Tensor, int]]):
    """Item (seed, epoch, index) is the augmented uint8 image [3, size, size] and its index."""

    def __init__(self, path: Path, augment: bool) -> None:
        self.path = path
        self.transform = random_transform() if augment else None

    @cached_property
    def images(self) -> np.ndarray:
        """Opened by each process for itself: a memory map that is pickled becomes a copy."""
        images: np.ndarray = np.load(self.path, mmap_mode="r")
        return images

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[torch.Tensor, int]:
        *_, index = key
        if self.transform is None:
            return torch.from_numpy(self.images[index].copy()), index
        image = functional.to_pil_image(torch.from_numpy(self.images[index].copy()))
        # torchvision draws from the global generator: lend it one that only this image sees.
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return functional.pil_to_tensor(self.transform(image)), index


class _Blocks(Sampler[list[tuple[int, int, int]]]):
    """Yields the (seed, epoch, index) keys of one epoch, a block at a time.

    `seed`, `epoch` and `first`, the block to begin with, are set from outside.
    """

    def __init__(self, indices: np.ndarray, block: int) -> None:
        self.indices, self.block = indices, block
        self.seed, self.epoch, self.first = 0, 0, 0

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        order = epoch_order(self.indices, self.seed, self.epoch)
        for start in range(self.first * self.block, len(order), self.block):
            yield [(self.seed, self.epoch, int(index)) for index in order[start : start + self.block]]


class Stream:
    """Blocks of augmented training images, the same for every trial with the same seed."""

    def __init__(
        self, path: Path, indices: np.ndarray, augment: bool, block: int, processes: int
    ) -> None:
        self._blocks = _Blocks(indices, block)
        self._loader = DataLoader(
            AugmentedImages(path, augment),
            batch_sampler=self._blocks,
            num_workers=processes,
            persistent_workers=processes > 0,
            pin_memory=torch.cuda.is_available(),
            # Not forkserver: a signal to the whole job would end the server, and with it all of them.
            multiprocessing_context="spawn" if processes else None,
            worker_init_fn=_leave_signals_to_the_parent,
        )
        atexit.register(self._close)

    def _close(self) -> None:
        # Python's own exit sends SIGTERM, which the loader processes ignore, and waits for them.
        if self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()  # type: ignore[attr-defined]

    def epoch(
        self, seed: int, epoch: int, first: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """uint8 [<= block, 3, size, size] and int64 [<= block] indices into the split.

        `first` is the block to begin with. Raises LoaderError.
        """
        self._blocks.seed, self._blocks.epoch, self._blocks.first = seed, epoch, first
        try:
            with _signals_held_back():
                blocks = iter(self._loader)
            yield from blocks
        except (RuntimeError, EOFError, OSError) as error:
            # One that dies while it hands over a block is seen as a broken connection.
            broken = isinstance(error, (EOFError, ConnectionError, FileNotFoundError))
            if not broken and "DataLoader worker" not in str(error):
                raise
            raise LoaderError(f"{error!r}; the node may be out of memory") from error


# SLURM and Ctrl-C signal all processes of a job; it is the parent who decides what to do.
PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes that are started meanwhile begin with these signals blocked."""
    resource_tracker.ensure_running()  # else it is started below, and unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(_: int) -> None:
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)

"""Where trunk output is kept here, and how much: what the user says, else what the machine allows."""

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from trainer.allocation import FEATURES, memory_limit
from trainer.disk import file_system
from trainer.feature_files import FeatureFiles
from trainer.features import FeatureStore, Memory, Rows, Tier

log = logging.getLogger(__name__)

GB = 10**9
RUNS_ON_DEVICE = 8 << 30  # bytes of a GPU's memory that are left to the runs, at least
RUN_ON_HOST = 4 << 30  # bytes of main memory that a process needs beside a GPU
BESIDE_RUNS = 1.8 * GB  # bytes of main memory at most, where the runs are in it
FOR_ONE_RUN = 2 << 30  # bytes of a GPU's memory, for output that one run needs again
ON_DISK = 100 * GB  # at most
# File systems on a machine's own disk. Files in a tmpfs would count as the job's memory.
LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "overlay", "apfs")


class FeaturesError(ValueError):
    """ATELIER_FEATURES cannot be used. The message is one line."""


@dataclass(frozen=True)
class Places:
    """Bytes of trunk output in each place, and the folder for what is on the disk."""

    device: float
    memory: float
    disk: float = 0
    folder: Path | None = None
    every_epoch: bool = True  # else only of images that look the same in every epoch


def constant_only(device: torch.device) -> Places:
    """For a single run, which needs the other output once."""
    return Places(device=FOR_ONE_RUN, memory=_of_memory(device), every_epoch=False)


def places(device: torch.device) -> Places:
    """For many runs: what ATELIER_FEATURES says, as in "memory=4 disk=50 folder=/scratch/me", in GB.

    Raises FeaturesError.
    """
    sizes: dict[str, float] = {}
    folder = _temporary_folder()
    for word in os.environ.get(FEATURES, "").split():
        name, _, value = word.partition("=")
        if name == "folder" and value.startswith("/"):
            folder = Path(value)
            if not folder.is_dir():  # where it is made later, nobody would see that it is the wrong one
                raise FeaturesError(f"{FEATURES}: {word!r}: no such folder; make it, or name another")
        elif name in ("device", "memory", "disk") and _is_size(value):
            sizes[name] = float(value) * GB
        else:
            raise FeaturesError(
                f"{FEATURES}: {word!r}: allowed are device=GB, memory=GB and disk=GB, 0 for none, and "
                "folder=/FOLDER, which is on a disk of this machine"
            )
    return Places(
        device=sizes.get("device", _of_device(device)),
        memory=sizes.get("memory", _of_memory(device)),
        disk=sizes.get("disk", _of_disk(folder)),
        folder=folder and folder / f"atelier-features-{os.geteuid()}",
    )


def open_store(
    places: Places,
    rows: Rows,
    kind: Callable[[], str],
    splits: Mapping[str, int],
    images: int,
    seconds: float,
) -> FeatureStore:
    """The store of one kind of trunk output, for `splits` with so many images.

    So many images took so many seconds to make. The disk is used if it is faster. `kind` names the kind,
    and is called for the disk only: it reads all of the trunk's weights.
    """
    memories = [Memory(torch.device("cpu"), places.memory, rows)]
    if rows.device.type == "cuda":
        memories.insert(0, Memory(rows.device, places.device, rows))
    files = _open_files(places, rows, kind, splits, images, seconds) if places.disk else None
    tiers: list[Tier] = [*memories, files] if files else [*memories]
    kept = ", ".join(f"{tier.name} {tier.budget / GB:.1f} GB" for tier in tiers if tier.budget)
    what = "each epoch" if places.every_epoch else "images that look the same in every epoch"
    size = rows.bytes / 1000
    log.info("trunk output of %s, %.1f kB an image, is kept in: %s", what, size, kept or "no place")
    return FeatureStore(memories, files, seconds / images)


def _open_files(
    places: Places,
    rows: Rows,
    kind: Callable[[], str],
    splits: Mapping[str, int],
    images: int,
    seconds: float,
) -> FeatureFiles | None:
    """What is kept on a disk; None if that cannot be, or is slower than the trunk."""
    files = None
    try:
        if places.folder is None or file_system(places.folder.parent) not in LOCAL:
            raise OSError(f"{places.folder or tempfile.gettempdir()} is on no disk of this machine")
        files = FeatureFiles(places.folder, kind(), places.disk, rows, splits)
        reading = files.seconds_to_read(images)
        log.info("trunk output of %d images: made in %.3f s, read in %.3f s", images, seconds, reading)
        if reading < seconds:
            return files
    except OSError as error:
        log.warning("trunk output is not kept on a disk: %s", error)
    if files is not None:
        files.close()
    return None


def _is_size(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


def _temporary_folder() -> Path | None:
    """A folder on a disk of this machine. None if there is none."""
    for path in map(Path, (tempfile.gettempdir(), "/var/tmp")):
        if file_system(path) in LOCAL and os.access(path, os.W_OK):
            return path
    return None


def _of_device(device: torch.device) -> float:
    if device.type != "cuda":
        return 0
    kept_free = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + kept_free
    return max(min(free - RUNS_ON_DEVICE, 3 / 4 * free), 0)


def _of_memory(device: torch.device) -> float:
    limit = memory_limit() or psutil.virtual_memory().available
    return max(limit - RUN_ON_HOST, 0) / 2 if device.type == "cuda" else min(BESIDE_RUNS, limit / 4)


def _of_disk(folder: Path | None) -> float:
    try:
        return min(shutil.disk_usage(folder).free / 2, ON_DISK) if folder else 0
    except OSError:  # `open_store` says that it is not there
        return ON_DISK

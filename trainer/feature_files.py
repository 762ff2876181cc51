"""Trunk output in files on a machine's own disk, by image, for all workers there.

A row of one image is valid if its checksum is that in the index. So a killed worker, a full disk or a
damaged file costs only the time to compute what is missing.
"""

import errno
import fcntl
import logging
import os
import shutil
import stat
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from trainer.device import wait_for
from trainer.features import Block, Rows, View

log = logging.getLogger(__name__)

INDEX_ENTRY = 4  # bytes: the CRC-32 of an image's row, 0 while there is none
PRIVATE = 0o700
TRIED = -2  # an epoch that there is not
ROOM = ".room"
MARGIN = 0.05  # share of the disk that stays free


class FeatureFiles:
    """The files of one kind of trunk output. All who use them hold a lock; the last one deletes them.

    `root` is on a local disk. `kind` names what the output depends on beside the view. Raises OSError.
    """

    name = "disk"

    def __init__(
        self, root: Path, kind: str, budget: float, rows: Rows, splits: Mapping[str, int]
    ) -> None:
        """`splits` says how many images each split has."""
        self.budget, self._rows, self._splits = budget, rows, splits
        self._root, self._folder = root, root / kind
        self._is_open = self._works = True
        root.mkdir(mode=PRIVATE, exist_ok=True)
        _check_private(root)
        for other in root.iterdir():
            if other.is_dir() and other != self._folder:
                _remove_unused(other)
        self._in_use = _join(self._folder)
        try:
            self._locks = _open(self._folder / "blocks.lock", os.O_RDWR)
        except OSError:
            os.close(self._in_use)
            raise

    def takes(self, view: View) -> bool:
        with suppress(OSError):  # another worker has just deleted a file
            return self._works and (self._lacks(view) <= 0 or self._has_room(view))
        return False

    def lacking(self, block: Block) -> np.ndarray:
        lacking: np.ndarray = block.indices[self._checksums(block) == 0]
        return lacking

    def get(self, block: Block) -> torch.Tensor | None:
        """The block, if all of its rows are there and undamaged."""
        expected = self._checksums(block)
        if not expected.all():
            return None
        rows = torch.zeros(len(expected), self._rows.bytes, dtype=torch.uint8)
        with suppress(OSError), self._path(block.view).open("rb", buffering=0) as file:
            for index, row in zip(block.indices.tolist(), rows.numpy(), strict=True):
                os.preadv(file.fileno(), [row], index * self._rows.bytes)
        checksums = map(_checksum, rows.numpy())
        damaged = block.indices[np.fromiter(checksums, np.uint32, len(rows)) != expected]
        if not len(damaged):
            return self._rows.as_made(rows.view(self._rows.dtype))
        log.warning("%s: computes damaged rows again: %d", self._path(block.view), len(damaged))
        with self._stopping_at_errors():
            self._write_index(block.view, dict.fromkeys(damaged.tolist(), 0))
        return None

    def put(self, block: Block, features: torch.Tensor) -> bool:
        """Write the rows, and then their checksums."""
        rows = self._rows.of(features).cpu().view(torch.uint8).numpy()
        with self._stopping_at_errors():
            if not self._begin(block.view):
                return False
            with _writing(self._path(block.view)) as file:
                for index, row in zip(block.indices.tolist(), rows, strict=True):
                    _write(file, row, index * self._rows.bytes)
            checksums = map(_checksum, rows)
            self._write_index(block.view, dict(zip(block.indices.tolist(), checksums, strict=True)))
        return self._works

    @contextmanager
    def claims(self, block: Block) -> Iterator[bool]:
        """Lock one byte for the block. The system unlocks it if this process is killed."""
        place = _lock_byte(block)
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError:  # another has it, or there are no locks: then it costs time only
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)

    def seconds_to_read(self, images: int) -> float:
        """How long the disk takes to read so many images' rows. Raises OSError."""
        block = Block(View("train", images, os.getpid(), TRIED), np.arange(images))
        path = self._path(block.view)
        rows = torch.zeros(images, self._rows.values, dtype=self._rows.dtype)
        try:
            if not self.put(block, self._rows.as_made(rows)):
                raise OSError(errno.ENOSPC, "there is no room")
            with path.open("rb") as file:  # else it would be read from memory
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.monotonic()
            if self.get(block) is None:
                raise OSError(errno.EIO, "what was written there is not what is read")
            wait_for(self._rows.device)
            return time.monotonic() - started
        finally:
            for left in (path, self._index(block.view), self._room(block.view)):
                left.unlink(missing_ok=True)

    def close(self) -> None:
        """Delete the files, if nobody else uses them."""
        if not self._is_open:
            return
        self._is_open = self._works = False
        os.close(self._locks)
        with suppress(OSError):  # others use it
            _delete(self._folder, self._in_use)
        os.close(self._in_use)

    def _path(self, view: View) -> Path:
        return self._folder / "-".join(map(str, (view.split, view.seed, view.epoch, view.cut)))

    def _index(self, view: View) -> Path:
        return self._path(view).with_suffix(".crc32")

    def _room(self, view: View) -> Path:
        """An empty file, as long as what the view will take. So it is known before it is written."""
        return self._path(view).with_suffix(ROOM)

    def _begin(self, view: View) -> bool:
        """Take room for the view, if there is some. Returns whether there is."""
        if not self._works or self._lacks(view) <= 0:
            return self._works
        with _writing(self._root / "budget.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # else two workers could take the same room
            if not self._has_room(view):
                return False
            with _writing(self._room(view)) as file:
                os.truncate(file, view.images * self._rows.bytes)
        return True

    def _has_room(self, view: View) -> bool:
        lacking = self._lacks(view)
        taken = sum(map(_length, self._root.glob(f"*/*{ROOM}")))
        disk = shutil.disk_usage(self._folder)
        return taken + lacking <= self.budget and disk.free - lacking >= MARGIN * disk.total

    def _lacks(self, view: View) -> int:
        """Bytes that the view needs beyond those that others have taken for it."""
        return view.images * self._rows.bytes - _length(self._room(view))

    def _checksums(self, block: Block) -> np.ndarray:
        """Those of the block's images, uint32; 0 for a row that is missing."""
        entries = np.zeros(0, np.uint32)
        with suppress(OSError):
            entries = np.fromfile(self._index(block.view), np.uint32)
        missing = max(self._splits[block.view.split] - len(entries), 0)
        checksums: np.ndarray = np.pad(entries, (0, missing))[block.indices]
        return checksums

    def _write_index(self, view: View, entries: Mapping[int, int]) -> None:
        with _writing(self._index(view)) as file:
            for index, checksum in entries.items():
                _write(file, np.array(checksum, np.uint32), index * INDEX_ENTRY)

    @contextmanager
    def _stopping_at_errors(self) -> Iterator[None]:
        """Use the files no more after an error such as a full disk: what they lack is computed."""
        try:
            yield
        except OSError as error:
            log.warning("trunk output is kept no more in %s: %s", self._folder, error.strerror)
            self._works = False


def _open(path: Path, flags: int) -> int:
    return os.open(path, os.O_CREAT | flags, 0o600)


@contextmanager
def _writing(path: Path) -> Iterator[int]:
    descriptor = _open(path, os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(file: int, data: np.ndarray, start: int) -> None:
    """Raises OSError, also for a disk that takes only some of the data."""
    if os.pwrite(file, data.data, start) < data.nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _length(path: Path) -> int:
    """Bytes; 0 for a file that another worker has deleted, or not made."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(row.data) or 1  # 0 stands for a missing row


def _lock_byte(block: Block) -> int:
    """A byte in the file of locks. Two blocks may have the same: then they take turns."""
    return zlib.crc32(repr(block.view).encode() + block.indices.tobytes())


def _check_private(folder: Path) -> None:
    """Raises OSError for a folder that somebody else made, or can write to."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a folder of this user alone")


def _join(folder: Path) -> int:
    """Use the folder, which is made if it is not there. Returns the lock that says so."""
    path = folder / "in-use.lock"
    while True:
        folder.mkdir(mode=PRIVATE, exist_ok=True)
        with suppress(FileNotFoundError):  # the last user has just deleted it
            lock = _open(path, os.O_RDWR)
            fcntl.flock(lock, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(lock)):
                    return lock
            os.close(lock)


def _remove_unused(folder: Path) -> None:
    """Delete what a killed worker has left."""
    with suppress(OSError):  # in use, or deleted by another
        lock = _open(folder / "in-use.lock", os.O_RDWR)
        try:
            _delete(folder, lock)
        finally:
            os.close(lock)


def _delete(folder: Path, lock: int) -> None:
    """Delete a folder that nobody else uses. Raises OSError if somebody does."""
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Under another name, so that who comes now makes a new folder.
    doomed = folder.rename(folder.with_name(f"{folder.name}.{uuid.uuid4().hex}"))
    shutil.rmtree(doomed)

"""The home folder as a disk: it fills up, and a power failure tears what is not synced.

The files are real. Each operation in the home is a boundary, and the disk remembers how to undo what
no fsync has made durable: contents by file, names by folder.
"""

import errno
import io
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.simulation.history import History
from tests.simulation.scheduler import Scheduler, current
from tests.spoil import spoil


class Change(NamedTuple):
    """A change of names in a folder, until the folder is synced."""

    folder: Path
    undo: Callable[[], None]


class Disk:
    """What is written in the home folder, by actors."""

    def __init__(self, home: Path, scheduler: Scheduler, history: History, seed: int) -> None:
        self.home, self._scheduler, self._history = home, scheduler, history
        self._random = random.Random(f"disk {seed}")
        self._changes: list[Change] = []
        self._unsynced: set[Path] = set()  # files whose contents are
        self.spoilt: Counter[Path] = Counter()  # how often something in a folder was lost or damaged
        self.full_until = 0.0
        for name in ("replace", "rename", "link", "unlink", "mkdir", "rmdir", "fsync"):
            setattr(os, name, self._watched(name, getattr(os, name)))
        self._open = io.open
        io.open = self._opened

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        note = getattr(self, f"_note_{name}")

        def call(*arguments: Any, **named: Any) -> Any:
            actor = current()
            paths = [self._path(argument, named.get("dir_fd")) for argument in arguments[:2]]
            if actor is None or paths[0] is None:
                return real(*arguments, **named)
            self._step(name, paths[0])
            if name in ("mkdir", "replace", "rename"):
                self._need_room()
            undo = note(*[path for path in paths if path is not None])
            result = real(*arguments, **named)
            if undo is not None:
                self._changes.append(undo)
            return result

        return call

    def _path(self, argument: Any, folder: int | None) -> Path | None:
        """The path in the home that an argument means; None if it is elsewhere."""
        try:
            if isinstance(argument, int):
                argument = os.readlink(f"/proc/self/fd/{argument}")
            elif folder is not None:
                argument = Path(os.readlink(f"/proc/self/fd/{folder}"), argument)
            path = Path(argument)
        except (OSError, TypeError):
            return None
        return path if path.is_relative_to(self.home) else None

    def _step(self, name: str, path: Path) -> None:
        actor = current()
        assert actor is not None
        self._scheduler.boundary(f"file {name}")
        self._history.add(actor.process.name, actor.name, name, path.relative_to(self.home))

    def _need_room(self) -> None:
        if self._scheduler.now < self.full_until:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _note_replace(self, source: Path, target: Path) -> Change:
        moved, old = _content(source), _content(target)
        if source in self._unsynced:
            self._unsynced.discard(source)
            self._unsynced.add(target)

        def undo() -> None:
            _write(source, moved)
            _write(target, old)

        return Change(target.parent, undo)

    _note_rename = _note_replace

    def _note_link(self, source: Path, target: Path) -> Change:
        return Change(target.parent, lambda: _write(target, None))

    def _note_unlink(self, path: Path) -> Change:
        old = _content(path)
        self._unsynced.discard(path)
        return Change(path.parent, lambda: _write(path, old))

    def _note_mkdir(self, path: Path, *_: Path) -> None:
        """A folder is taken for durable: an empty one does no harm."""

    def _note_rmdir(self, path: Path) -> None:
        """The same."""

    def _note_fsync(self, path: Path) -> None:
        self._unsynced.discard(path)
        self._changes = [change for change in self._changes if change.folder != path]

    def _opened(self, file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        path = self._path(file, None) if isinstance(file, (str, Path)) else None
        if current() is None or path is None:
            return self._open(file, mode, *arguments, **named)
        self._step("open", path)
        if mode[0] == "r":
            return self._open(file, mode, *arguments, **named)
        self._need_room()
        is_new = not path.exists()
        opened = self._open(file, mode, *arguments, **named)
        if is_new:
            self._changes.append(Change(path.parent, lambda: _write(path, None)))
        self._unsynced.add(path)
        os.utime(opened.fileno(), (self._scheduler.now, self._scheduler.now))
        return _File(opened, self, path) if "b" in mode else opened

    def write(self, file: Any, path: Path, data: Any) -> int:
        """Write in two halves, so that a worker may end in between. Raises OSError."""
        half = len(data) // 2
        for part in (data[:half], data[half:]):
            self._step("write", path)
            self._need_room()
            file.write(part)
            file.flush()
            os.utime(file.fileno(), (self._scheduler.now, self._scheduler.now))
        return len(data)

    # Faults.

    def lose_power(self) -> int:
        """Undo the latest changes of names, and tear contents, that are not synced. Returns how many."""
        kept = self._random.randint(0, len(self._changes))
        lost, self._changes = self._changes[kept:], []
        for change in reversed(lost):
            self.spoilt[change.folder] += 1
            change.undo()
        torn = sorted(path for path in self._unsynced if path.is_file())
        for path in torn:
            self.spoilt[path.parent] += 1
            data = path.read_bytes()
            _write(path, data[: self._random.randint(0, len(data))])
        self._unsynced.clear()
        return len(lost) + len(torn)

    def spoil(self, path: Path, size: int | None = None) -> None:
        """Damage a file within its first `size` bytes."""
        self.spoilt[path.parent] += 1
        spoil(path, self._random, size)

    def move(self, home: Path) -> None:
        """Go on with a copy of the home, on a disk with room."""
        self.spoilt = Counter(
            {home / path.relative_to(self.home): files for path, files in self.spoilt.items()}
        )
        self.home, self.full_until = home, 0.0
        self._changes, self._unsynced = [], set()


class _File:
    """A file that is open for writing."""

    def __init__(self, file: Any, disk: Disk, path: Path) -> None:
        self._file, self._disk, self._path = file, disk, path

    def write(self, data: Any) -> int:
        return self._disk.write(self._file, self._path, data)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _write(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

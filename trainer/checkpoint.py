"""Checkpoints that a kill at any moment cannot spoil.

Each is a file of its own, `attempt-0001-epoch-0003-step-00000120.pt`, named by who wrote it and by the
epochs and steps that the run had finished, with its SHA-256 in a file of the same name and `.sha256`
(the form that `sha256sum -c` reads). Data, then digest, each to a temporary name in the same folder,
fsynced and moved into place; a file without a digest is none yet.

The newest is that of the last attempt: what a worker that was replaced writes late comes before all
that its successor wrote. One older pair is kept, for the day when the newest is found damaged: that one
is set aside, as `.damaged`, and the run goes on from the one before it.
"""

import hashlib
import io
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from trainer.files import write_atomically
from trainer.torch_file import TorchFileError, load_state

log = logging.getLogger(__name__)

State = dict[str, Any]

KEPT = 2


class CheckpointError(ValueError):
    """A checkpoint was made by another configuration, or is none; the message is one line."""


class Checkpoints:
    """The checkpoints of one run, in a folder of their own.

    `attempt` counts those that have worked on the run. `before_save` is called before each write; what
    it raises prevents it.
    """

    def __init__(
        self, folder: Path, attempt: int = 1, before_save: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self._attempt, self._before_save = folder, attempt, before_save
        self._last: Path | None = None  # that was saved

    def save(self, epochs: int, step: int, state: State) -> Path:
        """Keep the state after so many epochs and steps, and the one before it."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        name = f"attempt-{self._attempt:04d}-epoch-{epochs:04d}-step-{step:08d}.pt"
        path = self._last = self.folder / name
        with buffer.getbuffer() as data:
            digest = hashlib.sha256(data).hexdigest()
            self._before_save()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            _digest_path(path).unlink(missing_ok=True)  # it would be that of other data for a moment
            write_atomically(path, data)
        write_atomically(_digest_path(path), f"{digest}  {path.name}\n".encode())
        older = [other for other in self._files() if other < path]
        for other in older[: 1 - KEPT]:
            _remove(other)
        return path

    def latest(self) -> State | None:
        """The newest state that is whole; None without one."""
        return next(self.newest_first(), None)

    def newest_first(self) -> Iterator[State]:
        """The states that are whole, on the CPU; what is damaged is set aside.

        Raises CheckpointError for one that is as it was written, and no state.
        """
        for path in reversed(self._files()):
            try:
                data = path.read_bytes()
                expected = _digest_path(path).read_bytes().split()[:1]  # damaged, it may be no text
            except FileNotFoundError:
                continue  # another worker has just replaced it
            if expected == [hashlib.sha256(data).hexdigest().encode()]:
                yield _loaded(path, data)
            else:
                log.warning("%s is damaged; the one before it counts", path)
                with suppress(FileNotFoundError):
                    path.rename(path.with_name(path.name + ".damaged"))
                _remove(path)

    def withdraw(self) -> None:
        """Remove what was saved last: the run had another worker by then."""
        if self._last is not None:
            _remove(self._last)
            with suppress(OSError):  # it has other files
                self.folder.rmdir()

    def clear(self) -> None:
        """Remove all of it, for a trial that is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        """Those that have a digest, the oldest first."""
        return sorted(path.with_suffix("") for path in self.folder.glob("attempt-*.pt.sha256"))

    def _sweep(self) -> None:
        """Remove what a kill in the middle of a save has left, but nothing of a later attempt."""
        bare = set(self.folder.glob("attempt-*.pt")) - set(self._files())
        for leftover in [*self.folder.glob(".attempt-*"), *bare]:
            if leftover.name.removeprefix(".") < f"attempt-{self._attempt + 1:04d}":
                leftover.unlink(missing_ok=True)


def _loaded(path: Path, data: bytes) -> State:
    try:
        return load_state(data)
    except TorchFileError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); go on with the version that made it, or delete it"
        ) from None


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _remove(path: Path) -> None:
    # The digest first: what is left of a kill in between is a file without one, and swept.
    _digest_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)

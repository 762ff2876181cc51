"""Checkpoints that a kill at any moment cannot spoil.

Each is a file of its own, `epoch-0003-step-00000120.pt`, named by the epochs and steps that the run has
finished, with its SHA-256 in a file of the same name and `.sha256` (the form that `sha256sum -c` reads).
Data, then digest, each to a temporary name in the same folder, fsynced and moved into place; only then
the older pair goes. A file without a matching digest is no checkpoint.
"""

import hashlib
import io
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.files import write_atomically

log = logging.getLogger(__name__)

State = dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint was made by another configuration; the message is one line."""


class Checkpoints:
    """The checkpoints of one run, in a folder of their own.

    `before_save` is called before each write; what it raises prevents it.
    """

    def __init__(self, folder: Path, before_save: Callable[[], None] = lambda: None) -> None:
        self.folder, self._before_save = folder, before_save

    def save(self, epochs: int, step: int, state: State) -> Path:
        """Keep the state after so many epochs and steps, then drop the older ones."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getbuffer()
        path = self.folder / f"epoch-{epochs:04d}-step-{step:08d}.pt"
        digest = hashlib.sha256(data).hexdigest()
        self._before_save()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        write_atomically(path, data)
        write_atomically(_digest_path(path), f"{digest}  {path.name}\n".encode())
        for other in self._files():
            if other < path:
                _remove(other)
        return path

    def latest(self) -> State | None:
        """The newest state that is whole, on the CPU; None without one."""
        for path in reversed(self._files()):
            data = _verified(path)
            if data is None:
                log.warning("%s is damaged and does not count", path)
            else:
                state: State = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                return state
        return None

    def clear(self) -> None:
        """Remove all of it, for a trial that is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-*.pt"))

    def _sweep(self) -> None:
        """Remove what a kill in the middle of a save has left."""
        for leftover in self.folder.glob(".epoch-*"):
            leftover.unlink(missing_ok=True)


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _verified(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
        expected = _digest_path(path).read_text().split()[0]
    except (FileNotFoundError, IndexError):
        return None  # killed between the two files, or another worker has just replaced it
    return data if hashlib.sha256(data).hexdigest() == expected else None


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    _digest_path(path).unlink(missing_ok=True)

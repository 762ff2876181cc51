"""Checkpoints that a kill at any moment cannot spoil.

Each is a file of its own, `epoch-0007.pt`, with its SHA-256 in `epoch-0007.pt.sha256` beside it (the
form that `sha256sum -c` reads). Data, then digest, each to a temporary name in the same folder, fsynced
and moved into place; the older pair goes only after that. A file without a matching digest is no
checkpoint: the one before it counts.
"""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

State = dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint was made by another configuration; the message is one line."""


class Checkpoints:
    """The checkpoints of one run, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, epoch: int, state: State) -> Path:
        """Keep the state after `epoch`, then drop the older ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getbuffer()
        path = self.folder / f"epoch-{epoch:04d}.pt"
        digest = hashlib.sha256(data).hexdigest()
        write_atomically(path, data)
        write_atomically(_digest_path(path), f"{digest}  {path.name}\n".encode())
        for old in self._files():
            if old != path:
                _remove(old)
        return path

    def latest(self) -> State | None:
        """The newest state that is whole, on the CPU; None without one."""
        for path in reversed(self._files()):
            data = _verified(path)
            if data is not None:
                state: State = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                return state
        return None

    def clear(self) -> None:
        """Remove all checkpoints, for a trial that is finished."""
        for path in self._files():
            _remove(path)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-*.pt"))


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that a reader, or a crash, sees all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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

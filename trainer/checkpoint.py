"""Write and find checkpoints so that a kill at any moment spoils none. The newest two are kept.

A checkpoint is a file such as `attempt-0001-epoch-0003-step-00000120.pt`. Its name has the attempt that
wrote it, and the epochs and steps that the run had finished. A second file has `.sha256` at the end of
its name, and holds the digest in the form of `sha256sum -c`. Both are written under a temporary name and
moved into place, the digest last. A checkpoint without a digest does not count.

The newest checkpoint is that of the last attempt. So a worker that was replaced cannot write a newer one
than its successor. One older checkpoint is kept. If the newest is damaged, it is renamed to
`.damaged`, and the run goes on from the older one.
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
    """A checkpoint does not fit the configuration or cannot be read. The message is one line."""


class Checkpoints:
    """The checkpoints of one run, in their own folder.

    `attempt` counts the workers that have worked on the run. `before_save` is called before each write.
    It prevents the write by raising an error.
    """

    def __init__(
        self, folder: Path, attempt: int = 1, before_save: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self._attempt, self._before_save = folder, attempt, before_save
        self._last_saved: Path | None = None

    def save(self, epochs: int, step: int, state: State) -> Path:
        """Write the state after so many epochs and steps. Only the latest older checkpoint is kept."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        name = f"attempt-{self._attempt:04d}-epoch-{epochs:04d}-step-{step:08d}.pt"
        path = self._last_saved = self.folder / name
        with buffer.getbuffer() as data:
            digest = hashlib.sha256(data).hexdigest()
            self._before_save()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            _digest_path(path).unlink(missing_ok=True)  # else it would belong to other data for a moment
            write_atomically(path, data)
        write_atomically(_digest_path(path), f"{digest}  {path.name}\n".encode())
        older = [checkpoint for checkpoint in self._files() if checkpoint < path]
        for checkpoint in older[: 1 - KEPT]:
            _remove(checkpoint)
        return path

    def latest(self) -> State | None:
        """The newest undamaged state. None if there is none."""
        return next(self.newest_first(), None)

    def newest_first(self) -> Iterator[State]:
        """The undamaged states, on the CPU. Damaged files are renamed.

        Raises CheckpointError if a file is undamaged but cannot be read as a state.
        """
        for path in reversed(self._files()):
            try:
                data = path.read_bytes()
                # Compared as bytes, because a damaged file may be no text.
                expected = _digest_path(path).read_bytes().split()[:1]
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
        """Remove the last saved checkpoint, because another worker had taken the run by then."""
        if self._last_saved is not None:
            _remove(self._last_saved)
            with suppress(OSError):  # the folder has other files
                self.folder.rmdir()

    def clear(self) -> None:
        """Remove all checkpoints of a finished run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        """The checkpoints that have a digest, the oldest first."""
        return sorted(path.with_suffix("") for path in self.folder.glob("attempt-*.pt.sha256"))

    def _sweep(self) -> None:
        """Remove what a killed save left behind, but nothing of a later attempt."""
        without_digest = set(self.folder.glob("attempt-*.pt")) - set(self._files())
        for leftover in [*self.folder.glob(".attempt-*"), *without_digest]:
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
    # The digest first: a kill in between leaves a file without a digest, which is swept later.
    _digest_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)

"""Write and find checkpoints so that a kill at any moment spoils none. The newest two are kept at most.

A checkpoint is a file such as `attempt-0001-epoch-0003-step-00000120.pt`. Its name has the attempt that
wrote it, and the epochs and steps that the run had finished. A second file has `.sha256` at the end of
its name, and holds the digest in the form of `sha256sum -c`. Both are written under a temporary name and
moved into place, the digest last. A checkpoint without a digest does not count.

Predictions of epochs that have ended do not change. So they are in files of their own, each written
before the first checkpoint that names it: `attempt-0001-predictions-0002-0003.npz` has epochs 2 and 3.
An attempt names only its own files: a worker that was replaced may take its files back.

The newest checkpoint is that of the last attempt. So a worker that was replaced cannot write a newer one
than its successor. One older checkpoint is kept. If the newest is damaged, it is renamed to
`.damaged`, and the run goes on from the older one.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from trainer.files import new_file, write_atomically
from trainer.predictions import Predictions
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
        self.folder, self.attempt, self._before_save = folder, attempt, before_save
        self._last_saved: list[Path] = []
        self._written: dict[str, int] = {}  # files of predictions, with how many epochs each has

    def save(self, epochs: int, step: int, state: State) -> Path:
        """Write the state after so many epochs and steps. Only the latest older checkpoint is kept.

        `state["predictions"]` has an entry for each epoch, or is empty. Raises OSError, and what
        `before_save` raises.
        """
        name = f"attempt-{self.attempt:04d}-epoch-{epochs:04d}-step-{step:08d}.pt"
        path = self.folder / name
        self._before_save()
        self._last_saved = [path]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        self._write_new(state["predictions"])
        _digest_path(path).unlink(missing_ok=True)  # else it would belong to other data for a moment
        with new_file(path) as file:
            digesting = _Digesting(file)
            try:
                torch.save(state | {"predictions": self._written}, cast(BinaryIO, digesting))
            except RuntimeError as error:  # torch's, of an error that it has met in `write`
                raise digesting.error or error from None
        digest = digesting.digest.hexdigest()
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
                state = _loaded(path, data)
                if self._adds_predictions(state):
                    yield state
                    continue
            log.warning("%s is damaged; the one before it counts", path)
            with suppress(FileNotFoundError):
                path.rename(path.with_name(path.name + ".damaged"))
            _remove(path)

    def _write_new(self, predictions: list[Predictions]) -> None:
        """Write the predictions of the epochs that no file has."""
        first = sum(self._written.values())
        if new := predictions[first:]:
            last = len(predictions) - 1
            name = f"attempt-{self.attempt:04d}-predictions-{first:04d}-{last:04d}.npz"
            self._last_saved.append(self.folder / name)
            Predictions.join(new).save(self.folder / name)
            self._written = self._written | {name: len(new)}

    def _adds_predictions(self, state: State) -> bool:
        """Put the predictions of each epoch into a state. False if their files are damaged or gone."""
        names = state.get("predictions")
        if not isinstance(names, dict):  # another version wrote it, which the run will say
            return True
        try:
            parts = [Predictions.load(self.folder / str(name)).split() for name in names]
        except (FileNotFoundError, ValueError):
            return False
        state["predictions"] = [epoch for part in parts for epoch in part]
        return [len(part) for part in parts] == [*names.values()]

    def keep_newest(self) -> None:
        """Remove all but the newest, while the run waits."""
        for checkpoint in self._files()[:-1]:
            _remove(checkpoint)

    def withdraw(self) -> None:
        """Remove the last saved checkpoint, because another worker had taken the run by then."""
        for path in self._last_saved:
            _remove(path)
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
            if leftover.name.removeprefix(".") < f"attempt-{self.attempt + 1:04d}":
                leftover.unlink(missing_ok=True)


class _Digesting:
    """A file that is digested as it is written: a copy in memory would be as large as the state."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None  # the first one

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


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

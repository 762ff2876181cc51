"""Save runs beside their training: when it is due, and from copies that are made between two steps."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import torch

from trainer.checkpoint import Checkpoints, State
from trainer.run import Run


class Snapshot(NamedTuple):
    """A run's state after so many epochs and steps."""

    epochs: int
    step: int
    state: State
    tensors: list[torch.Tensor]  # all that are in the state

    def save(self, checkpoints: Checkpoints) -> None:
        """Write it as a checkpoint. Raises OSError, and what prevents the write."""
        checkpoints.save(self.epochs, self.step, self.state)


class Snapshots:
    """Takes snapshots into memory that is used again: to fill fresh memory takes much longer."""

    def __init__(self) -> None:
        self._free: list[list[torch.Tensor]] = []

    def take(self, run: Run) -> Snapshot:
        """Copy all that the run's next steps change into main memory. Waits for the device."""
        memory = self._free.pop() if self._free else []
        copies: list[torch.Tensor] = []

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            place = memory[len(copies)] if len(copies) < len(memory) else None
            if place is None or _form(place) != _form(tensor):
                # Adam wants its state back in the weights' memory layout, which `like` keeps.
                place = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            copies.append(place.copy_(tensor, non_blocking=True))
            return place

        state = _map(run.state(), copy)
        if run.device.type == "cuda":
            torch.cuda.current_stream(run.device).synchronize()  # other runs go on
        return Snapshot(*run.position, state, copies)

    def free(self, snapshot: Snapshot) -> None:
        """Let another snapshot use the memory."""
        self._free.append(snapshot.tensors)


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _map(tree: Any, function: Any) -> Any:
    """Apply a function to the tensors of nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map(value, function) for key, value in tree.items()}
    return [_map(value, function) for value in tree] if isinstance(tree, list) else tree


class Unsaved:
    """How much work of a run is unsaved, in seconds of this process."""

    def __init__(self, run: Run, most: float) -> None:
        self._run, self._most = run, most
        self._epoch_began = time.monotonic()
        self.reset()

    def is_due(self) -> bool:
        """Whether another epoch would leave too much unsaved. To be asked at the end of each."""
        now = time.monotonic()
        epoch, self._epoch_began = now - self._epoch_began, now
        return now - self._saved + epoch > self._most

    def reset(self) -> None:
        """The run is saved, as it is now."""
        self._saved, self._position = time.monotonic(), self._run.position

    @property
    def is_nothing(self) -> bool:
        """Whether the run has made no step since."""
        return self._position == self._run.position


# Writes something from a snapshot of a run.
Write = Callable[[Snapshot], None]


class Saver:
    """Saves a run from a thread, until the `with` block ends. What is unsaved then is saved.

    One snapshot at a time waits to be written.
    """

    def __init__(self, run: Run, checkpoints: Checkpoints | None, seconds: float) -> None:
        self._run, self._checkpoints = run, checkpoints
        self._unsaved, self._snapshots = Unsaved(run, seconds), Snapshots()
        self._thread = ThreadPoolExecutor(1, "saver")
        self._last: Future[None] | None = None

    def end_epoch(self, write: Write | None) -> None:
        """Save the run if it is due, and write what else there is to write of it.

        Raises the OSError of an earlier write.
        """
        is_due = self._unsaved.is_due() and self._checkpoints is not None
        if self._last is not None and self._last.done():
            self._last.result()
        if is_due or write is not None:
            self._save(write, is_due)

    def _save(self, write: Write | None, with_checkpoint: bool) -> None:
        self._finish_last()
        snapshot = self._snapshots.take(self._run)
        if with_checkpoint:
            self._unsaved.reset()
        self._last = self._thread.submit(self._write, snapshot, write, with_checkpoint)

    def _write(self, snapshot: Snapshot, write: Write | None, with_checkpoint: bool) -> None:
        if write is not None:
            write(snapshot)
        if with_checkpoint and self._checkpoints is not None:
            snapshot.save(self._checkpoints)
        self._snapshots.free(snapshot)

    def _finish_last(self) -> None:
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._thread:
            is_wanted = kind in (None, GeneratorExit) and self._checkpoints is not None
            if is_wanted and not self._unsaved.is_nothing:
                self._save(None, with_checkpoint=True)
            self._finish_last()

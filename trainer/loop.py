"""The training loop: passes of one or more runs over the stream of images, an epoch each.

`train` yields one EpochResult per epoch of a run, and saves the run beside that. `train_epoch` trains
several runs side by side. They share the stream and the trunk's work, and each gets the numbers that it
would get alone. The loop knows nothing of trials, databases or clusters.
"""

import traceback
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress

from trainer.checkpoint import Checkpoints
from trainer.config import CHECKPOINT_SECONDS, TrainConfig
from trainer.device import is_out_of_memory, release_memory
from trainer.metrics import EpochResult
from trainer.pace import Pace
from trainer.run import Run
from trainer.saving import Saver, Write
from trainer.workspace import Workspace

Interrupt = Callable[[Run, float], bool]  # see `train_epoch`
Keep = Callable[[Run, EpochResult], Write | None]  # what to write of a run after an epoch
# What an epoch has brought a run: its result, None if it was interrupted, or an error.
EpochOutcome = EpochResult | Exception | None


def train(
    config: TrainConfig,
    workspace: Workspace,
    checkpoints: Checkpoints | None = None,
    interrupt: Interrupt = lambda *_: False,
    keep: Keep = lambda *_: None,
    stream_epochs: Sequence[int] = (),
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Generator[EpochResult]:
    """Train a run to its end and yield every epoch's result. Raises CheckpointError, OSError.

    With `checkpoints` the run goes on from the latest. It first yields the epochs in that checkpoint,
    so the consumer sees the whole curve. The curve is the same, bit for bit, as without an
    interruption, on one machine with as many threads.

    `stream_epochs` are the epochs of the stream to go through, for a run that began in a pack. The rest
    are those of `finish`.
    """
    run = Run(config, workspace, checkpoints, stream_epochs)
    yield from finish(run, checkpoints, interrupt, keep, checkpoint_seconds)


def finish(
    run: Run,
    checkpoints: Checkpoints | None,
    interrupt: Interrupt = lambda *_: False,
    keep: Keep = lambda *_: None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Generator[EpochResult]:
    """Train a run from where it is to its end, as `train` does. Raises OSError.

    - `interrupt` is that of `train_epoch`. Once it returns True, the iteration ends with a checkpoint
      in the middle of the epoch.
    - `keep` is asked about every new result. What it writes is never older than the checkpoint.
    - At most `checkpoint_seconds` of work are unsaved, or one epoch. Close the iterator when you leave
      it early, to save the rest.
    """
    yield from list(run.history)
    with Saver(run, checkpoints, checkpoint_seconds) as saver:
        while len(run.history) < run.config.epochs:
            [(_, outcome)] = train_epoch([run], interrupt)
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is None:
                break
            saver.end_epoch(keep(run, outcome))
            yield outcome


def train_epoch(
    runs: Sequence[Run], interrupt: Interrupt = lambda *_: False
) -> Iterator[tuple[Run, EpochOutcome]]:
    """Train every run to the end of its epoch, side by side where they can share the stream.

    They go through the first epoch of the stream that none of them has seen. A run that was interrupted
    inside an epoch ends that epoch first.

    `interrupt` is asked after each step of a run, with an estimate of the seconds until the results.
    Once it returns True, all runs stop where they are. An exception from `interrupt` or from a run's own
    step is that run's outcome, and the others go on.
    """
    try:
        groups = _groups(runs)
    except Exception as error:  # of the trunk, which is tried when it is first asked what is kept
        yield from _failed(runs, error)
        return
    interrupted = False
    for group in groups:
        if interrupted:
            yield from ((run, None) for run in group)
            continue
        for run, outcome in _pass_over_stream(group, interrupt):
            interrupted = interrupted or outcome is None
            yield run, outcome


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Group the runs that can share one pass over the stream."""
    groups: dict[object, list[Run]] = defaultdict(list)
    for run in runs:
        alone = id(run) if run.owns_trunk else None
        config = run.config
        groups[config.seed, config.fold, run.block_size, alone, run.bound_stream_epoch].append(run)
    return list(groups.values())


def _pass_over_stream(runs: list[Run], interrupt: Interrupt) -> Iterator[tuple[Run, EpochOutcome]]:
    """Train the runs through one epoch of the stream, or through the rest of it, block by block."""
    release_memory()
    epoch = max(run.next_stream_epoch for run in runs)
    for run in runs:
        run.begin(epoch)
    active, pace, leader = list(runs), Pace(runs), runs[0]
    number = min(run.next_block for run in runs)
    try:
        for features, indices in leader.stream_blocks(epoch, number):
            targets = leader.workspace.train_targets[indices]
            for run, rows in _by_turns(active, number, len(targets)):
                try:
                    run.train_step(features[rows], targets[rows])
                    if interrupt(run, pace.seconds_left()):
                        pace.share_out(active)
                        yield from ((run, None) for run in active)
                        return
                except Exception as error:  # of this run; the others go on
                    active.remove(run)
                    pace.leave_out(run)
                    yield run, _without_tensors(error, run)
            if not active:
                return
            pace.share_out(active)
            number += 1  # not by enumerate, which would keep the block in memory
            del features, targets
    except Exception as error:  # in the shared part
        yield from _failed(active, error)
        return
    for run in list(active):  # a GPU goes on with the others while the host reads the first
        try:
            run.evaluate_epoch()
        except Exception as error:  # of this run; the others go on
            active.remove(run)
            yield run, _without_tensors(error, run)
    yield from ((run, _end_epoch(run)) for run in active)


def _by_turns(active: Sequence[Run], number: int, images: int) -> Iterator[tuple[Run, slice]]:
    """The rows of a block's batches, a batch of each run by turns, as long as the run is active."""
    batches = [(run, run.batches_left(number, images)) for run in active]
    for turn in range(max(len(rows) for _, rows in batches)):
        for run, rows in batches:
            if turn < len(rows) and run in active:
                yield run, rows[turn]


def _failed(runs: Sequence[Run], error: Exception) -> Iterator[tuple[Run, EpochOutcome]]:
    """An error of what the runs share is every run's outcome. The consumer decides what it means.

    But if memory runs out there, the error is only the last run's outcome. The others have none, and
    stay inside their epoch.
    """
    failed = runs[-1:] if is_out_of_memory(error) else runs
    yield from ((run, _without_tensors(error, run)) for run in failed)


def _end_epoch(run: Run) -> EpochOutcome:
    try:
        return run.end_epoch()
    except Exception as error:  # the consumer decides what it means
        return _without_tensors(error, run)


def _without_tensors(error: Exception, run: Run) -> Exception:
    """Release the device memory that the error's traceback and its run hold. Returns the error."""
    traceback.clear_frames(error.__traceback__)
    with suppress(RuntimeError):  # a broken GPU raises everywhere
        run.give_up()
    return error

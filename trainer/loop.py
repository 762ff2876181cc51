"""The training loop: `train(config, workspace)` yields one EpochResult per epoch.

Whoever consumes it decides after each epoch whether to go on; a checkpoint of the epoch is already on
disk by then. Runs can go side by side, through `train_epoch`: they see one stream of images through
one pass of the trunk, and each gets the numbers that it would get alone with that stream. The loop
knows nothing of trials, databases or clusters.
"""

import copy
import itertools
import logging
import math
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from trainer.checkpoint import CheckpointError, Checkpoints, State
from trainer.config import TUNABLE, EpochResult, TrainConfig
from trainer.device import available_memory, is_out_of_memory, peak_memory, release_memory
from trainer.diagnosis import first_not_finite
from trainer.images import READER
from trainer.loss import AttributeLoss, accuracy, class_weights, predict
from trainer.model import make_head
from trainer.predictions import Predictions
from trainer.stream import BLOCK
from trainer.torch_file import reason
from trainer.workspace import Workspace

log = logging.getLogger(__name__)

# Settings that may differ between a checkpoint and the run that goes on from it.
MOVABLE = ("data", "weights")
# Settings in which the runs of one process may differ from its workspace.
OWN = ("seed", *TUNABLE)
FORMAT = 3  # of `Run.state`

# At most so many runs are worth it: the trunk is then a small part, and each epoch takes long.
MOST_SIDE_BY_SIDE = 8
FILLED = 0.9  # of the memory; the rest is for fragments and batches to come

Interrupt = Callable[["Run", float], bool]  # see `train_epoch`
# What a turn has brought a run: an epoch, nothing yet (interrupted), or an error of its own.
Outcome = EpochResult | Exception | None


def learning_rate(position: float, config: TrainConfig) -> float:
    """The rate at `position`, in epochs from the start: linear from 0, then a cosine to 0.

    The schedule always spans `config.epochs`; a pruned trial is a prefix of it.
    """
    if position < config.warmup_epochs:
        return config.lr * position / config.warmup_epochs
    share = (position - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.lr * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def train(
    config: TrainConfig,
    workspace: Workspace,
    checkpoints: Checkpoints | None = None,
    interrupt: Interrupt = lambda *_: False,
    keep: "Callable[[Run, EpochResult], None]" = lambda *_: None,
    stream_epochs: Sequence[int] = (),
) -> Iterator[EpochResult]:
    """Train and yield every epoch's result; with `checkpoints`, go on from the latest.

    A resumed run first yields the epochs that its checkpoint remembers, so the consumer sees the whole
    curve either way, and the curve is the same, bit for bit (on one machine, with as many threads).
    `interrupt` is that of `train_epoch`. Once it returns True the iteration ends, with a checkpoint
    in the middle of the epoch. `keep` is called with every new result before its checkpoint is written,
    so what it keeps is never older. `stream_epochs` are those of a run in a pack, to be gone through
    again.
    Raises CheckpointError if the checkpoint belongs to another configuration.
    """
    run = Run(config, workspace, checkpoints, stream_epochs)
    yield from list(run.history)
    while len(run.history) < config.epochs:
        [(_, outcome)] = train_epoch([run], interrupt)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is not None:
            keep(run, outcome)
        run.save()
        if outcome is None:
            return
        yield outcome


def train_epoch(
    runs: "Sequence[Run]", interrupt: Interrupt = lambda *_: False
) -> "Iterator[tuple[Run, Outcome]]":
    """Train every run to the end of its epoch, side by side where they can share the stream.

    They go through the stream's first epoch after all that any of them has seen; runs that were
    interrupted inside an epoch first end that. `interrupt` is asked after each step of a run, with an
    estimate of the seconds until the results: once it returns True all runs stop where they are. What
    it, or a run's own step, raises is that run's outcome, and the others go on.
    """
    stopped = False
    for group in _side_by_side(runs):
        if stopped:
            yield from ((run, None) for run in group)
            continue
        for run, outcome in _pass(group, interrupt):
            stopped = stopped or outcome is None
            yield run, outcome


def _side_by_side(runs: "Sequence[Run]") -> "list[list[Run]]":
    """The runs by the pass over the stream that they can take together."""
    groups: dict[object, list[Run]] = defaultdict(list)
    for run in runs:
        own = id(run) if run.owns_trunk else None
        groups[run.config.seed, run.block, own, run.bound_stream_epoch].append(run)
    return list(groups.values())


def _pass(runs: "list[Run]", interrupt: Interrupt) -> "Iterator[tuple[Run, Outcome]]":
    """One pass over the stream, or the rest of one.

    An error of what they share is every run's. But if memory runs out it is the last run's alone, and
    the others stay inside their epoch, without an outcome.
    """
    release_memory()
    epoch = max(run.next_stream_epoch for run in runs)
    for run in runs:
        run.begin(epoch)
    active = list(runs)
    try:
        yield from _train_blocks(active, epoch, interrupt)
    except Exception as error:  # for the consumer to judge, like all that follow: it knows the runs
        to_blame = active[-1:] if is_out_of_memory(error) else active
        yield from ((run, _lightened(error, run)) for run in to_blame)
        return
    for run in active:
        try:
            yield run, run.end_epoch()
        except Exception as error:
            yield run, _lightened(error, run)


def _lightened(error: Exception, run: "Run") -> Exception:
    """The error without what its traceback and its run hold of the device's memory."""
    traceback.clear_frames(error.__traceback__)
    run.optimizer.zero_grad(set_to_none=True)
    return error


def _train_blocks(
    active: "list[Run]", epoch: int, interrupt: Interrupt
) -> "Iterator[tuple[Run, Outcome]]":
    """Train to the end of the stream's epoch; a run that gets an outcome leaves `active`."""
    leader, first = active[0], min(run.next_block for run in active)
    pace = _Pace(sum(run.steps_left for run in active), sum(run.evaluation_steps for run in active))
    blocks = leader.workspace.train_blocks(
        leader.runnable_trunk, leader.config.seed, epoch, leader.block, first
    )
    for number, (features, indices) in enumerate(blocks, first):
        for run in list(active):
            try:
                for _ in run.train_block(number, features, indices):
                    if interrupt(run, pace.seconds_left()):
                        pace.share_out(active)
                        while active:
                            yield active.pop(0), None
                        return
            except Exception as error:
                active.remove(run)
                pace.leave_out(run)
                yield run, _lightened(error, run)
        if not active:
            return
        pace.share_out(active)
        del features  # makes room for the next block's


def pack_that_fits(largest: TrainConfig, workspace: Workspace) -> int:
    """How many runs go side by side within the memory, by a step and an evaluation of one of them.

    `largest` is the one that needs the most.
    """
    run = Run(largest, workspace)
    if run.owns_trunk:
        log.info("frozen_batchnorm = 'train': runs share nothing, so one at a time")
        return 1
    [(_, outcome)] = train_epoch([run], lambda *_: True)  # one step
    if isinstance(outcome, Exception):
        raise outcome
    if largest.validates:
        run.evaluate()
    # Weights and two moments; activations and gradients are there once, for one run at a time.
    each = 3 * sum(one.numel() * one.element_size() for one in run.tail.parameters())
    left = FILLED * available_memory(run.device) - peak_memory(run.device)
    return max(min(1 + int(left / each), MOST_SIDE_BY_SIDE), 1)


class Run:
    """One run's own parts: tail, optimizer, generator, position, history.

    With `checkpoints` it begins where the latest one stands that agrees with `stream_epochs`: the epochs
    of the stream that its epochs on record went through. Raises CheckpointError.
    """

    def __init__(
        self,
        config: TrainConfig,
        workspace: Workspace,
        checkpoints: Checkpoints | None = None,
        stream_epochs: Sequence[int] = (),
    ) -> None:
        shared = set(TrainConfig.model_fields) - set(OWN)
        assert all(getattr(config, k) == getattr(workspace.config, k) for k in shared)
        self.config, self.workspace = config, workspace
        self.device = workspace.device
        self._checkpoints, self._stream_epochs = checkpoints, stream_epochs
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        # Batch statistics in the trunk make it a part of the run, and tie blocks to its batches.
        self.owns_trunk = config.frozen_batchnorm == "train"
        self.trunk = copy.deepcopy(workspace.trunk) if self.owns_trunk else workspace.trunk
        self.runnable_trunk = self.trunk if self.owns_trunk else workspace.frozen
        self.block = config.batch_size if self.owns_trunk else _block_size(config.batch_size)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.tail = self._make_tail()
        self.optimizer = torch.optim.Adam(
            self.tail.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        labels = workspace.train_labels[torch.from_numpy(workspace.indices)]
        self.loss = AttributeLoss(
            workspace.sizes,
            class_weights(labels, workspace.sizes).to(self.device),
            config.epsilon,
            config.smoothing,
        )
        self.steps_per_block = self.block // config.batch_size  # of every block but the last
        self.steps_per_epoch = sum(
            math.ceil(min(self.block, len(labels) - start) / config.batch_size)
            for start in range(0, len(labels), self.block)
        )
        self.step = 0  # the schedule's position
        self.stream_epoch: int | None = None  # of the epoch that it is inside
        self.partial = _Partial()
        self.history: list[EpochResult] = []
        self._resume()

    def _resume(self) -> None:
        if not self._checkpoints:
            return
        folder = self._checkpoints.folder
        for state in self._checkpoints.newest_first():
            try:
                if state.get("format") == FORMAT and not self._agrees(state):
                    continue
                self.load(state)
            except CheckpointError as error:
                raise CheckpointError(f"{folder}: {error}") from None
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                if is_out_of_memory(error):
                    raise
                raise CheckpointError(
                    f"{folder}: the checkpoint does not fit the run ({reason(error)}); delete it"
                ) from error
            log.info("goes on after %d epochs, %d steps", len(self.history), self.step)
            return

    def _agrees(self, state: State) -> bool:
        """Whether it went through the epochs of the stream that are on record.

        A worker that was replaced may have gone through others, and saved that after its successor came.
        """
        went = [one["stream_epoch"] for one in state["history"]]
        if state["stream_epoch"] is not None:
            went.append(state["stream_epoch"])
        return all(a == b for a, b in zip(went, self._stream_epochs, strict=False))

    def save(self) -> None:
        """Write a checkpoint, if there is a place for them."""
        if self._checkpoints:
            self._checkpoints.save(len(self.history), self.step, self.state())

    def _make_tail(self) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.seed)
            head = make_head(
                self.workspace.backbone.features,
                sum(self.workspace.sizes),
                self.config.dropout,
                self.generator,
            )
        tail = nn.Sequential(copy.deepcopy(self.workspace.stages), head)
        self.workspace.place(tail).requires_grad_(True)
        if self.config.compile == "network":
            tail[0].compile(dynamic=False)
        return tail

    @property
    def bound_stream_epoch(self) -> int | None:
        """The epoch of the stream that it must go through: it is inside, or goes through it again."""
        done = len(self.history)
        if self.stream_epoch is None and done < len(self._stream_epochs):
            return self._stream_epochs[done]
        return self.stream_epoch

    @property
    def next_stream_epoch(self) -> int:
        """The epoch of the stream that it must go through, else the one after those that it has seen."""
        if self.bound_stream_epoch is not None:
            return self.bound_stream_epoch
        return self.history[-1].stream_epoch + 1 if self.history else 0

    @property
    def _steps_done(self) -> int:
        """In this epoch; more than 0 after an interruption."""
        return self.step - len(self.history) * self.steps_per_epoch

    @property
    def steps_left(self) -> int:
        """In this epoch."""
        return self.steps_per_epoch - self._steps_done

    @property
    def next_block(self) -> int:
        """The number of the block that holds its next step; the last one at the end."""
        return self._steps_done // self.steps_per_block

    @property
    def evaluation_steps(self) -> int:
        """How many training steps take as long as the evaluation, at most: it is forward only."""
        images = len(self.workspace.val_labels) if self.config.validates else 0
        return math.ceil(images / self.config.batch_size)

    def begin(self, stream_epoch: int) -> None:
        """Enter an epoch, or enter it again."""
        self.stream_epoch = stream_epoch
        self.tail.train()
        if self.owns_trunk:
            self.trunk.train()

    def train_block(self, number: int, features: torch.Tensor, indices: torch.Tensor) -> Iterator[None]:
        """Take the steps of a block that are not yet taken; yields after each."""
        steps = zip(
            torch.split(features, self.config.batch_size),
            torch.split(self.workspace.train_targets[indices], self.config.batch_size),
            strict=True,
        )
        taken = max(self._steps_done - number * self.steps_per_block, 0)
        for part, target in itertools.islice(steps, taken, None):
            self.partial.add(*self.train_step(part, target))
            yield

    def end_epoch(self) -> EpochResult:
        """Evaluate and enter the result."""
        assert self.stream_epoch is not None
        started = time.monotonic()
        workspace, partial, sizes = self.workspace, self.partial, self.workspace.sizes
        outputs = [torch.cat(partial.losses), torch.cat(partial.logits)]
        if self.config.validates:
            logits = self.evaluate()
            outputs += [self.loss.of_split(logits, workspace.val_targets).mean(), logits]
        losses, trained, *validated = _to_host(outputs)  # where the host waits for the device
        order = workspace.stream.order(self.config.seed, self.stream_epoch)
        result = EpochResult(
            epoch=len(self.history),
            stream_epoch=self.stream_epoch,
            lr=self.rate(self.step - 1),
            train_loss=float(losses.sum()) / len(order),
            train_accuracy=accuracy(trained, workspace.train_labels[order], sizes).per_class,
            seconds=partial.seconds + time.monotonic() - started,
            images=len(order),
            peak_memory=peak_memory(self.device),
            **(self._validated(*validated) if validated else {}),
        )
        if not result.finite:
            seen = validated[1] if validated else None
            try:
                result = replace(result, cause=first_not_finite(self, losses, trained, seen))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
        self.history.append(result)
        self.partial, self.stream_epoch = _Partial(), None
        return result

    def _validated(self, loss: torch.Tensor, logits: torch.Tensor) -> dict[str, Any]:
        targets, sizes = self.workspace.val_labels, self.workspace.sizes
        valued = accuracy(logits, targets, sizes)
        return {
            "val_loss": float(loss),
            "val_accuracy": valued.per_class,
            "val_overall": valued.overall,
            "val_category": valued.category,
            "val_hits": valued.hits,
            "val_log_loss": valued.log_loss,
            "predictions": predict(logits, targets, sizes),
        }

    def train_step(
        self, features: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on trunk output. Returns detached logits and loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        output = self.workspace.logits(self.tail, features)
        loss = self.loss(output, target)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # now: other runs can use that memory
        self.step += 1
        return output.detach(), loss.detach()

    def rate(self, step: int) -> float:
        """The learning rate of a step of the run, from 0."""
        return learning_rate(step / self.steps_per_epoch, self.config)

    def evaluate(self) -> torch.Tensor:
        """Logits of all validation images, float [images, attributes]."""
        self.tail.eval()
        if self.owns_trunk:
            self.trunk.eval()
        with torch.no_grad():
            parts = self.workspace.val_features(self.runnable_trunk)
            return torch.cat([self.workspace.logits(self.tail, part) for part in parts])

    def state(self) -> State:
        """All that the next epoch depends on, as plain tensors, numbers and strings."""
        return {
            "format": FORMAT,
            "reader": READER,
            "config": self.config.model_dump(),
            "tail": self.tail.state_dict(),
            "trunk": self.trunk.state_dict() if self.owns_trunk else {},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "stream_epoch": self.stream_epoch,
            "partial": vars(self.partial),
            "history": [result.columns() for result in self.history],
            "predictions": [_tensors(result.predictions) for result in self.history],
        }

    def load(self, state: State) -> None:
        """Raises CheckpointError if another configuration, or another version, made the state."""
        if state.get("format") != FORMAT:
            raise CheckpointError(
                f"the checkpoint has format {state.get('format')}, this version reads {FORMAT}; go on "
                "with the version that made it, or delete the checkpoint"
            )
        if (reader := state.get("reader", 1)) != READER:
            raise CheckpointError(
                f"the checkpoint was made with version {reader} of the reader of images, this is "
                f"{READER} (CHANGELOG.md); go on with the Atelier that made it, or delete the checkpoint"
            )
        self._compare(state["config"])
        self.tail.load_state_dict(state["tail"])
        if self.owns_trunk:
            self.trunk.load_state_dict(state["trunk"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.stream_epoch = state["step"], state["stream_epoch"]
        self.partial = _Partial(
            losses=[part.to(self.device) for part in state["partial"]["losses"]],
            logits=[part.to(self.device) for part in state["partial"]["logits"]],
            seconds=state["partial"]["seconds"],
        )
        kept = zip(state["history"], state["predictions"], strict=True)
        self.history = [EpochResult(**values, predictions=_arrays(part)) for values, part in kept]

    def _compare(self, saved: dict[str, object]) -> None:
        mine = self.config.model_dump()
        for key in mine.keys() - set(MOVABLE):
            if saved.get(key) != mine[key]:
                raise CheckpointError(
                    f"the checkpoint was made with {key} = {saved.get(key)!r}, this run has "
                    f"{mine[key]!r}; use the same configuration, or another run folder"
                )


def _tensors(predictions: Predictions | None) -> dict[str, torch.Tensor]:
    """As a checkpoint holds them: loading with `weights_only` knows no NumPy."""
    every = vars(predictions) if predictions else {}
    return {name: torch.from_numpy(array) for name, array in every.items()}


def _arrays(tensors: dict[str, torch.Tensor]) -> Predictions | None:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Predictions(**arrays) if arrays else None


@dataclass
class _Partial:
    """What the running epoch has gathered so far; a checkpoint in its middle holds it."""

    losses: list[torch.Tensor] = field(default_factory=list)  # [1], a step's loss times its images
    logits: list[torch.Tensor] = field(default_factory=list)  # [images of the step, attributes]
    seconds: float = 0.0  # spent before an interruption

    def add(self, logits: torch.Tensor, loss: torch.Tensor) -> None:
        self.losses.append((loss * len(logits)).reshape(1))
        self.logits.append(logits)


class _Pace:
    """How fast a pass goes, to say when it will end. Times are those of this process."""

    def __init__(self, steps: int, evaluation_steps: int) -> None:
        self._left, self._evaluation_steps = steps, evaluation_steps
        self._done = 0
        self._started = self._shared = time.monotonic()

    def seconds_left(self) -> float:
        """To be asked after each step: the estimated seconds until the results."""
        self._left, self._done = self._left - 1, self._done + 1
        pace = (time.monotonic() - self._started) / self._done
        return pace * (self._left + self._evaluation_steps)

    def leave_out(self, run: Run) -> None:
        """Not to wait for a run that has left."""
        self._left -= run.steps_left
        self._evaluation_steps -= run.evaluation_steps

    def share_out(self, runs: list[Run]) -> None:
        """Charge the runs with the time since the last call, in equal parts."""
        now = time.monotonic()
        for run in runs:
            run.partial.seconds += (now - self._shared) / len(runs)
        self._shared = now


def _to_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same float tensors in main memory, in one transfer."""
    whole = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = torch.split(whole, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _block_size(batch_size: int) -> int:
    """The largest multiple of the batch size that fits a block, so that only the last batch is short."""
    return max(BLOCK // batch_size, 1) * batch_size

"""One training run: its state, a step, the end of an epoch, its checkpoint."""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from trainer.checkpoint import CheckpointError, Checkpoints, State
from trainer.config import ARITHMETIC, TUNABLE, Lengthening, TrainConfig
from trainer.device import is_out_of_memory, peak_memory, to_host
from trainer.diagnosis import first_not_finite
from trainer.images import READER
from trainer.loss import AttributeLoss, class_weights
from trainer.metrics import EpochResult, per_class_accuracy, validation_metrics
from trainer.model import make_head
from trainer.steps import Steps
from trainer.stream import BLOCK
from trainer.torch_file import reason
from trainer.workspace import Block, Workspace

log = logging.getLogger(__name__)

# Settings that may differ between a checkpoint and the run that goes on from it.
MOVABLE = ("data", "weights", "graphs")
# Settings that may differ between a run and the workspace of its process.
PER_RUN = ("seed", "epochs", "fold", *TUNABLE)
FORMAT = 4  # of `Run.state`


def learning_rate(position: float, config: TrainConfig) -> float:
    """The rate at `position`, in epochs from the start.

    It rises linearly from 0, and then falls to 0 as a cosine. The schedule always spans
    `config.epochs`. A pruned trial goes through its beginning.
    """
    if position < config.warmup_epochs:
        return config.lr * position / config.warmup_epochs
    share = (position - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.lr * (1 + math.cos(math.pi * min(share, 1.0))) / 2


class Run:
    """What belongs to one run alone: tail, optimizer, generator, position, history.

    `stream_epochs` are the epochs of the stream that the run's recorded epochs went through. With
    `checkpoints` the run goes on from the latest one that agrees with them. Raises CheckpointError.
    """

    def __init__(
        self,
        config: TrainConfig,
        workspace: Workspace,
        checkpoints: Checkpoints | None = None,
        stream_epochs: Sequence[int] = (),
    ) -> None:
        shared = set(TrainConfig.model_fields) - set(PER_RUN)
        assert all(getattr(config, k) == getattr(workspace.config, k) for k in shared)
        self.config, self.workspace = config, workspace
        self.device = workspace.runtime.device
        self._checkpoints, self._stream_epochs = checkpoints, stream_epochs
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        # With batch statistics the trunk belongs to the run, and a block must be one of its batches.
        self.owns_trunk = config.frozen_batchnorm == "train"
        self.trunk = copy.deepcopy(workspace.trunk) if self.owns_trunk else workspace.trunk
        self.runnable_trunk = self.trunk if self.owns_trunk else workspace.frozen
        self.block_size = config.batch_size if self.owns_trunk else _block_size(config.batch_size)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.tail = self._make_tail()
        self._steps = Steps(self.generator, config.graphs == "auto")
        self.optimizer = torch.optim.Adam(
            self.tail.parameters(),
            lr=self._steps.rate,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=True,
        )
        self.images = workspace.division(config)
        labels = workspace.train_labels[self.images.train]
        self.loss = AttributeLoss(
            workspace.sizes,
            class_weights(labels, workspace.sizes).to(self.device),
            config.epsilon,
            config.smoothing,
        )
        self.steps_per_block = self.block_size // config.batch_size  # of every block but the last
        self.steps_per_epoch = sum(
            math.ceil(min(self.block_size, len(labels) - start) / config.batch_size)
            for start in range(0, len(labels), self.block_size)
        )
        self.step = 0  # the schedule's position
        self.stream_epoch: int | None = None  # of the running epoch
        self.partial = PartialEpoch()
        self._began = time.monotonic()  # the running epoch, in this process
        self._ending: Callable[[], list[torch.Tensor]] | None = None  # what `end_epoch` reads
        self.history: list[EpochResult] = []
        self.lengthened: list[Lengthening] = []
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
            log.info("goes on after epoch %d, step %d", len(self.history), self.step)
            return

    def _agrees(self, state: State) -> bool:
        """Whether a checkpoint went through the epochs of the stream that are recorded.

        A worker that was replaced may have gone through other epochs. It may have saved them after its
        successor began.
        """
        epochs = [result["stream_epoch"] for result in state["history"]]
        if state["stream_epoch"] is not None:
            epochs.append(state["stream_epoch"])
        return all(a == b for a, b in zip(epochs, self._stream_epochs, strict=False))

    def _make_tail(self) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.seed)
            head = make_head(
                self.workspace.runtime.backbone.features,
                sum(self.workspace.sizes),
                self.config.dropout,
                self.generator,
            )
        if self.workspace.head is not None:
            head.load_state_dict(self.workspace.head)
        tail = nn.Sequential(copy.deepcopy(self.workspace.stages), head)
        self.workspace.runtime.place(tail).requires_grad_(True)
        return tail

    @property
    def bound_stream_epoch(self) -> int | None:
        """The epoch of the stream that the run must go through next. None if any will do.

        That is the one that it is inside, or that is on record. Else it is its own, if the trunk's
        output of that is kept.
        """
        if self.stream_epoch is not None:
            return self.stream_epoch
        epochs_done = len(self.history)
        if epochs_done < len(self._stream_epochs):
            return self._stream_epochs[epochs_done]
        own, images = self._new_stream_epoch, self.images.train
        return own if self.workspace.keeps(images, self.config.seed, own, self.block_size) else None

    @property
    def next_stream_epoch(self) -> int:
        """The epoch of the stream that the run must go through, else the first that is new to it."""
        bound = self.bound_stream_epoch
        return self._new_stream_epoch if bound is None else bound

    @property
    def _new_stream_epoch(self) -> int:
        return self.history[-1].stream_epoch + 1 if self.history else 0

    @property
    def position(self) -> tuple[int, int]:
        """How many epochs and steps the run has done."""
        return len(self.history), self.step

    @property
    def _steps_done(self) -> int:
        """Steps taken in this epoch. More than 0 after an interruption."""
        return self.step - len(self.history) * self.steps_per_epoch

    @property
    def steps_left(self) -> int:
        """Steps left in this epoch."""
        return self.steps_per_epoch - self._steps_done

    @property
    def next_block(self) -> int:
        """The number of the block that holds the run's next step."""
        return self._steps_done // self.steps_per_block

    @property
    def evaluation_steps(self) -> int:
        """How many training steps the evaluation takes at most. It needs no backward pass."""
        return math.ceil(len(self.images.val) / self.config.batch_size)

    def begin(self, stream_epoch: int) -> None:
        """Enter an epoch, or enter it again."""
        self.stream_epoch, self._began = stream_epoch, time.monotonic()
        self.tail.train()
        if self.owns_trunk:
            self.trunk.train()

    def stream_blocks(self, stream_epoch: int, first: int) -> Iterator[Block]:
        """The trunk's output for an epoch of the stream, from block `first` on."""
        return self.workspace.train_blocks(
            self.runnable_trunk,
            self.images.train,
            self.config.seed,
            stream_epoch,
            self.block_size,
            first,
        )

    def batches_left(self, number: int, images: int) -> list[slice]:
        """The rows of the batches of a block that the run has not yet trained on."""
        size = self.config.batch_size
        trained = max(self._steps_done - number * self.steps_per_block, 0) * size
        return [slice(start, start + size) for start in range(trained, images, size)]

    def train_step(self, features: torch.Tensor, target: torch.Tensor) -> None:
        """One optimizer step on trunk output."""
        logits, loss = self._steps.take(self._compute_step, features, target, self.rate(self.step))
        self.step += 1
        self.partial.losses.append(loss)
        self.partial.logits.append(logits)

    def _compute_step(
        self, features: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and the loss times the images. See `Steps`."""
        try:
            logits = self.workspace.runtime.logits(self.tail, features)
            loss = self.loss(logits, target)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)  # at once: other runs can use the memory
        return logits.detach(), (loss.detach() * len(logits)).reshape(1)

    def give_up(self) -> None:
        """Let no step be under way, and free gradients, after an error."""
        self._steps.join()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def graph_bytes(self) -> int:
        """Bytes of the GPU's memory that the captured steps hold."""
        return self._steps.graph_bytes

    def evaluate_epoch(self) -> None:
        """Evaluate after the epoch's last step. On a GPU this only asks for it, and does not wait."""
        started, partial = time.monotonic(), self.partial
        self._steps.join()
        outputs = [torch.cat(partial.losses), torch.cat(partial.logits)]
        if self.config.validates:
            logits = self.evaluate()
            outputs += [self.loss(logits, self.workspace.val_targets[self.images.val]), logits]
        self._ending = _to_host(outputs)
        partial.seconds += time.monotonic() - started

    def end_epoch(self) -> EpochResult:
        """Append the epoch's result to the history, after `evaluate_epoch`."""
        assert self.stream_epoch is not None
        assert self._ending is not None
        started = time.monotonic()
        workspace, partial, sizes = self.workspace, self.partial, self.workspace.sizes
        losses, trained, *validated = self._ending()  # here the host waits for the device
        val_loss, val_logits = validated or (None, None)
        measured = {}
        if val_loss is not None and val_logits is not None:
            attempt = self._checkpoints.attempt if self._checkpoints else 0
            judged = self.images.val
            labels = workspace.val_labels[judged]
            measured = validation_metrics(val_loss, val_logits, labels, sizes, judged, attempt)
        order = workspace.stream.order(self.images.train, self.config.seed, self.stream_epoch)
        result = EpochResult(
            epoch=len(self.history),
            stream_epoch=self.stream_epoch,
            lr=self.rate(self.step - 1),
            train_loss=float(losses.sum()) / len(order),
            train_accuracy=per_class_accuracy(trained, workspace.train_labels[order], sizes),
            seconds=partial.seconds + time.monotonic() - started,
            images=len(order),
            peak_memory=peak_memory(self.device),
            busy=workspace.utilization.since(self._began),
            **measured,
        )
        if not result.finite:
            result = replace(result, cause=self._cause(losses, trained, val_logits))
        self.history.append(result)
        self.partial, self.stream_epoch, self._ending = PartialEpoch(), None, None
        return result

    def _cause(
        self, losses: torch.Tensor, logits: torch.Tensor, val_logits: torch.Tensor | None
    ) -> str | None:
        """What was not finite first. None if there is too little memory to find out."""
        try:
            return first_not_finite(self, losses, logits, val_logits)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None

    def rate(self, step: int) -> float:
        """The learning rate of a step. Steps count from 0 over the whole run."""
        position, config = step / self.steps_per_epoch, self.config
        for lengthening in reversed(self.lengthened):
            if position < lengthening.position:
                config = config.model_copy(update={"epochs": lengthening.before})
        return learning_rate(position, config)

    def lengthen(self, epochs: int) -> Lengthening:
        """Go on by the schedule of a run of so many epochs. It is longer, so the rate rises."""
        position = self.step / self.steps_per_epoch
        lengthening = Lengthening(before=self.config.epochs, epochs=epochs, position=position)
        self.config = self.config.model_copy(update={"epochs": epochs})
        self.lengthened.append(lengthening)
        return lengthening

    @property
    def init(self) -> str | None:
        """The digest of the model file that the run began with. None if it began with no other run's."""
        return self.workspace.init.digest if self.workspace.init else None

    def evaluate(self) -> torch.Tensor:
        """Logits of all validation images, float [images, attributes]."""
        self._steps.join()
        self.tail.eval()
        if self.owns_trunk:
            self.trunk.eval()
        with torch.no_grad():
            parts = self.workspace.val_features(self.runnable_trunk, self.images.val)
            return torch.cat([self.workspace.runtime.logits(self.tail, part) for part in parts])

    def state(self) -> State:
        """Everything that the next epoch depends on, as plain tensors, numbers and strings.

        Only `predictions` has other objects, which never change: those of each validated epoch.
        """
        self._steps.join()
        return {
            "format": FORMAT,
            "reader": READER,
            "arithmetic": ARITHMETIC,
            "config": self.config.model_dump(),
            "init": self.init,
            "lengthened": [lengthening.model_dump() for lengthening in self.lengthened],
            "tail": self.tail.state_dict(),
            "trunk": self.trunk.state_dict() if self.owns_trunk else {},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "stream_epoch": self.stream_epoch,
            "partial": vars(self.partial),
            "history": [result.columns() for result in self.history],
            "predictions": [result.predictions for result in self.history if result.predictions],
        }

    def load(self, state: State) -> None:
        """Go on from a state. Raises CheckpointError if another configuration or version made it."""
        if state.get("format") != FORMAT:
            raise CheckpointError(
                f"the checkpoint has format {state.get('format')}, this version reads {FORMAT}; go on "
                "with the version that made it, or delete the checkpoint"
            )
        for what, version, here in (
            ("reader of images", state.get("reader", 1), READER),
            ("training's arithmetic", state.get("arithmetic", 1), ARITHMETIC),
        ):
            if version != here:
                raise CheckpointError(
                    f"the checkpoint was made with version {version} of the {what}, this is {here} "
                    "(CHANGELOG.md); go on with the Atelier that made it, or delete the checkpoint"
                )
        self._check_config(state["config"])
        if state.get("init") != self.init:
            advice = "use the same --init" if state.get("init") else "leave out --init"
            raise CheckpointError(
                f"the checkpoint was made with init = {state.get('init')!r}, this run has "
                f"{self.init!r}; {advice}, or give another run folder"
            )
        self.lengthened = [Lengthening(**values) for values in state.get("lengthened", [])]
        self.tail.load_state_dict(state["tail"])
        if self.owns_trunk:
            self.trunk.load_state_dict(state["trunk"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self._steps.rate
        self.generator.set_state(state["generator"])
        self.step, self.stream_epoch = state["step"], state["stream_epoch"]
        self.partial = PartialEpoch(
            losses=[part.to(self.device) for part in state["partial"]["losses"]],
            logits=[part.to(self.device) for part in state["partial"]["logits"]],
            seconds=state["partial"]["seconds"],
        )
        predictions = state["predictions"] or [None] * len(state["history"])
        kept = zip(state["history"], predictions, strict=True)
        self.history = [EpochResult(**values, predictions=part) for values, part in kept]

    def _check_config(self, saved: dict[str, Any]) -> None:
        for key, value in self.config.model_dump().items():
            # A setting that an earlier version did not know had today's default.
            made_with = saved.get(key, TrainConfig.model_fields[key].default)
            if key not in MOVABLE and made_with != value:
                is_longer = key == "epochs" and value > made_with
                raise CheckpointError(
                    f"the checkpoint was made with {key} = {made_with!r}, this run has {value!r}; "
                    f"{'--lengthen makes it longer; else ' if is_longer else ''}"
                    "use the same configuration, or another run folder"
                )


@dataclass
class PartialEpoch:
    """The running epoch's losses and logits so far. A checkpoint inside the epoch holds them."""

    losses: list[torch.Tensor] = field(default_factory=list)  # [1], a step's loss times its images
    logits: list[torch.Tensor] = field(default_factory=list)  # [images of the step, attributes]
    seconds: float = 0.0  # spent so far


def _to_host(tensors: list[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """Copy float tensors to main memory, in one transfer. Returns what waits for it."""
    wait_for_whole = to_host(torch.cat([tensor.flatten() for tensor in tensors]))
    shapes = [tensor.shape for tensor in tensors]

    def copies() -> list[torch.Tensor]:
        parts = torch.split(wait_for_whole(), [shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    return copies


def _block_size(batch_size: int) -> int:
    """The largest multiple of the batch size that fits a block. So only the last batch is short."""
    return max(BLOCK // batch_size, 1) * batch_size

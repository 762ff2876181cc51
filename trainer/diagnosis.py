"""Find what was not finite first, when the loss of an epoch is not finite.

This happens at the epoch's end, from the losses and logits that were kept, so no step becomes slower.
The trunk's output of the one step that matters is read, or computed, again.
"""

import copy
from collections.abc import Sequence
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from trainer.run import Run


class _Finding(NamedTuple):
    what: str
    where: str
    remedy: str


def first_not_finite(
    run: "Run", losses: torch.Tensor, logits: torch.Tensor, val_logits: torch.Tensor | None
) -> str:
    """Say in one line what was not finite, where, and what to do. The run must be at the epoch's end.

    `losses`, float [steps], and `logits`, float [images, attributes], come from the epoch's steps, in
    their order. `val_logits`, float [images, attributes], come from the validation, if there was one.
    """
    steps = torch.nonzero(~losses.isfinite()).flatten().tolist()
    if steps:
        finding = _in_step(run, steps[0], logits)
    elif not losses.sum().isfinite():
        finding = _Finding("the sum of the steps' losses", "in training", _remedy(run, run.step))
    else:
        assert val_logits is not None  # everything else is finite
        finding = _in_validation(run, val_logits)
    return f"first {finding.what}, {finding.where}; {finding.remedy}"


def _in_step(run: "Run", step: int, logits: torch.Tensor) -> _Finding:
    """`step` is the number of the step in the epoch, from 0. `logits` are those of the whole epoch."""
    assert run.stream_epoch is not None
    workspace = run.workspace
    where = f"in step {step + 1} of {run.steps_per_epoch}"
    remedy = _remedy(run, run.step - run.steps_per_epoch + step)
    order = workspace.stream.order(run.images.train, run.config.seed, run.stream_epoch)
    parts = logits, torch.from_numpy(order)
    logits, indices = (torch.split(part, run.config.batch_size)[step] for part in parts)
    if logits.isfinite().all():
        losses = run.loss.by_category(logits.to(run.device), workspace.train_targets[indices])
        return _Finding(_loss_of(run, losses), where, remedy)
    paths = workspace.dataset.split(run.config.train_split).paths
    names = [paths[index] for index in indices.tolist()]
    return _of_trunk(run, _usable(_features(run, step)), names, where) or _Finding(
        _logits_of(run, logits), where, remedy
    )


def _in_validation(run: "Run", logits: torch.Tensor) -> _Finding:
    """`logits` are those of all validation images, after the epoch's last step."""
    workspace = run.workspace
    where, remedy = f"in the validation after step {run.steps_per_epoch}", _remedy(run, run.step)
    if logits.isfinite().all():
        targets = workspace.val_targets[run.images.val]
        losses = run.loss.by_category(logits.to(run.device), targets)
        return _Finding(_loss_of(run, losses), where, remedy)
    features = workspace.val_features(run.runnable_trunk, run.images.val)
    usable = torch.cat([_usable(part) for part in features])
    paths = workspace.dataset.split(run.config.val_split).paths
    if finding := _of_trunk(run, usable, [paths[image] for image in run.images.val], where):
        return finding
    parts = {"weights": run.tail.parameters(), "BatchNorms' running statistics": run.tail.buffers()}
    for name, tensors in parts.items():
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            return _Finding(f"the {name} of the tail", where, remedy)
    return _Finding(_logits_of(run, logits), where, remedy)


def _of_trunk(run: "Run", usable: torch.Tensor, names: Sequence[str], where: str) -> _Finding | None:
    """`usable`, bool [images], says for each of the named images whether its features are finite."""
    broken = list(compress(names, (~usable).tolist()))
    if not broken:
        return None
    if len(broken) == 1:
        remedy = f"look at that image, and mend it or leave it out of the split, or {_numbers(run)}"
        return _Finding(f"the trunk's features of {broken[0]}", where, remedy)
    what = f"the trunk's features of {len(broken)} of {len(names)} images, such as {broken[0]}"
    return _Finding(what, where, f"the trunk learns nothing: {_numbers(run)}")


def _features(run: "Run", step: int) -> torch.Tensor:
    """Compute the trunk's output again, for the images of one step of the epoch."""
    assert run.stream_epoch is not None
    block, within = divmod(step, run.steps_per_block)
    # Of a copy, because training mode changes the running statistics.
    trunk = copy.deepcopy(run.trunk).train() if run.owns_trunk else run.runnable_trunk
    blocks = run.workspace.train_blocks(
        trunk, run.images.train, run.config.seed, run.stream_epoch, run.block_size, block
    )
    features, _ = next(blocks)
    return torch.split(features, run.config.batch_size)[within]


def _remedy(run: "Run", steps: int) -> str:
    """What to do if trained weights overflow after so many steps of the run."""
    if steps and run.rate(steps - 1) > 0:
        return "training diverged: lower lr or weight_decay"
    decay = "lower weight_decay, or " if steps else ""
    return f"the learning rate was 0 until then: {decay}{_numbers(run)}"


def _numbers(run: "Run") -> str:
    return "give other weights" + (", or precision = 'fp32'" if run.workspace.runtime.rounds else "")


def _loss_of(run: "Run", losses: torch.Tensor) -> str:
    """`losses` is float [categories]."""
    return f"the loss of {_categories(run, losses.isfinite())}, while the logits are finite"


def _logits_of(run: "Run", logits: torch.Tensor) -> str:
    parts = torch.split(logits.isfinite().all(0), [*run.workspace.sizes])
    return f"the logits of {_categories(run, torch.stack([part.all() for part in parts]))}"


def _categories(run: "Run", finite: torch.Tensor) -> str:
    """The names of the categories that are not finite. `finite` is bool [categories]."""
    categories = run.workspace.dataset.categories
    names = list(compress(categories, (~finite).tolist()))
    if len(names) in (0, len(categories)):  # 0: only their mean overflows
        return "every category"
    return ("category " if len(names) == 1 else "categories ") + ", ".join(names)


def _usable(features: torch.Tensor) -> torch.Tensor:
    """Whether each image's features are finite: bool [images], in main memory."""
    return features.flatten(1).isfinite().all(1).cpu()

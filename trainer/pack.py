"""How many runs fit side by side into the device's memory."""

import logging

from trainer.config import TrainConfig
from trainer.device import available_memory, peak_memory, wait_for
from trainer.loop import train_epoch
from trainer.run import Run
from trainer.workspace import Workspace

log = logging.getLogger(__name__)

# More runs gain little, because the trunk's share of the work is small by then. And each epoch gets
# slower.
MOST_SIDE_BY_SIDE = 8
FILLED = 0.9  # share of the memory to use; the rest is for fragments and for later batches


def pack_that_fits(largest: TrainConfig, workspace: Workspace) -> int:
    """How many runs fit, after two steps and one evaluation of the run that needs the most memory.

    What the runs leave is for the trunk's output.
    """
    run = Run(largest, workspace)
    if run.owns_trunk:
        log.info("frozen_batchnorm = 'train': runs share nothing, so one at a time")
        return 1
    [(_, outcome)] = train_epoch([run], lambda run, _: run.step == 2)  # the second is a graph
    if isinstance(outcome, Exception):
        raise outcome
    wait_for(run.device)  # before the run goes
    if largest.validates:
        run.evaluate()
    # Each run has weights, Adam's two moments and its graphs. Without graphs, activations and gradients
    # exist for one run at a time.
    weights = sum(weight.numel() * weight.element_size() for weight in run.tail.parameters())
    bytes_per_run = 3 * weights + run.graph_bytes
    first = peak_memory(run.device) + run.graph_bytes
    bytes_left = FILLED * available_memory(run.device) - first
    runs = max(min(1 + int(bytes_left / bytes_per_run), MOST_SIDE_BY_SIDE), 1)
    workspace.store.leave_to_runs(bytes_left - (runs - 1) * bytes_per_run)
    return runs

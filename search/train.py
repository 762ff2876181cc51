"""`atelier train`: one long run, across any number of interruptions."""

import csv
import io
import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dashboards import charts, render
from search.errors import InputError
from search.exit_codes import ExitCode
from search.slurm.job import own_job, seconds_to_kill
from search.stopping import Stop, on_signals
from storage.curves import Curve
from storage.outcome import WALL_TIME
from storage.status import State, TrialRow
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.files import write_atomically
from trainer.loop import train
from trainer.metrics import EpochResult
from trainer.model_file import ModelFiles
from trainer.workspace import Workspace

log = logging.getLogger(__name__)
LOCK_SECONDS = 10  # a requeued job's predecessor may still be ending


def run_to_end(
    config: TrainConfig,
    workspace: Workspace,
    folder: Path,
    facts: Mapping[str, Any],
    show: Callable[[EpochResult], None],
) -> ExitCode:
    """Train, and write a checkpoint wherever it has to stop. `show` gets every epoch's result.

    The folder then has best.safetensors and last.safetensors, which keep `facts`, curve.csv and
    curve.png. Returns why it ended. Raises CheckpointError if the folder has another configuration's
    run, InputError if another process works in it, or if the loss diverges.
    """
    lock = folder / ".lock"
    if folder.exists() and not lock.exists() and any(folder.iterdir()):
        raise InputError(f"--run {folder}: is not empty and not a run's folder; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=LOCK_SECONDS):
            files = ModelFiles(folder, workspace.dataset, facts)
            return _run(config, workspace, folder, files, show)
    except Timeout:
        raise InputError(
            f"{folder}: another atelier train is at work in it; wait for it, or give another --run"
        ) from None


def _run(
    config: TrainConfig,
    workspace: Workspace,
    folder: Path,
    files: ModelFiles,
    show: Callable[[EpochResult], None],
) -> ExitCode:
    job, steps = own_job(), 0
    stop = Stop(job.end if job else None, kill_seconds=seconds_to_kill())

    def interrupt(*_: object) -> bool:
        nonlocal steps
        steps += 1
        if not stop.leaves_time_for(0):
            stop.ask(WALL_TIME, ExitCode.WALL_TIME)
        return stop.requested  # at once: a checkpoint inside an epoch loses nothing

    results = []
    with on_signals(stop):
        with closing(train(config, workspace, Checkpoints(folder), interrupt, files.keep)) as training:
            for result in training:
                results.append(result)
                show(result)
                if not result.finite:
                    # The cause is not in a checkpoint, so it may be unknown here.
                    cause = result.cause or "the log of an earlier start of this run says what it was"
                    what = f"the loss is not finite in epoch {result.epoch + 1}"
                    raise InputError(f"{what}: {cause}; give another --run")
                if stop.requested:
                    break
        if len(results) < config.epochs:
            if stop.end == ExitCode.WALL_TIME and steps and job and job.requeue():
                log.info("requeued: the job goes on where it stopped")
            return ExitCode.INTERRUPTED if stop.reason == "SIGINT" else stop.end
    _write_curve(folder, results)
    return ExitCode.DONE


def _write_curve(folder: Path, results: list[EpochResult]) -> None:
    text = io.StringIO()
    names = [name for name in results[0].columns() if name not in ("val_category", "val_hits")]
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(result.columns() for result in results)
    write_atomically(folder / "curve.csv", text.getvalue().encode())
    curve = Curve(TrialRow(0, State.COMPLETE))
    for result in results:
        curve.add(result.columns())
    drawn = charts.curves([curve], [])
    drawn.legend = []  # there is one line
    render.save(drawn, folder.name, folder / "curve.png")

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
from dashboards.plot import judged
from dashboards.predictions import Judgement
from search.errors import InputError
from search.exit_codes import ExitCode
from search.run_folder import keep_init
from search.slurm.job import own_job, seconds_to_kill
from search.stopping import Stop, on_signals
from storage.curves import Curve
from storage.outcome import WALL_TIME
from storage.status import State, TrialRow
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.files import write_atomically
from trainer.loop import finish
from trainer.metrics import EpochResult
from trainer.model_file import ModelFiles
from trainer.run import Run, learning_rate
from trainer.workspace import Workspace

log = logging.getLogger(__name__)
LOCK_SECONDS = 10  # a requeued job's predecessor may still be ending


def run_to_end(
    config: TrainConfig,
    workspace: Workspace,
    folder: Path,
    facts: Mapping[str, Any],
    show: Callable[[EpochResult], None],
    lengthen: bool = False,
) -> ExitCode:
    """Train, and write a checkpoint wherever it has to stop. `show` gets every epoch's result.

    The folder then has best.safetensors and last.safetensors, which keep `facts`, curve.csv, curve.png,
    confusion.png and errors.png. Returns why it ended. With `lengthen` the folder's run may have begun
    with fewer epochs.

    Raises CheckpointError if the folder has another configuration's run, InputError if another process
    works in it, if there is nothing to lengthen, or if the loss diverges.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--run {folder}: is a file; give a folder")
    lock = folder / ".lock"
    if folder.exists() and not lock.exists() and any(folder.iterdir()):
        raise InputError(f"--run {folder}: is not empty and not a run's folder; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=LOCK_SECONDS):
            files = ModelFiles(folder, workspace.dataset, facts)
            return _run(config, workspace, folder, files, show, lengthen)
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
    lengthen: bool,
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
    checkpoints = Checkpoints(folder)
    with on_signals(stop):
        run = (_lengthened if lengthen else Run)(config, workspace, checkpoints)
        files.check(run)
        if workspace.init:
            keep_init(folder, workspace.init.path, workspace.init.digest)
        with closing(finish(run, checkpoints, interrupt, files.keep)) as training:
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
    _draw_judgement(folder, results, workspace)
    return ExitCode.DONE


def _lengthened(config: TrainConfig, workspace: Workspace, checkpoints: Checkpoints) -> Run:
    """The folder's run, by the configuration's schedule from where it is. Raises InputError.

    It may have that schedule already. Raises CheckpointError if anything but the length differs.
    """
    state = checkpoints.latest()
    if state is None:
        raise InputError(
            f"--lengthen: no checkpoint in {checkpoints.folder}; leave that out, or give another --run"
        )
    epochs = min(state["config"]["epochs"], config.epochs)  # a shorter schedule is refused by the run
    shorter = config.model_copy(update={"epochs": epochs})
    run = Run(shorter, workspace, checkpoints)
    if epochs < config.epochs:
        position = run.lengthen(config.epochs).position
        log.info(
            "lengthened from %d to %d epochs: after %g the rate was %.2e, and it goes on at the longer "
            "schedule's %.2e; an unbroken run of %d epochs %s",
            *(epochs, config.epochs, position),
            *(learning_rate(position, schedule) for schedule in (shorter, config)),
            config.epochs,
            "is the same so far"
            if position <= config.warmup_epochs
            else "is another, with higher rates up to there",
        )
    return run


def _draw_judgement(folder: Path, results: list[EpochResult], workspace: Workspace) -> None:
    """Draw what the best epoch, which is that of best.safetensors, got right and wrong."""
    best = max(results, key=lambda result: result.val_accuracy)
    if best.predictions is None:  # a run without validation
        return
    dataset, split = workspace.dataset, workspace.config.val_split
    names = dict(zip(dataset.categories, dataset.names, strict=True))
    judgement = Judgement(best.predictions, names, split=split)
    title = f"{folder.name}, epoch {best.epoch + 1}"
    # The images are prepared, so their folder may be gone.
    for name, figure in judged(judgement, workspace.config.data).items():
        render.save(figure, title, folder / name)


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

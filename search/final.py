"""`atelier train` and `predict`: one long run across any number of interruptions, and its use."""

import csv
import hashlib
import io
import logging
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from dashboards import charts, render
from dashboards.outputs import check_overwritable, mark
from search.confirm.intervals import Interval, of_hits, of_mean
from search.errors import InputError
from search.exit_codes import ExitCode
from search.slurm.job import own_job
from search.stopping import Stop, on_signals
from search.study import reader_note
from storage.curves import Curve
from storage.status import TrialRow
from trainer.checkpoint import Checkpoints
from trainer.config import EpochResult, TrainConfig
from trainer.dataset import read_dataset, read_labels
from trainer.files import write_atomically
from trainer.images import READER
from trainer.loop import train
from trainer.model_file import ModelFiles, SavedModel
from trainer.workspace import Workspace

log = logging.getLogger(__name__)

LOCK_SECONDS = 10  # a requeued job's predecessor may still be ending


def run_to_end(
    config: TrainConfig, workspace: Workspace, folder: Path, show: Callable[[EpochResult], None]
) -> ExitCode:
    """Train, with a checkpoint wherever it has to stop; `show` is given every epoch.

    The folder then has best.safetensors and last.safetensors, curve.csv and curve.png. Returns why it
    ended. Raises CheckpointError if the folder has another configuration's run, InputError if another
    process works in it, or if the loss diverges.
    """
    lock = folder / ".lock"
    if folder.exists() and not lock.exists() and any(folder.iterdir()):
        raise InputError(f"--run {folder}: is not empty, and no run; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=LOCK_SECONDS):
            return _run(config, workspace, folder, show)
    except Timeout:
        raise InputError(
            f"{folder}: another atelier train is at work in it; wait for it, or give another --run"
        ) from None


def _run(
    config: TrainConfig, workspace: Workspace, folder: Path, show: Callable[[EpochResult], None]
) -> ExitCode:
    job, steps = own_job(), 0
    stop = Stop(job.end if job else None)

    def interrupt(*_: object) -> bool:
        nonlocal steps
        steps += 1
        if not stop.leaves_time_for(0):
            stop.ask("wall time", ExitCode.WALL_TIME)
        return stop.requested  # at once: a checkpoint inside an epoch loses nothing

    results = []
    files = ModelFiles(folder, workspace.dataset)
    with on_signals(stop):
        for result in train(config, workspace, Checkpoints(folder), interrupt, files.keep):
            results.append(result)
            show(result)
            if not result.finite:
                # Of an epoch from a checkpoint the cause is known no more.
                cause = result.cause or "what it was is in what an earlier start of this run said"
                raise InputError(
                    f"the loss is not finite in epoch {result.epoch + 1}: {cause}; give another --run"
                )
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
    curve = Curve(TrialRow(0, "complete"))
    for result in results:
        curve.add(result.columns())
    drawn = charts.curves([curve], [])
    drawn.legend = []  # there is one line
    render.save(drawn, folder.name, folder / "curve.png")


def model_path(run: Path) -> Path:
    """The file to predict with: a finished run's best model, else its last. Raises InputError."""
    if run.suffix == ".toml" and run.with_suffix(".run").is_dir():
        raise InputError(f"{run} is a configuration; its run is {run.with_suffix('.run')}: give that")
    if run.is_file():
        return run
    best, last = run / "best.safetensors", run / "last.safetensors"
    if last.is_file():
        return best if best.is_file() else last
    if best.is_file():
        raise InputError(f"{run}: the run is not finished; go on with atelier train, or name {best}")
    raise InputError(f"{run}: no model in it; give the run folder of a finished: atelier train")


class Predictor:
    """A run's model and the images that it is to look at; `truth` is a file with their labels.

    Raises InputError, DatasetError, ModelError, before anything is computed.
    """

    def __init__(self, run: Path, split: str, data: str | None, truth: Path | None) -> None:
        path = model_path(run)
        self._model = SavedModel(path)
        # The best epoch is that of the validation images.
        chosen = "val" if path.stem == "best" else None
        self.learned_from = split in (*self._model.config.train_on.split("+"), chosen)
        self._dataset = read_dataset(data or self._model.config.data, split.split("+"), labelled=False)
        self._model.check(self._dataset)
        reader = self._model.description.reader
        self.notes = [] if reader == READER else [reader_note("run", reader)]
        self._split = self._dataset.split(split)
        sizes = self._dataset.sizes
        self._truth = read_labels(truth, len(self._split), sizes) if truth else None

    @property
    def source(self) -> str:
        """What tells the run's predictions from those of another configuration."""
        return mark(hashlib.sha256(self._model.config.model_dump_json().encode()).hexdigest()[:16])

    def predict(self, cache: Path, flip: bool) -> np.ndarray:
        """The attributes, int64 [images, categories], in the order of the split's list."""
        return self._model.predict(self._dataset, self._split, cache, flip)

    def scores(self, classes: np.ndarray) -> Mapping[str, Interval]:
        """The accuracies of predictions, the challenge's first; none without the truth."""
        if self._truth is None:
            return {}
        right = classes == self._truth
        return {
            "average per-class accuracy": of_hits(right, self._truth, self._dataset.sizes),
            "overall accuracy": of_mean(right.mean(1)),
            **{
                name: of_mean(column.astype(float))
                for name, column in zip(self._dataset.categories, right.T, strict=True)
            },
        }


def check_submission(output: Path, source: str) -> None:
    """That predictions of this source may be written there. Raises OutputError, OSError."""
    check_overwritable(output, source, "a prediction of this run")


def write_submission(classes: np.ndarray, output: Path, source: str) -> None:
    """The challenge's form: a zip with prediction.txt, a line an image, indices between spaces.

    Its comment is the source.
    """
    text = "".join(" ".join(map(str, row)) + "\n" for row in classes.tolist())
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = source.encode()
        archive.writestr("prediction.txt", text)
    with data.getbuffer() as view:
        write_atomically(output, view)

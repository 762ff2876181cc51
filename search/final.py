"""`atelier train` and `predict`: one long run across any number of interruptions, and its use."""

import csv
import io
import logging
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dashboards import drawing, figures
from dashboards.curves import Curve
from dashboards.status import TrialRow
from search import slurm
from search.bootstrap import Interval, of_hits, of_mean
from search.exit_codes import ExitCode
from search.stopping import Stop, on_signals
from search.study import InputError
from trainer.checkpoint import Checkpoints
from trainer.config import EpochResult, TrainConfig
from trainer.dataset import read_dataset, read_labels
from trainer.files import write_atomically
from trainer.loop import Workspace, train
from trainer.model_file import ModelFiles, SavedModel

log = logging.getLogger(__name__)


def run_to_end(
    config: TrainConfig, workspace: Workspace, folder: Path, show: Callable[[EpochResult], None]
) -> ExitCode:
    """Train, with a checkpoint wherever it has to stop; `show` is given every epoch.

    The folder then has best.safetensors and last.safetensors, curve.csv and curve.png. Returns why it
    ended. Raises CheckpointError if the folder has another configuration's run.
    """
    stop, steps = Stop(slurm.wall_end()), 0

    def interrupt(_: float) -> bool:
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
                raise InputError(f"the loss is not finite in epoch {result.epoch + 1}; lower lr")
            if stop.requested:
                break
        if len(results) < config.epochs:
            if stop.end == ExitCode.WALL_TIME and steps and slurm.requeue_own_job():
                log.info("requeued: the job goes on where it stopped")
            return stop.end
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
    drawn = figures.curves([curve], [])
    drawn.legend = []  # there is one line
    drawing.save(drawn, folder.name, folder / "curve.png")


def model_path(run: Path) -> Path:
    """The file to predict with: a run's best model, else its last. Raises InputError."""
    if run.is_file():
        return run
    for name in ("best", "last"):
        if (run / f"{name}.safetensors").is_file():
            return run / f"{name}.safetensors"
    raise InputError(f"{run}: no model in it; give the run folder of a finished: atelier train")


def predict(
    run: Path, split: str, data: str | None, cache: Path, flip: bool
) -> tuple[np.ndarray, SavedModel]:
    """Predicted attributes of a split, int64 [images, categories], in the order of its list.

    Raises InputError, DatasetError, ModelError.
    """
    model = SavedModel(model_path(run))
    dataset = read_dataset(data or model.config.data)
    return model.predict(dataset, dataset.split(split), cache, flip), model


def write_submission(classes: np.ndarray, output: Path) -> None:
    """The challenge's form: a zip with prediction.txt, a line an image, indices between spaces."""
    text = "".join(" ".join(map(str, row)) + "\n" for row in classes.tolist())
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("prediction.txt", text)
    write_atomically(output, data.getbuffer())


def scores(classes: np.ndarray, labels_file: Path, model: SavedModel) -> Mapping[str, Interval]:
    """The accuracies of predictions whose truth is known, the score first. Raises DatasetError."""
    sizes = model.description.sizes
    labels = read_labels(labels_file, len(classes), tuple(sizes))
    right = classes == labels
    return {
        "average per-class accuracy": of_hits(right, labels, sizes),
        "overall accuracy": of_mean(right.mean(1)),
        **{
            name: of_mean(column.astype(float))
            for name, column in zip(model.description.categories, right.T, strict=True)
        },
    }

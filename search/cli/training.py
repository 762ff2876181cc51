"""What the verbs do that need PyTorch: work, train, replay, predict, export_model and print_stages."""

import logging
import multiprocessing
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import sqlalchemy as sa
import typer

from dashboards.terminal import Grid, console, say
from search import pictures
from search import predict as prediction
from search.cli.options import AUTO, say_each
from search.confirm.evidence import gains_nothing
from search.confirm.plan import ConfirmationFile
from search.exit_codes import ExitCode
from search.export import Bundle, check_origin
from search.json_output import print_json
from search.model_card import facts_of
from search.model_folder import ModelFolder
from search.replay import replay as replay_epochs
from search.slurm.job import own_job
from search.slurm.queue import probe_liveness
from search.study import open_study
from search.study_config import StudyConfig, weights_identity
from search.train import run_to_end
from search.worker import Worker
from storage import database, roles, schema
from storage.ledger import Ledger
from storage.outcome import NOTHING_LEFT
from storage.ownership import with_users_umask
from storage.paths import RunFolder, image_cache
from storage.studies import StudyEntry, agree_on_trunk
from storage.words import counted
from trainer.config import TrainConfig
from trainer.dataset import DatasetError, read_dataset
from trainer.device import prepare_process
from trainer.division import absent_attributes
from trainer.feature_places import places
from trainer.metrics import EpochResult
from trainer.model import stage_table
from trainer.model_file import SavedModel
from trainer.pack import pack_that_fits
from trainer.workspace import Init, Workspace

CHALLENGE_ATTRIBUTES = 26

log = logging.getLogger(__name__)


def work(config: StudyConfig, pack: str | None) -> None:
    """Run one worker. `pack` is the option of that name. Raises typer.Exit."""
    prepare_process()
    workspace = Workspace(config.shared, image_cache(), None, config.batch_sizes, places)
    with closing(workspace):
        work_in(workspace, config, pack)


def work_in(workspace: Workspace, config: StudyConfig, pack: str | None) -> None:
    """Run one worker in a workspace of its study. Raises typer.Exit."""
    job = own_job()
    owner = database.connect(patience=database.PATIENCE)
    schema.ensure_tables(owner)
    engine, storage, _ = roles.for_worker(owner)
    owner.dispose()
    study, entry = open_study(config, engine, storage, workspace.dataset)
    if config.study.max_trials != entry.max_trials:
        log.warning(
            "the study has max_trials = %d on record, the file says %d: search or submit changes it",
            entry.max_trials,
            config.study.max_trials,
        )
    workspace.agree(partial(agree_on_trunk, engine, entry.study_id))
    columns = job.columns() if job else None
    ledger = Ledger(engine, storage, entry.study_id, probe_liveness=probe_liveness, job=columns)
    runs = RunFolder(entry.name, entry.created).make()
    at_once = _trials_at_once(pack, config, workspace)
    log.info("trials at once: %d", at_once)
    worker = Worker(config, study, ledger, workspace, runs, job.end if job else None, at_once)
    if isinstance(config, ConfirmationFile):
        worker.claims.rules_out = lambda params: gains_nothing(engine, entry.name, params["candidate"])
    if job and multiprocessing.parent_process() is None:  # else the search owns the task
        worker.requeue = job.requeue
    end = worker.run()
    log.info("worker ended: %s", worker.stop.reason or NOTHING_LEFT)
    if end == ExitCode.WALL_TIME and not worker.made_progress:
        say("error: the wall time is too short for a single step; ask for more in [slurm.*]")
        raise typer.Exit(ExitCode.FAILED)
    raise typer.Exit(end)


def _trials_at_once(pack: str | None, config: StudyConfig, workspace: Workspace) -> int:
    """What is fastest, unless a number is given: on a GPU a pack, on a CPU one trial."""
    if pack == AUTO or (pack is None and workspace.device.type == "cuda"):
        return pack_that_fits(config.largest, workspace)
    return int(pack or 1)


def train(
    bundle: Bundle,
    config: TrainConfig,
    folder: Path,
    notes: list[str],
    lengthen: bool,
    init: Path | None,
) -> ExitCode:
    """Train to the end, or until asked to stop, and print every epoch.

    `init` is the model file that the run begins with.
    """

    def show(result: EpochResult) -> None:
        validated = (
            f"val loss {result.val_loss:.4f} acc {result.val_accuracy:.4f} "
            f"(overall {result.val_overall:.4f})  "
        )
        typer.echo(
            f"epoch {result.epoch + 1}/{config.epochs}  lr {result.lr:.2e}  "
            f"train loss {result.train_loss:.4f} acc {result.train_accuracy:.4f}  "
            f"{validated if result.validated else ''}{result.seconds:.1f} s"
        )

    prepare_process()
    begins = _read_init(init) if init else None
    workspace = Workspace(config, image_cache(), batch_sizes=[config.batch_size], init=begins)
    check_origin(bundle, config, workspace.dataset.fingerprint)
    say_each(notes)
    if init and workspace.head is None:
        say(f"note: {init} has learned other attributes, so the head is new")
    absent = absent_attributes(workspace.attributes)
    say_each([f"note: {line}" for line in absent])
    with with_users_umask():
        facts = facts_of(bundle, config, workspace.dataset).model_dump()
        return run_to_end(config, workspace, folder, facts, show, lengthen)


def _read_init(path: Path) -> Init:
    """Read the model file that a run begins with. Raises ModelError."""
    digest = weights_identity(str(path))  # first: `keep_init` finds that all was read from one file
    model = SavedModel(path)
    say_each(prediction.reader_notes(model))
    return Init(path, digest, tuple(model.description.attributes), model.head)


def replay(
    engine: sa.Engine, entry: StudyEntry, config: StudyConfig, trial: int, as_json: bool
) -> tuple[int, int]:
    """Train a trial again and print every epoch. Returns how many epochs differ, and of how many."""
    prepare_process()
    epochs = []
    for epoch in replay_epochs(engine, entry, config, trial, image_cache()):
        recorded, again = epoch.recorded, epoch.again
        facts = {
            "epoch": again.epoch,
            "stream_epoch": again.stream_epoch,
            "recorded": recorded["val_accuracy"],
            "again": again.val_accuracy,
            "differing": epoch.differing,
        }
        epochs.append(facts)
        if not as_json:
            typer.echo(
                f"epoch {again.epoch + 1:>3} (stream {again.stream_epoch + 1:>3})  "
                f"recorded {recorded['val_accuracy']:.6f}  again {again.val_accuracy:.6f}  "
                f"{'other: ' + ', '.join(epoch.differing) if epoch.differing else 'equal'}"
            )
    if as_json:
        print_json(study=entry.name, trial=trial, epochs=epochs)
    return sum(bool(epoch["differing"]) for epoch in epochs), len(epochs)


def predict(
    run: Path, split: str, output: Path, truth: Path | None, flip: bool, data: str | None
) -> None:
    """Predict a split's attributes into a file; print accuracies where the true labels are given."""
    prepare_process()
    predictor = prediction.Predictor(run, split, data, truth)
    say_each(predictor.notes)
    prediction.check_submission(output, predictor.source)
    classes = predictor.predict(image_cache(), flip)
    with with_users_umask():
        prediction.write_submission(classes, output, predictor.source)
    say(f"predicted {counted(len(classes), 'image')} of {split}, in the order of its list, in {output}")
    if truth and predictor.learned_from:
        say(f"note: the run learned from, or was chosen by, the images of {split}")
    for name, accuracy in predictor.scores(classes).items():
        typer.echo(f"{name:<27}{accuracy.value:.4f}  95 %: {accuracy.low:.4f} to {accuracy.high:.4f}")


def predict_pictures(run: Path, words: list[str], output: Path, flip: bool) -> None:
    """Predict pictures into a table. Raises typer.Exit if none of them can be read."""
    prepare_process()
    found = pictures.find_pictures(words, sys.stdin)
    predictor = pictures.PicturePredictor(run)
    say_each(predictor.notes)
    pictures.check_table(output, predictor.categories)
    predictions = list(predictor.predict(found, flip))
    with with_users_umask():
        pictures.write_table(predictions, output, predictor.categories)
    broken = [one.error for one in predictions if one.error]
    say(f"predicted {len(found) - len(broken)} of {counted(len(found), 'picture')}, in {output}")
    if broken:
        kind = "error" if len(broken) == len(found) else "warning"
        say(f"{kind}: {len(broken)} cannot be read, their lines say why; the first: {broken[0]}")
    if len(broken) == len(found):
        raise typer.Exit(ExitCode.FAILED)


def export_model(run: Path, output: Path, onnx: bool) -> None:
    """Write a run's model for programs without Atelier."""
    prepare_process()
    folder = ModelFolder(run, output, onnx)
    say_each(folder.notes)
    with with_users_umask():
        folder.write()
    say(f"the model is in {output}: {', '.join(folder.files)}")


def print_stages(config: TrainConfig, as_json: bool) -> None:
    """Print the network's stages with parameters and multiply-adds, and which are trained."""
    try:
        outputs = len(read_dataset(config.data, labelled=False).attributes)
    except DatasetError:
        outputs = CHALLENGE_ATTRIBUTES
        say(f"note: no dataset at hand, so the head has the challenge's {outputs} attributes")
    rows = stage_table(config, outputs)
    if as_json:
        print_json(backbone=config.backbone, stages=rows)
        return
    table = Grid(("stage", "", "parameters", "multiply-adds"), left=("stage", ""), gap=2)
    for row in rows:
        kind = "trained" if row.trained else "frozen"
        table.add(row.name, kind, f"{row.parameters:,}", f"{row.multiply_adds:,}")
    for kind, trained in (("trained", True), ("frozen", False)):
        parameters = sum(row.parameters for row in rows if row.trained is trained)
        operations = sum(row.multiply_adds for row in rows if row.trained is trained)
        table.add("total", kind, f"{parameters:,}", f"{operations:,}", style="bold")
    console().print(table)

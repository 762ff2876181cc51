"""The verbs that use what a search found: from export and train to predict and export-model."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import sqlalchemy as sa
import typer

from dashboards.outputs import check_output
from dashboards.predictions import PredictionsError
from dashboards.terminal import say
from search.cli.finding import Study, StudyName, command, find_study
from search.cli.options import (
    Data,
    DryRun,
    Output,
    Profile,
    Set,
    Submit,
    Weights,
    file_or_recorded,
    find_search,
    goes_to_slurm,
    print_script,
    recorded_study,
    say_each,
    with_torch,
)
from search.confirm.evidence import read_confirmation
from search.doctor.look import about_jobs
from search.errors import InputError
from search.exit_codes import ExitCode
from search.export import (
    Bundle,
    changed,
    check_export,
    choose,
    export_trial,
    find_trial,
    in_words,
    known_accuracy,
    load_bundle,
)
from search.json_output import AsJson
from search.run_folder import init_path
from search.slurm.logs import log_folder
from search.slurm.script import run_script
from search.slurm.submit import submit_run
from storage.ownership import with_users_umask
from storage.paths import home
from storage.status import State, difference_line, read_status
from storage.studies import StudyEntry, job_in_words, split_job
from storage.words import counted
from trainer.config import TrainConfig

PROFILE = "final"
TrainedRun = Annotated[
    Path, typer.Argument(help="Run folder of `atelier train`, or a .safetensors file.")
]


def export(
    study: StudyName,
    output: Output = Path("best.toml"),
    trial: Annotated[int | None, typer.Option(help="This trial instead of the best.")] = None,
) -> None:
    """Write the configuration that a confirmation names, or of the best trial, for `atelier train`."""
    engine, entry = find_search(study)
    check_export(output, entry.name)
    export_best(engine, entry, trial, output)


def export_best(engine: sa.Engine, entry: StudyEntry, trial: int | None, output: Path) -> None:
    """Write the configuration of this trial, else of what a confirmation names, else of the best."""
    status = read_status(engine, entry.study_id, entry.name)
    try:
        confirmation = read_confirmation(engine, entry, status)
    except PredictionsError:
        if trial is None:
            raise
        confirmation = None  # a trial that the user names needs no evidence
    choice = choose(status, confirmation, trial)
    row = choice.row
    accuracy = known_accuracy(entry, row, confirmation)
    with with_users_umask():
        export_trial(engine, entry, choice, accuracy, output)
    value = f"score {row.value:.4f}" if row.state == State.COMPLETE else row.state
    warning = "warning: " if choice.standing == "unconfirmed" else ""
    say(f"{warning}trial {row.number} ({value}) is {choice.words}")
    if line := difference_line([row]):
        say(f"note: {line}")
    if accuracy:
        say(f"its average per-class accuracy is {in_words(accuracy)}")
    elif row.state == State.COMPLETE:
        say(
            "note: its accuracy has no interval, since its predictions are not in ATELIER_HOME "
            f"({home()})"
        )
    say(f"it is in {output}; train it with: {command('train', str(output))}")


def report(
    study: StudyName,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the pages.")] = Path(
        "report"
    ),
) -> None:
    """Write a study's results with figures as one page, in Markdown and in HTML."""
    engine, entry = find_search(study)
    from search.report import write_report  # late: with torch, for the table of the stages

    with with_users_umask():
        page = write_report(engine, entry, output)
    say(f"the report is {page}, and report.md beside it")


def train(
    config: Annotated[Path, typer.Argument(help="Configuration, as `atelier export` writes it.")],
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Number of epochs; the warm-up keeps its length.")
    ] = None,
    stretch_warmup: Annotated[
        bool, typer.Option("--stretch-warmup", help="With --epochs: scale the warm-up with it.")
    ] = False,
    warmup_epochs: Annotated[int | None, typer.Option(min=0, help="Epochs of warm-up.")] = None,
    train_on: Annotated[
        str | None, typer.Option(help="train, or train+val for the final run, without validation.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder; default: CONFIG.run.")] = None,
    lengthen: Annotated[
        bool, typer.Option("--lengthen", help="Go on with a run that has fewer epochs.")
    ] = False,
    init: Annotated[
        Path | None, typer.Option(help="Begin with the weights of another run: its folder.")
    ] = None,
    submit: Submit = False,
    profile: Profile = None,
    dry_run: DryRun = False,
    data: Data = None,
    weights: Weights = None,
) -> None:
    """Train one configuration to its end. The same command resumes an interrupted run."""
    changes = {
        "epochs": epochs,
        "warmup_epochs": warmup_epochs,
        "train_on": train_on,
        "data": data,
        "weights": weights,
    }
    bundle = load_bundle(config)
    folder = run or config.with_suffix(".run")
    if lengthen and not folder.is_dir():
        raise InputError(f"--lengthen: no run in {folder}; leave that out, or give another --run")
    options = changes | {"run": folder.absolute(), "init": init and init.absolute()}
    if init:
        bundle, init = _without_weights(bundle, weights), init_path(folder, init)
    settings, notes = changed(bundle, changes, config, stretch_warmup)
    if init:
        notes.append(
            f"note: it begins with the weights of {init}; optimizer and schedule begin anew, with a "
            f"warm-up of {settings.warmup_epochs} to a rate of {settings.lr:g}"
        )
    if goes_to_slurm(submit, dry_run, profile=profile):
        given = {key: value for key, value in options.items() if value is not None}
        words = [w for k, v in given.items() for w in (f"--{k.replace('_', '-')}", str(v))]
        words += ["--stretch-warmup"] * stretch_warmup + ["--lengthen"] * lengthen
        arguments = [*words, "--", str(config.absolute())]
        _submit_run(bundle, settings, arguments, PROFILE if profile is None else profile, dry_run, notes)
        return
    end = with_torch().train(bundle, settings, folder, notes, lengthen, init)
    if end != ExitCode.DONE:
        say("not finished; the same command continues it")
        raise typer.Exit(end)
    say(f"the run is in {folder}; predict with: {command('predict', str(folder))}")


def _without_weights(bundle: Bundle, weights: str | None) -> Bundle:
    """The bundle for a run that begins with another run's weights. Raises InputError."""
    if weights is not None:
        raise InputError(f"--init and --weights {weights} are two sources of weights; give one of them")
    config = bundle.config.model_copy(update={"weights": "none"})
    origin = {key: value for key, value in bundle.origin.items() if key != "weights"}
    return replace(bundle, config=config, origin=origin)


def _submit_run(
    bundle: Bundle,
    settings: TrainConfig,
    arguments: list[str],
    profile: str,
    dry_run: bool,
    notes: list[str],
) -> None:
    """Submit `atelier train` with these arguments, or print its script."""
    if dry_run:
        print_script(run_script(settings, bundle.slurm, profile, arguments))
        return
    job = submit_run(bundle, settings, profile, arguments)
    say_each([*about_jobs(), *notes])
    log = log_folder() / f"train-{split_job(job)[0]}.log"
    typer.echo(f"job {job_in_words(job)}; its log is {log}")


def replay(
    study: StudyName,
    trial: Annotated[int, typer.Option(min=0, help="The trial's number.")],
    data: Data = None,
    weights: Weights = None,
    as_json: AsJson = False,
) -> None:
    """Train a trial again, alone, as far as it was recorded, and compare every number.

    Exit codes: 0 all are equal, 1 some differ.
    """
    engine, entry = find_study(study)
    config = recorded_study(entry, data, weights)
    differing, epochs = with_torch().replay(engine, entry, config, trial, as_json)
    if differing:
        row = find_trial(read_status(engine, entry.study_id, entry.name), trial)
        if line := difference_line([row]):
            say(f"note: {line}")
        say(
            f"{differing} of {counted(epochs, 'epoch')} differ; the same machine, with as many threads "
            "(OMP_NUM_THREADS), gives the same"
        )
        raise typer.Exit(ExitCode.FAILED)
    say(f"the numbers of {counted(epochs, 'epoch')} are equal, bit for bit")


def predict(
    run: TrainedRun,
    pictures: Annotated[
        list[str] | None,
        typer.Argument(help="Pictures, folders of them, or - for a list on standard input."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Images of the dataset: test, val or train; default: test.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Default: prediction.csv (or .jsonl); of a split .zip."),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="File of the true labels, to print accuracies.")
    ] = None,
    tta: Annotated[str, typer.Option(help="none, or flip: average with the mirror image.")] = "none",
    data: Data = None,
) -> None:
    """Predict attributes with a run's best model: of pictures, or of a split of the dataset.

    Pictures get a table with names and probabilities, a split the challenge's form.
    """
    if tta not in ("none", "flip"):
        raise InputError(f"--tta {tta!r}: allowed are none and flip")
    if pictures and (split or scores or data):
        raise InputError(
            "--split, --scores and --data are of a dataset; leave them out, or the pictures"
        )
    output = output or Path("prediction.csv" if pictures else "prediction.zip")
    check_output(output)
    if pictures:
        with_torch().predict_pictures(run, pictures, output, tta == "flip")
    else:
        with_torch().predict(run, split or "test", output, scores, tta == "flip", data)


def export_model(
    run: TrainedRun,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the files.")] = Path("model"),
    to: Annotated[str | None, typer.Option(help="onnx: write a model.onnx too.")] = None,
) -> None:
    """Write a run's best model under timm's own names, with its configuration and a model card."""
    if to not in (None, "onnx"):
        raise InputError(f"--to {to!r}: allowed is onnx, or leave it out")
    with_torch().export_model(run, output, to == "onnx")


def model(
    study: Study,
    data: Data = None,
    weights: Weights = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Print the network's stages with parameters and multiply-adds, and which are trained."""
    config = file_or_recorded(study, data, weights, set_)
    with_torch().print_stages(config.shared, as_json)

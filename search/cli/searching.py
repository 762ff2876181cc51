"""The verbs that train trials: demo, search, worker and confirm."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import sqlalchemy as sa
import typer

from dashboards.study_tables import surplus_line
from dashboards.terminal import console, say
from search.cli import main
from search.cli.finding import Study, StudyName, command
from search.cli.options import (
    Array,
    Data,
    DryRun,
    Output,
    Pack,
    Profile,
    Set,
    StudyPath,
    Submit,
    Weights,
    Workers,
    check_pack,
    file_or_recorded,
    find_search,
    goes_to_slurm,
    load_study,
    pack_here,
    with_torch,
    worker_options,
    workers_here,
)
from search.cli.submitting import submit_workers
from search.cli.winning import export_best
from search.confirm.evidence import WINNING_IMAGES, rarest, read_confirmation
from search.confirm.plan import plan_confirmation
from search.confirm.table import no_winner, render
from search.errors import InputError
from search.exit_codes import ExitCode
from search.export import check_export
from search.json_output import AsJson, print_json
from search.local import LocalSearch
from search.preflight import preflight
from search.study import lead_study
from search.study_config import StudyConfig
from search.toml_file import READY
from storage import database
from storage.embedded import EmbeddedPostgres
from storage.ownership import with_users_umask
from storage.paths import RunFolder, home
from storage.postgres_programs import EmbeddedPostgresError
from storage.status import State, Status, read_status
from storage.studies import StudyEntry
from storage.words import counted
from trainer.config import MOST_FOLDS
from trainer.dataset import Dataset
from trainer.demo import write_demo


def demo(
    folder: Annotated[Path, typer.Argument(help="Folder of the drawn pictures.")] = Path("demo-data"),
    workers: Workers = None,
    output: Output = Path("best.toml"),
    set_: Set = None,
) -> None:
    """Draw a small dataset, search it with the ready demo.toml, and say what to type next.

    The same command resumes an interrupted search. A folder that has pictures is searched as it is.
    """
    load_study(READY / "demo.toml", None, None, set_)  # what is wrong is said before pictures are drawn
    if not (folder.is_dir() and any(folder.iterdir())):
        with with_users_umask():
            write_demo(folder)
        say(f"the pictures are in {folder}")
    search(READY / "demo.toml", workers, output, data=str(folder), set_=set_)
    run = output.with_suffix(".run")
    say(f"predict with what is trained: {command('predict', str(run), '-o', 'prediction.zip')}")


def search(
    study: StudyPath,
    workers: Workers = None,
    output: Output = Path("best.toml"),
    pack: Pack = None,
    data: Data = None,
    weights: Weights = None,
    set_: Set = None,
) -> None:
    """Run a whole search on this machine. The same command resumes an interrupted search."""
    config = load_study(study, data, weights, set_)
    check_export(output, config.study.name)
    workers = workers_here(workers)
    pack = pack_here(pack, workers)
    arguments = [str(study), *worker_options(data, weights, set_, pack)]
    dataset = preflight(config)
    engine = database.connect()
    local, entry = _run_here(config, dataset, engine, workers, arguments)
    status = local.status()
    if status.best is not None:
        export_best(engine, entry, None, output)
        if failed := status.counts[State.FAILED]:
            say(f"{counted(failed, 'trial')} failed; see why with: {command('logs', entry.name)}")
    if status.surplus:
        say(surplus_line(status))
    if status.budget_spent and not local.interrupted:
        say(
            f"the budget of {status.max_gpu_hours:g} GPU-hours is spent, and unfinished trials are "
            "pruned; raise study.max_gpu_hours to train more"
        )
    elif not status.has_ended:
        say("not finished; the same command continues it")
        raise typer.Exit(_unfinished(local))
    elif status.best is None:
        say(f"error: no trial was completed; see why with: {command('logs', entry.name)}")
        raise typer.Exit(ExitCode.FAILED)
    else:
        say(f"see it in the browser with: {command('dashboard')}")
        say(f"see whether it was luck with: {command('confirm', entry.name)}")


def _run_here(
    config: StudyConfig, dataset: Dataset, engine: sa.Engine, workers: int, arguments: list[str]
) -> tuple[LocalSearch, StudyEntry]:
    """Open a study and run workers with these arguments on this machine until they end."""
    entry = lead_study(config, engine, dataset)
    runs = RunFolder(entry.name, entry.created).make()
    say(f"study {entry.name!r} starts workers: {workers}; their logs are in {runs.logs}")

    def status() -> Status:
        return read_status(engine, entry.study_id, entry.name)

    local = LocalSearch(work, arguments, workers, runs, status, console())
    local.run()
    return local, entry


def work(arguments: list[str]) -> None:
    """Run `atelier worker` with these arguments, in a process that was forked for it."""
    try:
        main(["worker", *arguments])
    finally:
        # A process of multiprocessing runs no atexit function, which would do this otherwise.
        with suppress(EmbeddedPostgresError):  # the exit code says more
            EmbeddedPostgres(home()).release()


def _unfinished(local: LocalSearch) -> ExitCode:
    return ExitCode.INTERRUPTED if local.interrupted else ExitCode.STOPPED


def worker(
    study: Study,
    pack: Pack = None,
    data: Data = None,
    weights: Weights = None,
    set_: Set = None,
) -> None:
    """Run one worker: what a SLURM array task runs.

    Exit codes: 0 nothing left to do, 3 asked to stop, 4 out of wall time (and requeued).
    """
    config = file_or_recorded(study, data, weights, set_)
    check_pack(pack)
    with_torch().work(config, pack)


def confirm(
    study: StudyName,
    top: Annotated[
        int | None, typer.Option(min=1, max=1000, help="How many of the best trials; default: 5.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Fresh seeds for each; default: 5, in each fold 1."),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=MOST_FOLDS,
            help="Validate on all images of train and val: cut them into so many folds.",
        ),
    ] = None,
    within: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Points: train no more once a candidate is known to be so near the best; 0: never.",
        ),
    ] = None,
    workers: Workers = None,
    show: Annotated[
        bool, typer.Option("--show", help="Train nothing; show the results so far.")
    ] = False,
    as_json: AsJson = False,
    submit: Submit = False,
    array: Array = None,
    profile: Profile = None,
    dry_run: DryRun = False,
    pack: Pack = None,
    data: Data = None,
    weights: Weights = None,
) -> None:
    """Rerun the best trials on fresh seeds or folds; say which one to take and how sure that is."""
    to_slurm = goes_to_slurm(submit, dry_run, array=array, profile=profile)
    if show or as_json:
        if to_slurm or top or seeds or folds or within is not None:
            raise InputError(
                "--show and --json train nothing: leave out --top, --seeds, --folds, --within and "
                "--submit"
            )
        _show_confirmation(*find_search(study), as_json)
        return
    engine, entry = find_search(study)
    config = plan_confirmation(engine, entry, top, seeds, folds, within).with_paths(data, weights)
    workers = workers_here(workers)
    if to_slurm:
        check_pack(pack)
    else:
        pack = pack_here(pack, workers)
    # Folds judge by more images, as they will show.
    images = WINNING_IMAGES if config.folds else rarest(entry)
    if len(config.candidates) > 1 and (line := no_winner(config.seeds, config.folds, images)):
        say(line)
    arguments = [*worker_options(data, weights, None, pack), "--", config.study.name]
    if to_slurm:
        next_commands = [
            command("status", "--watch", config.study.name),
            command("confirm", "--show", entry.name),
        ]
        submit_workers(config, arguments, array, profile, dry_run, next_commands)
        return
    if config.folds:
        say(
            f"{counted(config.seeds, 'seed')} in each of {config.folds} folds: "
            f"{config.seeds * config.folds} reruns of each of "
            f"{counted(len(config.candidates), 'candidate')}"
        )
    local, _ = _run_here(config, preflight(config), engine, workers, arguments)
    if not _show_confirmation(engine, entry):
        raise typer.Exit(_unfinished(local))


def _show_confirmation(engine: sa.Engine, entry: StudyEntry, as_json: bool = False) -> bool:
    """Print the results of a study's confirmation. Returns whether all reruns have ended."""
    again = command("confirm", entry.name)
    status = read_status(engine, entry.study_id, entry.name)
    confirmation = read_confirmation(engine, entry, status)
    if confirmation is None:
        raise InputError(f"nothing of study {entry.name!r} is confirmed yet; start with: {again}")
    if as_json:
        print_json(**confirmation.as_dict())
        return confirmation.finished
    console().print(render(confirmation), soft_wrap=True)
    if not confirmation.finished:
        say(f"not finished; continue with: {again}")
    return confirmation.finished

"""The `atelier` command. Each verb imports what it needs, so that login nodes load no torch."""

import logging
import os
import shlex
import sys
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.admin import data_app, db_app, user_app
from search.console import StudyName, Verbs, errors_in_one_line, find_study, ready_streams, run, say
from search.exit_codes import ExitCode
from storage.ownership import with_users_umask

if TYPE_CHECKING:
    from collections.abc import Callable

    import sqlalchemy as sa
    from rich.console import Console, Group

    from search.export import Bundle
    from search.local import LocalSearch
    from search.study_config import StudyConfig
    from storage.status import Status
    from storage.studies import StudyEntry
    from trainer.config import TrainConfig

app = typer.Typer(
    cls=Verbs,
    help="Hyperparameter search for a fashion-attribute model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # else [slurm.*] is taken for markup
)
app.add_typer(data_app, name="data")
app.add_typer(db_app, name="db")
app.add_typer(user_app, name="user")

WATCH_SECONDS, SITE_SECONDS = 2, 30

StudyPath = Annotated[Path, typer.Argument(help="Study file, as in studies/fashion.toml.")]
Data = Annotated[str | None, typer.Option("--data", help="Dataset folder, instead of the file's.")]
Weights = Annotated[str | None, typer.Option("--weights", help="Weights file, instead of the file's.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, as in train.epochs=10. May be repeated."),
]
MOST_PACKED = 64
Pack = Annotated[
    str,
    typer.Option(help=f"Trials that a worker trains at once, 1 to {MOST_PACKED}; auto: as many as fit."),
]


def main(arguments: list[str] | None = None) -> None:
    """Run the command, or the one with these arguments, with its log on stderr."""
    # OpenBLAS makes a thread for each core as numpy is imported, and where it may not, it ends the
    # process. Nothing here is faster for them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    ready_streams()
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S%z",  # logs are read far from the machine's clock
        stream=sys.stderr,
    )
    for name in ("optuna", "alembic", "timm", "httpx", "huggingface_hub", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # torch's import sets this too, unless it is cut short.
    logging.getLogger("torch").setLevel(logging.WARNING)
    run(app, arguments)


def _load(
    path: Path, data: str | None, weights: str | None, overrides: list[str] | None
) -> "StudyConfig":
    from search.toml_file import load_study_file

    settings = list(overrides or [])
    for key, value in (("data", data), ("weights", weights)):
        if value is not None:
            settings.append(f"train.{key}={_quoted(value)}")
    return load_study_file(path, settings)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@app.command()
def search(
    study: StudyPath,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where the best configuration goes.")
    ] = Path("best.toml"),
    pack: Pack = "1",
    data: Data = None,
    weights: Weights = None,
    set_: Set = None,
) -> None:
    """Run a whole search on this machine; running it again goes on where it stopped."""
    with errors_in_one_line():
        from search.local import preflight
        from search.study import open_study
        from storage import database, schema

        file = _load(study, data, weights, set_)
        _check_export(output, file.study.name)
        _check_pack(pack, workers)
        arguments = [str(study), *_repeat(data, weights, set_, pack)]
        dataset = preflight(file)
        engine = database.connect()
        opened = schema.open_storage(engine)
        _, entry = open_study(file, engine, opened, dataset, lead=True)
        local = _run_here(arguments, workers, engine, entry)
        status = local.status()
        if status.best is not None:
            _export(engine, entry, None, output)
        if status.budget_spent and not local.interrupted:
            say(
                f"the budget of {status.max_gpu_hours:g} GPU-hours is spent, and what had not ended is "
                "pruned; with more study.max_gpu_hours further trials may begin"
            )
            return
        if status.finished >= status.max_trials:
            if status.best is None:
                say(f"error: no trial was completed; see why with: atelier logs {entry.name}")
                raise typer.Exit(ExitCode.FAILED)
            say(f"see it in the browser with: {_command('dashboard')}")
            say(f"see whether it was luck with: {_command('confirm', entry.name)}")
            return
        say("not finished; the same command goes on where it stopped")
        raise typer.Exit(ExitCode.INTERRUPTED if local.interrupted else ExitCode.STOPPED)


def _run_here(
    arguments: list[str], workers: int, engine: "sa.Engine", entry: "StudyEntry"
) -> "LocalSearch":
    """Let workers with these arguments work at a study, on this machine, until they end."""
    from dashboards.terminal import console
    from search.local import LocalSearch
    from storage.paths import RunFolder
    from storage.status import read_status

    runs = RunFolder(entry.name, entry.created).make()
    say(f"study {entry.name!r} starts workers: {workers}; their logs are in {runs.logs}")

    def status() -> "Status":
        return read_status(engine, entry.study_id, entry.name)

    local = LocalSearch(arguments, workers, runs, status, console())
    local.run()
    return local


def _repeat(data: str | None, weights: str | None, overrides: list[str] | None, pack: str) -> list[str]:
    """A worker's options."""
    options = [
        ("--data", data),
        ("--weights", weights),
        *(("--set", one) for one in overrides or []),
        ("--pack", None if pack == "1" else pack),
    ]
    return [word for name, value in options if value is not None for word in (name, value)]


def _pack(text: str) -> int | None:
    """How many trials at once; None for as many as fit. Raises InputError."""
    from search.errors import InputError

    if text == "auto":
        return None
    if text not in map(str, range(1, MOST_PACKED + 1)):
        raise InputError(f"--pack {text!r}: allowed is a number from 1 to {MOST_PACKED}, or auto")
    return int(text)


def _check_pack(text: str, workers: int = 1) -> None:
    """Raises InputError for what workers on one machine could not do."""
    from search.errors import InputError

    if _pack(text) is None and workers > 1:
        raise InputError(
            f"--pack auto with {workers} workers: each would take the whole memory for its own; give "
            "--workers 1, or a number"
        )


@app.command("worker")
def worker_(
    study: Annotated[str, typer.Argument(help="Study file, or the name of a study on record.")],
    pack: Pack = "1",
    data: Data = None,
    weights: Weights = None,
    set_: Set = None,
) -> None:
    """Run one worker: what a SLURM array task runs.

    Exit codes: 0 nothing left to do, 3 asked to stop, 4 out of wall time (and requeued).
    """
    with errors_in_one_line():
        import multiprocessing

        import search.preload  # noqa: F401  # quicker than one by one
        from search.confirm.evidence import cannot_win
        from search.confirm.plan import ConfirmationFile
        from search.slurm.job import own_job
        from search.slurm.queue import probe_liveness
        from search.study import open_study
        from search.worker import Worker
        from storage import database, roles, schema
        from storage.ledger import Ledger
        from storage.paths import RunFolder, image_cache
        from trainer.device import prepare_process
        from trainer.pack import pack_that_fits
        from trainer.workspace import Workspace

        file = _worker_file(study, data, weights, set_)
        wanted = _pack(pack)
        job = own_job()
        prepare_process()
        workspace = Workspace(file.shared, image_cache(), batch_sizes=file.batch_sizes)
        owner = database.connect(patience=database.PATIENCE)
        schema.ensure_tables(owner)
        engine, storage, _ = roles.for_worker(owner)
        owner.dispose()
        opened, entry = open_study(file, engine, storage, workspace.dataset)
        if file.study.max_trials != entry.max_trials:
            logging.warning(
                "the study has max_trials = %d on record, the file says %d: search or submit changes it",
                entry.max_trials,
                file.study.max_trials,
            )
        ledger = Ledger(
            engine,
            storage,
            entry.study_id,
            probe_liveness=probe_liveness,
            job=job.columns() if job else None,
        )
        runs = RunFolder(entry.name, entry.created).make()
        together = wanted or pack_that_fits(file.largest, workspace)
        logging.info("trials at once: %d", together)
        worker = Worker(file, opened, ledger, workspace, runs, job.end if job else None, together)
        if isinstance(file, ConfirmationFile):
            worker.rules_out = lambda params: cannot_win(engine, entry, params["candidate"])
        if job and multiprocessing.parent_process() is None:  # else the task is the search's, not ours
            worker.requeue = job.requeue
        end = worker.run()
        logging.info("worker ended: %s", worker.stop.reason or "nothing left to claim")
        if end == ExitCode.WALL_TIME and not worker.made_progress:
            say("error: the wall time is too short for a single step; ask for more in [slurm.*]")
            raise typer.Exit(ExitCode.FAILED)
        raise typer.Exit(end)


def _worker_file(
    study: str, data: str | None, weights: str | None, overrides: list[str] | None
) -> "StudyConfig":
    from search.errors import InputError

    if study.endswith(".toml"):
        return _load(Path(study), data, weights, overrides)
    if overrides:
        raise InputError("--set goes with a study file; a study on record has its settings")
    return _recorded_file(find_study(study)[1], data, weights)


def _recorded_file(entry: "StudyEntry", data: str | None, weights: str | None) -> "StudyConfig":
    from search.confirm.plan import recorded
    from search.study_config import StudyConfig

    return (recorded(entry) or StudyConfig.from_record(entry)).with_paths(data, weights)


@app.command()
def confirm(
    study: StudyName,
    top: Annotated[
        int | None, typer.Option(min=1, max=1000, help="How many of the best trials; 5.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=2, max=1000, help="Fresh seeds for each; 5.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes on this machine.")] = 2,
    show: Annotated[bool, typer.Option("--show", help="Train nothing; show what is known.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As --show, for programs.")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="Train in a SLURM array instead.")] = False,
    array: Annotated[str | None, typer.Option(help="With --submit: array tasks; 0-7%4.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="With --submit: a [slurm.*] table; tuning.")
    ] = None,
    pack: Pack = "1",
    data: Data = None,
    weights: Weights = None,
) -> None:
    """Rerun the best trials on fresh seeds, and say which of them can be believed."""
    with errors_in_one_line():
        import json

        from dashboards.terminal import console
        from search.confirm.evidence import read_confirmation
        from search.confirm.plan import plan_confirmation
        from search.confirm.table import render
        from search.errors import InputError
        from search.local import preflight
        from search.slurm.submit import submit_study
        from search.study import open_study
        from storage import schema
        from storage.studies import job_in_words

        if (show or as_json) and (submit or top or seeds):
            raise InputError("--show and --json train nothing: leave out --top, --seeds and --submit")
        if (array or profile) and not submit:
            raise InputError("--array and --profile go with --submit")
        engine, entry = _search_study(study)
        if not (show or as_json):
            file = plan_confirmation(engine, entry, top, seeds).with_paths(data, weights)
            _check_pack(pack, 1 if submit else workers)
            arguments = [*_repeat(data, weights, None, pack), "--", file.study.name]
            if submit:
                job = submit_study(file, profile or "tuning", array or "0-7%4", arguments)
                typer.echo(f"job {job_in_words(job)}")
                typer.echo(f"  {_command('status', '--watch', file.study.name)}")
                typer.echo(f"  {_command('confirm', '--show', entry.name)}")
                return
            dataset = preflight(file)
            _, linked = open_study(file, engine, schema.open_storage(engine), dataset, lead=True)
            local = _run_here(arguments, workers, engine, linked)
        confirmation = read_confirmation(engine, entry)
        if confirmation is None:
            raise InputError(
                f"nothing of study {entry.name!r} is confirmed yet; start with: "
                f"{_command('confirm', entry.name)}"
            )
        if as_json:
            typer.echo(json.dumps(confirmation.as_dict(), indent=2))
            return
        console().print(render(confirmation), soft_wrap=True)
        if not confirmation.finished:
            say(f"not finished; it goes on with: {_command('confirm', entry.name)}")
            if not show:
                raise typer.Exit(ExitCode.INTERRUPTED if local.interrupted else ExitCode.STOPPED)


@app.command()
def submit(
    study: StudyPath,
    array: Annotated[str, typer.Option(help="Array tasks, as for sbatch.")] = "0-7%4",
    profile: Annotated[str, typer.Option(help="One of the file's [slurm.*] tables.")] = "tuning",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script only.")] = False,
    pack: Pack = "1",
    data: Data = None,
    weights: Weights = None,
    set_: Set = None,
) -> None:
    """Start workers as a SLURM array job, after checking what would fail in the queue."""
    with errors_in_one_line():
        from search.slurm.script import array_script
        from search.slurm.submit import about_environment, submit_study
        from storage.studies import job_in_words

        file = _load(study, data, weights, set_)
        _check_pack(pack)
        options = [str(study.absolute()), *_repeat(data, weights, set_, pack)]
        if dry_run:
            script = array_script(file, profile, array, options)
            _say_each(about_environment(script))
            typer.echo(script, nl=False)
            return
        job = submit_study(file, profile, array, options)
        typer.echo(f"job {job_in_words(job)}")
        for verb in (["status", "--watch"], ["logs"], ["stop"]):
            typer.echo(f"  {_command(*verb, str(study))}")
        typer.echo("  atelier dashboard")


@app.command()
def stop(
    study: StudyName,
    undo: Annotated[bool, typer.Option("--undo", help="Let workers start again.")] = False,
) -> None:
    """Ask all workers of a study to finish their epoch, release their trial and end."""
    with errors_in_one_line():
        from storage.schema import require_fit
        from storage.studies import request_stop

        engine, entry = find_study(study)
        require_fit(engine, only="writes")
        request_stop(engine, entry.study_id, not undo)
        if undo:
            typer.echo(f"study {entry.name!r}: workers may start again")
        else:
            typer.echo(
                f"study {entry.name!r}: its workers end after their epoch, also those still in the "
                "queue; search, submit, or stop --undo goes on"
            )


@app.command()
def logs(
    study: StudyName,
    trial: Annotated[int | None, typer.Option(help="Only this trial's attempts.")] = None,
    lines: Annotated[int, typer.Option(min=0, help="How much of the last log to show.")] = 20,
) -> None:
    """Show where the workers' logs are, the last traceback, and the end of the last log."""
    with errors_in_one_line():
        from dashboards.study_tables import render_attempts
        from dashboards.terminal import console
        from search.errors import InputError
        from search.slurm.submit import newest_log
        from storage.studies import array_jobs
        from storage.workers import read_attempts

        engine, entry = find_study(study)
        attempts = read_attempts(engine, entry.study_id, trial)
        # Of tasks that ended before they claimed a trial there is only the log.
        jobs = array_jobs(engine, entry.study_id) if trial is None else []
        newest = newest_log(jobs)
        if not attempts and newest is None:
            what = "any trial" if trial is None else f"trial {trial}"
            raise InputError(f"no attempt at {what} yet, and no log of an array task")
        console().print(render_attempts(attempts, newest, lines), soft_wrap=True)


@app.command()
def status(
    study: StudyName,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
) -> None:
    """Show a study: progress, trials, workers, GPU-hours."""
    with errors_in_one_line():
        import json

        from rich.console import Group

        from dashboards.study_tables import render, render_workers
        from dashboards.terminal import console
        from search.slurm.queue import Tasks, task_states
        from storage.paths import RunFolder, total_size
        from storage.status import read_status

        engine, entry = find_study(study)
        runs = RunFolder(entry.name, entry.created)

        # The controller and the shared disk serve the whole site: however often we look, ask them twice
        # a minute.
        @lru_cache(maxsize=1)
        def site(array_jobs: tuple[str, ...], _: int) -> tuple[Tasks, int]:
            return task_states(array_jobs), total_size(runs.files())

        def now() -> "Status":
            status = read_status(engine, entry.study_id, entry.name)
            turn = int(time.monotonic() / SITE_SECONDS)
            tasks, status.disk_bytes = site(tuple(status.array_jobs), turn)
            status.tasks, status.tasks_problem = tasks.states, tasks.problem
            return status

        def picture(status: "Status") -> Group:
            return Group(render(status, 40), render_workers(status))

        if as_json:
            typer.echo(json.dumps(now().as_dict(), indent=2))
        elif watch:
            with suppress(KeyboardInterrupt):
                _watch(now, picture, console())
        else:
            console().print(picture(now()))


def _watch(
    now: "Callable[[], Status]", picture: "Callable[[Status], Group]", console: "Console"
) -> None:
    """Show a study until all of its trials have ended: drawn anew, or a line for whatever changes."""
    from rich.live import Live

    from dashboards.study_tables import progress_line
    from dashboards.terminal import can_redraw

    if can_redraw(console):
        with Live(console=console) as live:
            while (status := now()).finished < status.max_trials:
                live.update(picture(status))
                time.sleep(WATCH_SECONDS)
            live.update(picture(status))
        return
    shown = None
    while (status := now()).finished < status.max_trials:
        if status.counts != shown:
            console.print(progress_line(status), soft_wrap=True)
            shown = status.counts
        time.sleep(WATCH_SECONDS)
    console.print(picture(status))


@app.command()
def trials(
    study: StudyName,
    csv: Annotated[Path | None, typer.Option(help="Write this file instead of a table.")] = None,
) -> None:
    """List a study's trials, one a row."""
    with errors_in_one_line():
        from dashboards.csv_tables import csv_text, trial_table
        from dashboards.outputs import check_overwritable
        from dashboards.study_tables import render_trials
        from dashboards.terminal import console
        from storage.status import read_status

        engine, entry = find_study(study)
        status = read_status(engine, entry.study_id, entry.name)
        if not status.trials:
            say(f"study {entry.name!r} has no trials yet")
        elif csv is None:
            console().print(render_trials(status))
        else:
            names, rows = trial_table(status.trials)
            check_overwritable(csv, ",".join(names[:3]), "a table of trials")
            with with_users_umask():
                csv.write_text(csv_text(names, rows), "utf-8", newline="")


@app.command()
def plot(
    study: StudyName,
    output: Annotated[Path, typer.Option("-o", "--output", help="A .png, .svg or .html file.")],
    kind: Annotated[str, typer.Option(help="curves, compare or history.")] = "curves",
    trials: Annotated[str | None, typer.Option(help="As in 3,5-9; default: the best.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="How many of the best.")] = None,
    by: Annotated[str | None, typer.Option(help="With compare: the hyperparameter.")] = None,
    smooth: Annotated[
        float, typer.Option(min=0, max=0.95, help="With curves: the past's weight.")
    ] = 0.0,
) -> None:
    """Draw what the dashboard's pages show into a file."""
    with errors_in_one_line():
        from dashboards.plot import plot_study

        engine, entry = find_study(study)
        with with_users_umask():
            plot_study(engine, entry, kind, output, trials, top, by, smooth)
        say(f"drawn: {output}")


@app.command()
def report(
    study: StudyName,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the pages.")] = Path(
        "report"
    ),
) -> None:
    """Write what a study found as one page, in Markdown and in HTML, with its figures."""
    with errors_in_one_line():
        from search.report import write_report

        engine, entry = _search_study(study)
        with with_users_umask():
            page = write_report(engine, entry, output)
        say(f"the report is {page}, and report.md beside it")


@app.command()
def dashboard(
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    certificate: Annotated[Path | None, typer.Option(help="PEM file, for TLS.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    behind_proxy: Annotated[
        bool,
        typer.Option("--behind-proxy", help="A proxy in front sets X-Forwarded-For, -Proto, -Host."),
    ] = False,
    no_tls: Annotated[
        bool, typer.Option("--no-tls", help="Other machines may send passwords in clear.")
    ] = False,
    prefix: Annotated[
        str, typer.Option(help="Path that a proxy serves it under, as in /node/login1/8080.")
    ] = "",
) -> None:
    """Serve optuna-dashboard and our own pages, behind a login."""
    with errors_in_one_line():
        from dashboards.web.server import Address, serve

        serve(Address(host, port, certificate, key, behind_proxy, no_tls, prefix))


@app.command()
def export(
    study: StudyName,
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("best.toml"),
    trial: Annotated[int | None, typer.Option(help="Another trial than the best.")] = None,
) -> None:
    """Write the confirmed winner's configuration, else the best trial's, for `atelier train`."""
    with errors_in_one_line():
        engine, entry = _search_study(study)
        _check_export(output, entry.name)
        _export(engine, entry, trial, output)


def _export(engine: "sa.Engine", entry: "StudyEntry", trial: int | None, output: Path) -> None:
    from search.confirm.evidence import read_confirmation
    from search.errors import InputError
    from search.export import choose, export_trial, in_words, known_accuracy
    from storage.status import read_status

    try:
        confirmation = read_confirmation(engine, entry)
    except InputError:
        if trial is None:
            raise
        confirmation = None  # a trial that is named needs no evidence
    choice = choose(read_status(engine, entry.study_id, entry.name), confirmation, trial)
    row = choice.row
    accuracy = known_accuracy(entry, row, confirmation)
    with with_users_umask():
        export_trial(engine, entry, choice, accuracy, output)
    value = f"score {row.value:.4f}" if row.state == "complete" else row.state
    warning = "warning: " if choice.standing == "unconfirmed" else ""
    say(f"{warning}trial {row.number} ({value}) is {choice.words}")
    if accuracy:
        say(f"its average per-class accuracy is {in_words(accuracy)}")
    elif row.state == "complete":
        from storage.paths import home

        say(
            "note: its accuracy has no interval, since its predictions are not in ATELIER_HOME "
            f"({home()})"
        )
    say(f"it is in {output}; train it with: {_command('train', str(output))}")


def _search_study(name_or_file: str) -> tuple["sa.Engine", "StudyEntry"]:
    """Find a search that exists; a confirmation is none."""
    from search.confirm.plan import recorded
    from search.errors import InputError

    engine, entry = find_study(name_or_file)
    if (confirmation := recorded(entry)) is not None:
        raise InputError(
            f"{entry.name!r} is the confirmation of a search; name that: {confirmation.confirms}"
        )
    return engine, entry


def _check_export(path: Path, study: str) -> None:
    """Raises InputError, before any work is done for the file."""
    from search.export import check_overwritable

    _check_output(path)
    check_overwritable(path, study)


def _check_output(path: Path) -> None:
    """Raises InputError, before any work is done for the file."""
    from search.errors import InputError

    if not path.absolute().parent.is_dir():
        raise InputError(f"--output {path}: no such folder; make it first")
    if path.is_dir():
        raise InputError(f"--output {path}: is a folder; give a file")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Configuration, as `atelier export` writes it.")],
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Another length; the warm-up stays as long as it is.")
    ] = None,
    stretch_warmup: Annotated[
        bool, typer.Option("--stretch-warmup", help="With --epochs: the warm-up in proportion.")
    ] = False,
    warmup_epochs: Annotated[int | None, typer.Option(min=0, help="Another warm-up.")] = None,
    train_on: Annotated[
        str | None, typer.Option(help="train, or train+val for the last run: not validated.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder; default: CONFIG.run.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Train in a SLURM job.")] = False,
    profile: Annotated[str | None, typer.Option(help="With --submit: a [slurm.*] table; final.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --submit: print the script.")] = False,
    data: Data = None,
    weights: Weights = None,
) -> None:
    """Train one configuration to its end; the same command resumes an interrupted run."""
    with errors_in_one_line():
        from search.errors import InputError
        from search.export import changed, load_bundle
        from search.slurm.script import log_folder, run_script
        from search.slurm.submit import about_environment, submit_run
        from storage.studies import job_in_words, split_job

        changes = {
            "epochs": epochs,
            "warmup_epochs": warmup_epochs,
            "train_on": train_on,
            "data": data,
            "weights": weights,
        }
        bundle = load_bundle(config)
        settings, notes = changed(bundle, changes, config, stretch_warmup)
        folder = run or config.with_suffix(".run")
        if profile and not (submit or dry_run):
            raise InputError("--profile goes with --submit")
        if submit or dry_run:
            profile = profile or "final"
            given = {key: value for key, value in changes.items() if value is not None}
            options = given | {"run": folder.absolute()}
            words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
            words += ["--stretch-warmup"] * stretch_warmup
            arguments = [*words, "--", str(config.absolute())]
            if dry_run:
                script = run_script(settings, bundle.slurm, profile, arguments)
                _say_each(about_environment(script))
                typer.echo(script, nl=False)
                return
            job = submit_run(bundle, settings, profile, arguments)
            _say_each(notes)
            log = log_folder() / f"train-{split_job(job)[0]}.log"
            typer.echo(f"job {job_in_words(job)}; its log is {log}")
            return
        end = _train_here(bundle, settings, folder, notes)
        if end != ExitCode.DONE:
            say("not finished; the same command goes on where it stopped")
            raise typer.Exit(end)
        say(f"the run is in {folder}; predict with: {_command('predict', str(folder))}")


def _train_here(bundle: "Bundle", settings: "TrainConfig", folder: Path, notes: list[str]) -> ExitCode:
    from search.export import check_origin
    from search.train import run_to_end
    from storage.paths import image_cache
    from trainer.dataset import absent_attributes
    from trainer.device import prepare_process
    from trainer.metrics import EpochResult
    from trainer.workspace import Workspace

    def show(result: EpochResult) -> None:
        validated = (
            f"val loss {result.val_loss:.4f} acc {result.val_accuracy:.4f} "
            f"(overall {result.val_overall:.4f})  "
        )
        typer.echo(
            f"epoch {result.epoch + 1}/{settings.epochs}  lr {result.lr:.2e}  "
            f"train loss {result.train_loss:.4f} acc {result.train_accuracy:.4f}  "
            f"{validated if result.validated else ''}{result.seconds:.1f} s"
        )

    prepare_process()
    workspace = Workspace(settings, image_cache(), batch_sizes=[settings.batch_size])
    check_origin(bundle, settings, workspace.dataset.fingerprint)
    _say_each(notes)
    _say_each([f"note: {one}" for one in absent_attributes(workspace.dataset.attribute_table(settings))])
    with with_users_umask():
        return run_to_end(settings, workspace, folder, show)


def _command(*words: str) -> str:
    """A command that a user may copy."""
    return shlex.join(["atelier", *words])


def _say_each(lines: list[str]) -> None:
    for line in lines:
        say(line)


@app.command()
def replay(
    study: StudyName,
    trial: Annotated[int, typer.Option(min=0, help="The trial's number.")],
    data: Data = None,
    weights: Weights = None,
) -> None:
    """Train a trial again, alone, as far as it is on record, and compare every number.

    Exit codes: 0 all are equal, 1 some differ.
    """
    with errors_in_one_line():
        from search.replay import replay as replayed
        from storage.paths import image_cache
        from trainer.device import prepare_process

        engine, entry = find_study(study)
        prepare_process()
        differing = 0
        file = _recorded_file(entry, data, weights)
        for one in replayed(engine, entry, file, trial, image_cache()):
            differing += bool(one.differing)
            recorded, again = one.recorded, one.again
            typer.echo(
                f"epoch {again.epoch + 1:>3} (stream {again.stream_epoch + 1:>3})  "
                f"recorded {recorded['val_accuracy']:.6f}  again {again.val_accuracy:.6f}  "
                f"{'other: ' + ', '.join(one.differing) if one.differing else 'equal'}"
            )
        if differing:
            say(
                f"{differing} of {again.epoch + 1} epochs differ; the same machine, with as many "
                "threads (OMP_NUM_THREADS), gives the same"
            )
            raise typer.Exit(ExitCode.FAILED)
        say(f"all {again.epoch + 1} epochs are equal, bit for bit")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder of `atelier train`, or a .safetensors file.")],
    split: Annotated[str, typer.Option(help="Which images: test, val or train.")] = "test",
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("prediction.zip"),
    scores: Annotated[Path | None, typer.Option(help="The true labels, to print accuracies.")] = None,
    tta: Annotated[str, typer.Option(help="none, or flip: the mean with the mirror image.")] = "none",
    data: Data = None,
) -> None:
    """Predict a split's attributes in the challenge's form, with the run's best model."""
    with errors_in_one_line():
        from search import predict
        from search.errors import InputError
        from storage.paths import image_cache
        from trainer.device import prepare_process

        if tta not in ("none", "flip"):
            raise InputError(f"--tta {tta!r}: allowed are none and flip")
        _check_output(output)
        prepare_process()
        predictor = predict.Predictor(run, split, data, scores)
        _say_each(predictor.notes)
        predict.check_submission(output, predictor.source)
        classes = predictor.predict(image_cache(), tta == "flip")
        with with_users_umask():
            predict.write_submission(classes, output, predictor.source)
        say(f"{len(classes)} images of {split}, in the order of its list, are in {output}")
        if scores and predictor.learned_from:
            say(f"note: the run learned from, or was chosen by, the images of {split}")
        for name, known in predictor.scores(classes).items():
            typer.echo(f"{name:<27}{known.value:.4f}  95 %: {known.low:.4f} to {known.high:.4f}")


@app.command()
def model(study: StudyPath, data: Data = None, weights: Weights = None, set_: Set = None) -> None:
    """Print the network's stages: what is trained, parameters, multiply-adds."""
    with errors_in_one_line():
        from dashboards.terminal import Grid, console
        from trainer.dataset import DatasetError, read_dataset
        from trainer.model import stage_table

        file = _load(study, data, weights, set_)
        try:
            outputs = len(read_dataset(file.shared.data).attributes)
        except DatasetError:
            outputs = 26
            say("note: no dataset at hand, so the head has the challenge's 26 attributes")
        rows = stage_table(file.shared, outputs)
        table = Grid(("stage", "", "parameters", "multiply-adds"), left=("stage", ""), gap=2)
        for row in rows:
            kind = "trained" if row.trained else "frozen"
            table.add(row.name, kind, f"{row.parameters:,}", f"{row.multiply_adds:,}")
        for kind, wanted in (("trained", True), ("frozen", False)):
            parameters = sum(row.parameters for row in rows if row.trained is wanted)
            operations = sum(row.multiply_adds for row in rows if row.trained is wanted)
            table.add("total", kind, f"{parameters:,}", f"{operations:,}", style="bold")
        console().print(table)

"""The verbs that look at a study on record, or stop it: status, trials, efficiency, logs and stop."""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live

from dashboards.study_tables import (
    progress_line,
    render,
    render_attempts,
    render_efficiency,
    render_studies,
    render_trials,
    render_workers,
)
from dashboards.terminal import can_redraw, console, say
from search.cli.finding import OptionalStudyName, StudyName, find_database, find_study
from search.efficiency import advice, as_dict, costs, with_accounting
from search.errors import InputError, no_trial
from search.json_output import AsJson, print_json
from search.slurm.logs import newest_log
from search.slurm.queue import Tasks, task_states
from storage import schema
from storage.efficiency import read_uses
from storage.ownership import with_users_umask
from storage.paths import RunFolder, total_size
from storage.status import Status, read_status
from storage.studies import array_jobs, read_studies, request_stop
from storage.workers import read_attempts

WATCH_SECONDS, SITE_SECONDS = 2, 30
MOST_ROWS = 40  # of trials


def status(
    study: OptionalStudyName = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
) -> None:
    """Show a study: progress, trials, workers, GPU-hours. Without STUDY: list all studies."""
    if study is None:
        _list_studies(as_json, watch)
        return
    engine, entry = find_study(study)
    runs = RunFolder(entry.name, entry.created)

    # SLURM's controller and the shared disk serve the whole site. However often the study is read, they
    # are asked twice a minute, and when its trials have ended: that answer stays on the screen.
    @lru_cache(maxsize=1)
    def ask_site(array_jobs: tuple[str, ...], *_: int) -> tuple[Tasks, int]:
        return task_states(array_jobs), total_size(runs.files())

    def read() -> Status:
        status = read_status(engine, entry.study_id, entry.name)
        half_minute = int(time.monotonic() / SITE_SECONDS)
        tasks, status.disk_bytes = ask_site(tuple(status.array_jobs), half_minute, status.has_ended)
        status.tasks, status.tasks_problem = tasks.states, tasks.problem
        status.pending = dict(tasks.pending)
        return status

    if as_json:
        print_json(**read().as_dict())
    elif watch:
        with suppress(KeyboardInterrupt):
            _watch(read, console())
    else:
        console().print(_tables(read()))


def _list_studies(as_json: bool, watch: bool) -> None:
    if watch:
        raise InputError("--watch shows one study; name it, or leave --watch out for a list of all")
    rows = read_studies(find_database())
    if as_json:
        print_json(studies=rows)
    elif rows:
        console().print(render_studies(rows))
    else:
        say("the database has no study yet; start one with: atelier search STUDY.toml")


def _tables(status: Status) -> Group:
    return Group(render(status, MOST_ROWS), render_workers(status))


def _watch(read: Callable[[], Status], console: Console) -> None:
    """Show a study until its trials have ended: on a terminal as tables, else a line for each change."""
    if can_redraw(console):
        with Live(console=console) as live:
            while not (status := read()).has_ended:
                live.update(_tables(status))
                time.sleep(WATCH_SECONDS)
            live.update(_tables(status))
        return
    counts = None
    while not (status := read()).has_ended:
        if status.counts != counts:
            console.print(progress_line(status), soft_wrap=True)
            counts = status.counts
        time.sleep(WATCH_SECONDS)
    console.print(_tables(status))


def trials(
    study: StudyName,
    kind: Annotated[str | None, typer.Option("--format", help="csv, json or parquet.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="With --format: this file; default: standard output."),
    ] = None,
    epochs: Annotated[bool, typer.Option("--epochs", help="With --format: a row an epoch.")] = False,
    csv: Annotated[Path | None, typer.Option(help="The same as --format csv -o FILE.")] = None,
) -> None:
    """List a study's trials, one a row. docs/notebook.md has the columns and units of --format."""
    if csv is not None:
        if kind is not None or output is not None:
            raise InputError("--csv FILE stands for --format csv -o FILE; give one of the two")
        kind, output = "csv", csv
    if kind is not None:
        _export(study, kind, output, "epochs" if epochs else "trials")
        return
    if output is not None or epochs:
        raise InputError("-o and --epochs go with --format; add --format csv, json or parquet")
    engine, entry = find_study(study)
    status = read_status(engine, entry.study_id, entry.name)
    if status.trials:
        console().print(render_trials(status))
    else:
        say(f"study {entry.name!r} has no trials yet")


def _export(study: str, kind: str, output: Path | None, table: str) -> None:
    from dashboards import frame_files, frames  # late: pandas takes longer than a table for people

    frame_files.check_format(kind, output)
    engine, entry = find_study(study)
    frame = getattr(frames, table)(engine, entry)
    if frame.empty and output is not None:
        say(f"study {entry.name!r} has no {table} yet")
        return
    with with_users_umask():
        frame_files.write_frame(frame, kind, output, f"a table of {table}")


def efficiency(
    study: StudyName,
    as_json: AsJson = False,
) -> None:
    """Show what each worker was granted and used, and what to ask for next time.

    Times and memory are those of SLURM's accounting (sacct). Without it they are on record with each
    worker.
    """
    engine, entry = find_study(study)
    uses, source = with_accounting(
        read_uses(engine, entry.study_id), array_jobs(engine, entry.study_id), entry.created
    )
    if as_json:
        print_json(**as_dict(uses, source))
    elif uses:
        console().print(render_efficiency(uses, advice(uses), costs(uses), source), soft_wrap=True)
    else:
        say(f"study {entry.name!r} has had no worker yet")


def logs(
    study: StudyName,
    trial: Annotated[int | None, typer.Option(help="Only this trial's attempts.")] = None,
    lines: Annotated[int, typer.Option(min=0, help="How many lines of the newest log to show.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show where the workers' logs are, the last traceback, and the end of the newest log."""
    engine, entry = find_study(study)
    attempts = read_attempts(engine, entry.study_id, trial)
    # A task that ended before it claimed a trial left only its log.
    jobs = array_jobs(engine, entry.study_id) if trial is None else []
    newest = newest_log(jobs)
    if not attempts and newest is None:
        if trial is None:
            raise InputError("no attempt at any trial yet, and no log of an array task")
        numbers = [row.number for row in read_status(engine, entry.study_id, entry.name).trials]
        if trial not in numbers:
            raise no_trial(entry.name, trial, len(numbers))
        raise InputError(f"no attempt at trial {trial} yet")
    if as_json:
        print_json(study=entry.name, attempts=attempts, newest=newest)
        return
    console().print(render_attempts(attempts, newest, lines), soft_wrap=True)


def stop(
    study: StudyName,
    undo: Annotated[bool, typer.Option("--undo", help="Let workers start again.")] = False,
) -> None:
    """Ask all workers of a study to finish their epoch, release their trial and end."""
    engine, entry = find_study(study)
    schema.require_fit(engine, only="writes")
    request_stop(engine, entry.study_id, not undo)
    if undo:
        typer.echo(f"study {entry.name!r}: workers may start again")
    else:
        typer.echo(
            f"study {entry.name!r}: its workers end after their epoch, and those in the queue when they "
            "start; search, submit, or stop --undo lets workers start again"
        )

"""The verbs that look at a study: status, trials, efficiency, logs, verify and plot."""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live

from dashboards.csv_tables import csv_text, trial_table
from dashboards.outputs import check_overwritable
from dashboards.plot import plot_study
from dashboards.study_tables import (
    progress_line,
    render,
    render_attempts,
    render_efficiency,
    render_trials,
    render_workers,
)
from dashboards.terminal import can_redraw, console, printable
from search.cli.errors import say
from search.cli.options import AsJson, StudyName, find_study, print_json
from search.efficiency import advice, as_dict, costs, with_accounting
from search.errors import InputError
from search.exit_codes import ExitCode
from search.slurm.queue import Tasks, task_states
from search.slurm.script import newest_log
from search.verify.look import verify as verify_study
from storage.database import READING
from storage.efficiency import read_uses
from storage.ownership import with_users_umask
from storage.paths import RunFolder, home, total_size
from storage.status import Status, read_status
from storage.studies import array_jobs
from storage.workers import read_attempts

WATCH_SECONDS, SITE_SECONDS = 2, 30
MOST_ROWS = 40  # of trials


def status(
    study: StudyName,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
) -> None:
    """Show a study: progress, trials, workers, GPU-hours."""
    engine, entry = find_study(study)
    runs = RunFolder(entry.name, entry.created)

    # SLURM's controller and the shared disk serve the whole site. However often the study is read, they
    # are asked twice a minute.
    @lru_cache(maxsize=1)
    def ask_site(array_jobs: tuple[str, ...], _: int) -> tuple[Tasks, int]:
        return task_states(array_jobs), total_size(runs.files())

    def read() -> Status:
        status = read_status(engine, entry.study_id, entry.name)
        half_minute = int(time.monotonic() / SITE_SECONDS)
        tasks, status.disk_bytes = ask_site(tuple(status.array_jobs), half_minute)
        status.tasks, status.tasks_problem = tasks.states, tasks.problem
        return status

    if as_json:
        print_json(**read().as_dict())
    elif watch:
        with suppress(KeyboardInterrupt):
            _watch(read, console())
    else:
        console().print(_tables(read()))


def _tables(status: Status) -> Group:
    return Group(render(status, MOST_ROWS), render_workers(status))


def _watch(read: Callable[[], Status], console: Console) -> None:
    """Show a study until its trials have ended: on a terminal as tables, else a line for each change."""
    if can_redraw(console):
        with Live(console=console) as live:
            while (status := read()).finished < status.max_trials:
                live.update(_tables(status))
                time.sleep(WATCH_SECONDS)
            live.update(_tables(status))
        return
    counts = None
    while (status := read()).finished < status.max_trials:
        if status.counts != counts:
            console.print(progress_line(status), soft_wrap=True)
            counts = status.counts
        time.sleep(WATCH_SECONDS)
    console.print(_tables(status))


def trials(
    study: StudyName,
    csv: Annotated[Path | None, typer.Option(help="Write this file instead of a table.")] = None,
) -> None:
    """List a study's trials, one a row."""
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
        what = "any trial" if trial is None else f"trial {trial}"
        raise InputError(f"no attempt at {what} yet, and no log of an array task")
    if as_json:
        print_json(study=entry.name, attempts=attempts, newest=newest)
        return
    console().print(render_attempts(attempts, newest, lines), soft_wrap=True)


def verify(
    study: StudyName,
    as_json: AsJson = False,
) -> None:
    """Check that all holds what is promised of a study, while its workers run or later.

    Each line says what is wrong with which trial, and what to do next. Nothing is written.
    Exit codes: 0 all holds, 1 something does not.
    """
    engine, entry = find_study(study, READING)
    verdict = verify_study(engine, entry.name)
    findings, rules = verdict.findings, len(verdict.rules)
    if as_json:
        print_json(**verdict.as_dict())
    else:
        for finding in findings:
            typer.echo(printable(str(finding)))
        if not findings:
            trials = len(verdict.evidence.trials)
            typer.echo(f"study {entry.name!r}: {trials} trials, all {rules} rules hold")
    if not verdict.evidence.has_files:
        say(f"note: no file was looked at, since the study's are not in ATELIER_HOME ({home()})")
    if findings:
        say(f"study {entry.name!r}: {len(findings)} findings, by {rules} rules (docs/guarantees.md)")
        raise typer.Exit(ExitCode.FAILED)


def plot(
    study: StudyName,
    output: Annotated[Path, typer.Option("-o", "--output", help="A .png, .svg or .html file.")],
    kind: Annotated[str, typer.Option(help="curves, compare, history, confusion or errors.")] = "curves",
    trials: Annotated[str | None, typer.Option(help="As in 3,5-9; default: the best.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="How many of the best.")] = None,
    by: Annotated[str | None, typer.Option(help="With compare: the hyperparameter.")] = None,
    smooth: Annotated[
        float, typer.Option(min=0, max=0.95, help="With curves: weight of the epochs before.")
    ] = 0.0,
) -> None:
    """Draw the figures of the dashboard into a file."""
    engine, entry = find_study(study)
    with with_users_umask():
        plot_study(engine, entry, kind, output, trials, top, by, smooth)
    say(f"drawn: {output}")

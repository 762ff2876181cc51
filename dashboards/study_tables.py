"""Shows a study, its trials, workers and attempts as text and tables for a terminal."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from dashboards.csv_tables import trial_table
from dashboards.terminal import Grid
from dashboards.wilson import effective_images, wilson
from storage.efficiency import WorkerUse
from storage.outcome import Outcome
from storage.paths import home
from storage.status import State, Status, TrialRow, difference_line, parameter_names
from storage.studies import StudyRow, job_in_words
from storage.words import counted
from storage.workers import AttemptRow, WorkerRow

MUCH = 0.05  # share of a worker's time
GIB = 1 << 30


def render_studies(studies: Sequence[StudyRow]) -> RenderableType:
    """The studies of a database, a row for each."""
    table = Grid(("study", "trials", "failed", "best", "at work", "since"), left=("study",), gap=2)
    for row in studies:
        best = "" if row.best is None else f"{row.best:.4f}"
        done = f"{row.finished}/{row.max_trials}"
        since = f"{row.created.astimezone():%Y-%m-%d %H:%M}"
        table.add(row.name, done, str(row.failed), best, str(row.workers), since)
    return table


def render_trials(status: Status) -> RenderableType:
    """All trials, for people: numbers have six digits, and unknown values are blank."""
    names, rows = trial_table(status.trials)
    hidden = {"reason"} if any(row.audit for row in status.trials) else {"reason", "audit"}
    names = [name for name in names if name not in hidden]
    table = Grid(names, left=("state", "worker", "audit"), gap=2)
    for row in rows:
        table.add(*(_six_digits(row.get(name)) for name in names))
    return table


def progress_line(status: Status) -> str:
    """The progress of the study in one line, for logs and for output that is not a terminal."""
    counts = ", ".join(f"{n} {state}" for state, n in status.counts.items() if n)
    best = status.best
    leader = f"; best {_score(status, best)} (trial {best.number})" if best else ""
    # Before the first trial is complete, nobody knows how long one takes.
    left = status.seconds_left if best else None
    remaining = f"; about {duration(math.ceil(left / 10) * 10)} left" if left else ""
    done = f"{status.finished}/{status.max_trials} trials"
    return f"{done} ({counts or 'none yet'}) in {duration(status.seconds)}{leader}{remaining}"


def surplus_line(status: Status) -> str:
    """Which enqueued trials do not begin, and why."""
    waiting = f"{counted(status.surplus, 'enqueued trial')} beyond study.max_trials"
    return f"{waiting}: with a larger one, more begin"


def _score(status: Status, row: TrialRow) -> str:
    """A trial's score, with the standard error that its images give it."""
    value = row.value or 0.0
    if not any(status.attribute_images):
        return f"{value:.4f}"
    low, high = wilson(value, effective_images(status.attribute_images), 1.0)
    return f"{value:.4f} ± {(high - low) / 2:.4f}"


def render(status: Status, rows: int = 12) -> RenderableType:
    """The progress of the study, and a table of its trials: the unfinished first, then the best."""
    names = parameter_names(status.trials)
    headings = [name.replace("_", " ") for name in names]  # so that they wrap between words
    table = Grid(["trial", "state", "epoch", "accuracy", "score", *headings], left=["state"])
    for row in status.ranked()[:rows]:
        table.add(
            str(row.number),
            "resumed" if row.resumed else row.state,
            f"{row.epochs}/{status.max_epochs}",
            "" if row.accuracy is None else f"{row.accuracy:.4f}",
            "" if row.value is None else f"{row.value:.4f}",
            *(_number(row.params.get(name)) for name in names),
            style="dim" if row.state in (State.PAUSED, State.PRUNED) else None,
        )
    head = Text(f"{status.study}: {progress_line(status)}", style="bold")
    lines = filter(None, [_spent(status), audit_line(status), difference_line(status.trials)])
    return Group(head, table, *(Text(line, style="dim") for line in lines))


def audit_line(status: Status) -> str:
    """How often the strategy would have stopped a good trial. Empty if it cannot be said yet."""
    complete = status.completed()
    stopped = [(place, row) for place, row in enumerate(complete, 1) if row.audit]
    if not stopped or len(complete) < 3:
        return ""
    place, best = stopped[0]
    good = sum(place <= len(complete) / 3 for place, _ in stopped)
    return (
        f"Audit: {counted(len(stopped), 'complete trial')} would have been stopped, {good} of them in "
        f"the best third of all {len(complete)} (by chance {len(stopped) / 3:.0f}); the best, trial "
        f"{best.number}, would have been {best.audit} and has place {place}"
    )


def render_workers(status: Status) -> RenderableType:
    """The workers, on a cluster SLURM's states of the array's tasks, and what keeps the study back."""
    speed = ("busy", "images/s", "waits for")
    headings = ("worker", "job", "GPU", *speed, "trial", "epoch", "last sign", "running for")
    table = Grid(headings, left=headings, gap=2)
    epochs = {row.number: row.epochs for row in status.trials}
    for worker in status.workers:
        table.add(
            f"{worker.host}:{worker.pid}",
            worker.job or "",
            worker.gpu or "",
            share(worker.busy),
            pace(worker.images_per_second),
            waits(worker),
            str(worker.trial),
            f"{epochs[worker.trial]}/{status.max_epochs}",
            f"{worker.renewed:.0f} s ago",
            duration(worker.running_for),
        )
    lines: list[RenderableType] = [Text(), table] if status.workers else []
    if status.array_jobs:
        if status.tasks is None:
            tasks = f"its tasks are not known: {status.tasks_problem}"
        else:
            states = (f"{n} {state.lower()}" for state, n in sorted(status.tasks.items()))
            tasks = ", ".join(states) or "no task known any more"
            if status.pending:
                tasks += (
                    f" ({', '.join(f'{reason}: {n}' for reason, n in sorted(status.pending.items()))})"
                )
            if status.tasks_problem:
                tasks += f"; these may not be all: {status.tasks_problem}"
        lines.append(Text(f"SLURM {', '.join(map(job_in_words, status.array_jobs))}: {tasks}"))
    if status.overdue_seconds is not None:
        ago = duration(status.overdue_seconds)
        lines.append(
            Text(f"a lease ended {ago} ago; the next free worker takes its trial over", style="yellow")
        )
    lines += [Text(reason, style="red") for reason in status.sick_hosts]
    if status.surplus:
        lines.append(Text(surplus_line(status), style="yellow"))
    if status.stopping:
        lines.append(Text("stopped by: atelier stop; search or submit goes on", style="yellow"))
    return Group(*lines)


def render_efficiency(
    uses: Sequence[WorkerUse], advice: Sequence[str], costs: str | None, source: str
) -> RenderableType:
    """What workers were granted and made of it, a row for each and one for all; then what to ask for."""
    columns = ("queued", "time", "limit", "training", "waiting", "lost", "GiB", "granted", "busy")
    first = all(use.queued is None for use in uses)  # the column to begin with: nobody knows the queue
    table = Grid(
        ("worker", "job", *columns[first:], "pack", "epochs", "ended"), left=("worker", "job", "ended")
    )
    for use in uses:
        ended = (use.ended or ("not yet" if use.is_alive else "killed")).splitlines()[0]
        pack = "" if use.pack is None else str(use.pack)
        table.add(use.worker, use.job or "", *_shown([use])[first:], pack, str(use.epochs), ended)
    if len(uses) > 1:
        epochs = str(sum(use.epochs for use in uses))
        begun = [use for use in uses if use.epochs or not use.is_alive]  # else it still starts
        table.add("in all", "", *_shown(begun)[first:], "", epochs, "", style="bold")
    trained = any(use.epochs for use in uses)
    head = "no worker has trained an epoch yet" if not trained else "for next time: the same"
    head = "\nfor next time:" if advice else f"\n{head}"
    lines = [f"costs: {costs}"] if costs else []
    lines += [f"figures: {source}"]
    return Group(
        table,
        *(Text(line, style="dim") for line in lines),
        Text(head, style="bold"),
        *(Text(f"  {line}") for line in advice),
    )


def _shown(uses: Sequence[WorkerUse]) -> list[str]:
    """Sums of times, the most memory, and how busy the GPUs were on average over their epochs."""
    seconds = sum(use.seconds for use in uses)
    parts = [
        sum(use.seconds_training for use in uses),
        sum(use.seconds_waiting for use in uses),
        sum(use.seconds_lost for use in uses),
    ]
    queued = [use.queued for use in uses if use.queued is not None]
    granted = [use.wall_seconds for use in uses if use.wall_seconds is not None]
    busy = [(use.busy, use.seconds_training) for use in uses if use.busy is not None]
    trained = sum(weight for _, weight in busy)
    return [
        duration(sum(queued)) if queued else "",
        duration(seconds),
        duration(sum(granted)) if granted else "",
        *(share(part / seconds if seconds else None) for part in parts),
        _gib(max((use.peak_memory for use in uses if use.peak_memory), default=None)),
        _gib(max((use.memory for use in uses if use.memory), default=None)),
        share(sum(value * weight for value, weight in busy) / trained if trained else None),
    ]


def _gib(memory: float | None) -> str:
    return "" if memory is None else f"{memory / GIB:.1f}"


def share(value: float | None) -> str:
    """A share for people; empty if it is not known."""
    return "" if value is None else f"{100 * value:.0f} %"


def pace(images_per_second: float | None) -> str:
    """Images per second for people; empty if they are not known."""
    return "" if images_per_second is None else f"{images_per_second:,.0f}"


def waits(worker: WorkerRow) -> str:
    """What a worker waits for in much of its time, and how much that is."""
    is_much = worker.waits is not None and worker.waits >= MUCH
    return f"{worker.waits_for}: {share(worker.waits)}" if is_much and worker.waits_for else ""


def _spent(status: Status) -> str:
    budget = "" if status.max_gpu_hours is None else f" of {status.max_gpu_hours:g}"
    disk = "" if status.disk_bytes is None else f", {status.disk_bytes / 1e6:,.0f} MB on disk"
    return (
        f"{counted(status.processes, 'worker')}, {status.gpu_hours:.2f}{budget} GPU-hours, "
        f"{status.gpu_hours_saved:.2f} saved by pruning{disk}"
    )


def render_attempts(attempts: list[AttemptRow], newest: Path | None, lines: int) -> RenderableType:
    """The attempts with their logs, why the last trial failed, and the end of the newest log.

    The newest log is that of the last attempt, unless `newest` is given. `lines` is how many are shown.
    """
    headings = ("trial", "attempt", "worker", "job", "ended", "log")
    table = Grid(headings, left=headings, gap=2)
    for row in attempts:
        table.add(
            str(row.trial),
            str(row.attempt),
            row.worker,
            row.job or "",
            row.outcome or "not yet",
            row.log or "(terminal)",
        )
    parts: list[RenderableType] = [table]
    failed = [
        row for row in attempts if "Traceback" in (row.reason or "") or row.outcome == Outcome.FAILED
    ]
    if failed:
        last = failed[-1]
        parts += [Text(f"\ntrial {last.trial}, attempt {last.attempt}:", style="bold")]
        parts += [Text((last.reason or "").rstrip())]
    log = newest or Path(attempts[-1].log or "")
    if lines and log.is_file():
        parts += [Text(f"\n{log}:", style="bold")]
        parts += [Text("\n".join(log.read_text("utf-8", "replace").splitlines()[-lines:]))]
    elif lines and log.name:
        parts += [Text(f"\n{log} is not here (ATELIER_HOME is {home()})", style="bold")]
    return Group(*parts)


def _six_digits(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _number(value: float | int | None) -> str:
    if isinstance(value, float):
        return f"{value:.2g}"
    return "" if value is None else str(value)


def duration(seconds: float) -> str:
    """A duration for people: 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"

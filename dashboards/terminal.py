"""How text and tables are printed: to a terminal within its width, to all else plainly.

What is not a terminal, a pipe or a file, gets every row in one line, as wide as it is, and no colours;
no width in the environment counts there. A terminal that is too narrow gets its table in parts, one
below the other. Nothing is left out.

rich is imported late: whoever prints a word comes by here.
"""

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

import math
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from dashboards.tables import trial_table
from storage.paths import home
from storage.status import AttemptRow, Status, parameter_names
from storage.studies import job_in_words

ENDLESS = 1 << 20  # columns of a pipe
NARROWEST = 20  # columns that COLUMNS may say
LONGEST_WORD = 24  # what is longer (a path, a host) may go on in the next line
TERMINAL = ("TERM", "COLORTERM", "NO_COLOR")  # all that rich is told of the environment


def printable(text: str) -> str:
    """The text in one line, with escapes for what a terminal would act on: it may quote any file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def console() -> "Console":
    """Where tables go: stdout."""
    from rich.console import Console, ConsoleDimensions

    told = {name: os.environ[name] for name in TERMINAL if name in os.environ}
    found = Console(_environ=told)
    if not found.is_terminal:
        return Console(_environ={}, width=ENDLESS, color_system=None)
    columns = os.environ.get("COLUMNS", "")
    if re.fullmatch("[0-9]{1,6}", columns) and int(columns) >= NARROWEST:
        found.width = int(columns)
    if found.is_dumb_terminal:  # rich takes those for 80 columns wide
        width, height = os.get_terminal_size(found.file.fileno())
        found.size = ConsoleDimensions(width or 80, height or 25)
    return found


def is_drawn_on(console: "Console") -> bool:
    """Whether what was printed there can be drawn anew, as a live view is."""
    return console.is_terminal and not console.is_dumb_terminal


class Grid:
    """A table that loses nothing, for a console of any width; rich renders it.

    The headings of `left` are above text, all others above numbers. Words of up to
    LONGEST_WORD letters stay whole.
    """

    def __init__(self, headings: Sequence[str], left: Sequence[str] = (), gap: int = 1) -> None:
        self._headings, self._gap = headings, gap
        self._justify = ["left" if heading in left else "right" for heading in headings]
        self._rows: list[tuple[Sequence[str], str | None]] = []

    def add(self, *cells: str, style: str | None = None) -> None:
        """Append a row, with a cell for every heading."""
        self._rows.append(([printable(cell) for cell in cells], style))

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.cells import cell_len
        from rich.table import Table

        columns = [
            [heading, *(cells[index] for cells, _ in self._rows)]
            for index, heading in enumerate(self._headings)
        ]
        natural = [max(map(cell_len, cells)) for cells in columns]
        words = [
            max(cell_len(word) for cell in cells for word in [*cell.split(), ""]) for cells in columns
        ]
        most = min(LONGEST_WORD, (options.max_width - self._gap) // 2)  # two have room beside each other
        least = [min(word, most) for word in words]
        for part in self._parts(least, options.max_width):
            spare = options.max_width - self._width(part, least)
            table = Table(box=None, padding=(0, self._gap, 0, 0), pad_edge=False, header_style="bold")
            for index in part:
                more = min(natural[index] - least[index], spare)
                spare -= more
                table.add_column(
                    self._headings[index],
                    justify=self._justify[index],  # type: ignore[arg-type]
                    overflow="fold",
                    width=least[index] + more,
                )
            for cells, style in self._rows:
                table.add_row(*(cells[index] for index in part), style=style)
            yield table

    def _width(self, part: Sequence[int], widths: Sequence[int]) -> int:
        return sum(widths[index] for index in part) + self._gap * (len(part) - 1)

    def _parts(self, least: Sequence[int], width: int) -> list[list[int]]:
        """The columns of each part. All begin with the first, by which a row is known."""
        parts = [[0]]
        for index in range(1, len(least)):
            if len(parts[-1]) > 1 and self._width([*parts[-1], index], least) > width:
                parts.append([0])
            parts[-1].append(index)
        return parts


def render_trials(status: Status) -> RenderableType:
    """The trials for people, all of them: numbers with six digits, blanks for what is not known."""
    names, rows = trial_table(status.trials)
    hidden = {"reason"} if any(row.audit for row in status.trials) else {"reason", "audit"}
    names = [name for name in names if name not in hidden]
    table = Grid(names, left=("state", "worker", "audit"), gap=2)
    for row in rows:
        table.add(*(_six_digits(row.get(name)) for name in names))
    return table


def progress_line(status: Status) -> str:
    """The study in one line, for logs and for output that is not a terminal."""
    counts = ", ".join(f"{n} {state}" for state, n in status.counts.items() if n)
    best = status.best
    leader = f"; best {best.value:.4f} (trial {best.number})" if best else ""
    # Before a trial is complete nobody knows how long one takes.
    left = status.seconds_left if best else None
    ahead = f"; about {duration(math.ceil(left / 10) * 10)} left" if left else ""
    done = f"{status.finished}/{status.max_trials} trials"
    return f"{done} ({counts or 'none yet'}) in {duration(status.seconds)}{leader}{ahead}"


def render(status: Status, rows: int = 12) -> RenderableType:
    """The study as a table: those in work first, then the best."""
    names = parameter_names(status.trials)
    headings = [name.replace("_", " ") for name in names]  # they fold between words
    table = Grid(["trial", "state", "epoch", "accuracy", "score", *headings], left=["state"])
    for row in status.ranked()[:rows]:
        table.add(
            str(row.number),
            "resumed" if row.resumed else row.state,
            f"{row.epochs}/{status.max_epochs}",
            "" if row.accuracy is None else f"{row.accuracy:.4f}",
            "" if row.value is None else f"{row.value:.4f}",
            *(_number(row.params.get(name)) for name in names),
            style="dim" if row.state in ("paused", "pruned") else None,
        )
    head = Text(f"{status.study}: {progress_line(status)}", style="bold")
    lines = filter(None, [_spent(status), audit_line(status)])
    return Group(head, table, *(Text(line, style="dim") for line in lines))


def audit_line(status: Status) -> str:
    """How often the strategy would have been wrong; empty if no audited trial tells yet."""
    complete = status.completed()
    stopped = [(place, row) for place, row in enumerate(complete, 1) if row.audit]
    if not stopped or len(complete) < 3:
        return ""
    place, best = stopped[0]
    good = sum(place <= len(complete) / 3 for place, _ in stopped)
    return (
        f"Audit: {_count(len(stopped), 'complete trial')} would have been stopped, {good} of them in "
        f"the best third of all {len(complete)} (by chance {len(stopped) / 3:.0f}); the best, trial "
        f"{best.number}, would have been {best.audit} and has place {place}"
    )


def render_workers(status: Status) -> RenderableType:
    """Who is at work, and on a cluster what SLURM says of the array."""
    headings = ("worker", "job", "GPU", "trial", "epoch", "last sign", "running for")
    table = Grid(headings, left=headings, gap=2)
    epochs = {row.number: row.epochs for row in status.trials}
    for worker in status.workers:
        table.add(
            f"{worker.host}:{worker.pid}",
            worker.job or "",
            worker.gpu or "",
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
        waiting = f"{_count(status.surplus, 'enqueued trial')} beyond study.max_trials"
        lines.append(Text(f"{waiting}: with a larger one, they begin", style="yellow"))
    if status.stopping:
        lines.append(Text("stopped by: atelier stop; search or submit goes on", style="yellow"))
    return Group(*lines)


def _spent(status: Status) -> str:
    budget = "" if status.max_gpu_hours is None else f" of {status.max_gpu_hours:g}"
    disk = "" if status.disk_bytes is None else f", {status.disk_bytes / 1e6:,.0f} MB on disk"
    return (
        f"{_count(status.processes, 'worker')}, {status.gpu_hours:.2f}{budget} GPU-hours, "
        f"{status.gpu_hours_saved:.2f} saved by pruning{disk}"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def render_attempts(attempts: list[AttemptRow], newest: Path | None, lines: int) -> RenderableType:
    """Attempts with their logs; why the last trial failed; the last lines of the newest log.

    That is the last attempt's, unless `newest` is given.
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
    failed = [one for one in attempts if "Traceback" in (one.reason or "") or one.outcome == "failed"]
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
    """As people say it: 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"

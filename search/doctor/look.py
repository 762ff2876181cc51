"""`atelier doctor`: all its questions in their order, and the answers as a table."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter

from dashboards.terminal import Grid
from search.doctor import database, files, folders, machine, site
from search.doctor.check import Check, State, ask
from search.study_config import StudyConfig

STYLES = {State.WRONG: "bold red", State.NOTE: "yellow"}
Question = tuple[str, Callable[[], Iterable[Check]]]
MACHINE: list[Question] = [
    ("python", machine.python),
    ("packages", machine.packages),
    ("gpus", machine.gpus),
    ("memory", machine.memory),
    ("ulimit", machine.shell_limits),
]
FOLDERS: list[Question] = [
    ("home", folders.home_folder),
    ("quota", folders.quota),
    ("tmpdir", folders.temporary),
]
# What `atelier submit` does not ask itself, and nobody sees before the jobs run.
ABOUT_JOBS: list[Question] = [
    ("ulimit", machine.shell_limits),
    ("home", folders.home_folder),
]


def checks_here(file: StudyConfig | None, profile: str, given: bool) -> Iterator[Check]:
    """All checks on this machine. `given` tells whether somebody named the profile."""
    questions: list[Question] = [
        *MACHINE,
        *FOLDERS,
        ("database", partial(database.database_here, file.study.name if file else None)),
        ("slurm", partial(site.slurm, file, profile, given)),
    ]
    if file is not None:
        questions += [
            ("weights", partial(files.weights, file)),
            ("dataset", partial(files.dataset, file)),
        ]
    for name, question in questions:
        yield from ask(name, question)


def about_jobs() -> list[str]:
    """What is wrong for jobs from here, in lines. `submit` asks all the rest itself."""
    checks = [check for name, question in ABOUT_JOBS for check in ask(name, question)]
    return [
        f"warning: {check.name}: {check.found}; {check.next}"
        for check in checks
        if check.state is State.WRONG
    ]


def render(checks: Sequence[Check]) -> Grid:
    """A table with a row for each check, and below it what to do.

    Each place has its own part. Of another place only those checks are shown that differ from here.
    """
    table = Grid(("", "check", "found"), left=("", "check", "found"), gap=2)
    here = {(check.name, check.state, check.found) for check in checks if check.where == checks[0].where}
    for where, group in groupby(checks, attrgetter("where")):
        shown = every = [*group]
        if where != checks[0].where:
            shown = [one for one in every if (one.name, one.state, one.found) not in here]
            same = len(every) - len(shown)
            table.add("", "", f"{where}{f': as here in {same} checks' if same else ''}", style="bold")
        for check in shown:
            style = STYLES.get(check.state)
            table.add(check.state, check.name, check.found, style=style)
            if check.next:
                table.add("", "", f"next: {check.next}", style=style)
    return table

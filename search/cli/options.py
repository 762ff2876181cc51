"""The arguments and options that several verbs share, and what is done with them."""

from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sa
import typer

from dashboards.terminal import say
from search.cli.completion import study_files
from search.cli.finding import find_study, is_file
from search.confirm.plan import recorded
from search.errors import InputError
from search.slurm.script import about_environment
from search.study_config import StudyConfig
from search.toml_file import load_study_file
from storage.studies import StudyEntry
from trainer.allocation import visible_gpus

MOST_PACKED = 64
ARRAY, TUNING = "0-7%4", "tuning"  # the array and the profile of a search's jobs

StudyPath = Annotated[
    Path, typer.Argument(help="Study file, as in fashion.toml.", autocompletion=study_files)
]
Output = Annotated[Path, typer.Option("-o", "--output", help="Where the best configuration goes.")]
Data = Annotated[str | None, typer.Option("--data", help="Dataset folder, instead of the file's.")]
Weights = Annotated[str | None, typer.Option("--weights", help="Weights file, instead of the file's.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, as in train.epochs=10. May be repeated."),
]
AUTO = "auto"
CPU_WORKERS = 2  # of a search on this machine without a GPU
Workers = Annotated[
    int | None,
    typer.Option(min=1, help=f"Worker processes; default: one for each GPU, else {CPU_WORKERS}."),
]
Pack = Annotated[
    str | None,
    typer.Option(
        help=f"Trials that a worker trains at once, 1 to {MOST_PACKED}; {AUTO}: as many as fit; "
        f"default: {AUTO} on a GPU, else 1."
    ),
]
# The options of `submit`, `confirm --submit` and `train --submit`.
Submit = Annotated[bool, typer.Option("--submit", help="Train in SLURM instead of here.")]
Array = Annotated[
    str | None, typer.Option(help=f"Array tasks that are submitted, as for sbatch; default: {ARRAY}.")
]
Profile = Annotated[
    str | None,
    typer.Option(help="The file's [slurm.*] table; default: tuning, for atelier train final."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Submit nothing; print the batch script.")]


def goes_to_slurm(submit: bool, dry_run: bool, **details: str | None) -> bool:
    """Whether a verb submits a job instead of training here.

    Raises InputError if it does not, but `details`, which describe the job, are given.
    """
    if submit or dry_run:
        return True
    for name, value in details.items():
        if value is not None:
            raise InputError(f"--{name} goes with --submit; add that, or leave out --{name}")
    return False


def load_study(
    path: Path, data: str | None, weights: str | None, settings: list[str] | None
) -> StudyConfig:
    """Read a study file, with what the options change in it. Raises InputError."""
    paths = [
        f"train.{key}={_quoted(value)}"
        for key, value in (("data", data), ("weights", weights))
        if value is not None
    ]
    return load_study_file(path, [*(settings or []), *paths])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def file_or_recorded(
    study: str, data: str | None, weights: str | None, settings: list[str] | None
) -> StudyConfig:
    """The settings of a study file, or of a study on record, with what the options change in them.

    Raises InputError.
    """
    if is_file(study):
        return load_study(Path(study), data, weights, settings)
    if settings:
        raise InputError("--set goes with a study file; a study on record has its settings")
    return recorded_study(find_study(study)[1], data, weights)


def recorded_study(entry: StudyEntry, data: str | None, weights: str | None) -> StudyConfig:
    """A study's settings as they are on record, with other paths where the options give some."""
    return (recorded(entry) or StudyConfig.from_record(entry)).with_paths(data, weights)


def find_search(name_or_file: str) -> tuple[sa.Engine, StudyEntry]:
    """Find a study that exists and is no confirmation of another. Raises InputError."""
    engine, entry = find_study(name_or_file)
    if (confirmation := recorded(entry)) is not None:
        raise InputError(
            f"{entry.name!r} is the confirmation of a search; name that: {confirmation.confirms}"
        )
    return engine, entry


def worker_options(
    data: str | None, weights: str | None, settings: list[str] | None, pack: str | None
) -> list[str]:
    """The same options for `atelier worker`."""
    options = [
        ("--data", data),
        ("--weights", weights),
        *(("--set", setting) for setting in settings or []),
        ("--pack", pack),
    ]
    return [word for name, value in options if value is not None for word in (name, value)]


def workers_here(workers: int | None) -> int:
    """How many workers to start on this machine: as many as its GPUs, unless a number is given."""
    return workers or len(visible_gpus()) or CPU_WORKERS


def pack_here(pack: str | None, workers: int) -> str | None:
    """The pack of so many workers on this machine. Those that share a GPU share its memory.

    Raises InputError if they cannot have it.
    """
    check_pack(pack)
    if pack == AUTO and workers > 1:
        raise InputError(
            f"--pack auto with {workers} workers: each would take all of the memory; give "
            "--workers 1, or a number"
        )
    return "1" if pack is None and workers > len(visible_gpus()) else pack


def check_pack(pack: str | None) -> None:
    """Raises InputError for what is no pack."""
    if pack not in (None, AUTO, *map(str, range(1, MOST_PACKED + 1))):
        raise InputError(f"--pack {pack!r}: allowed is a number from 1 to {MOST_PACKED}, or {AUTO}")


def print_script(script: str) -> None:
    """Print a batch script, and on stderr what sbatch would get of this environment."""
    say_each(about_environment(script))
    typer.echo(script, nl=False)


def with_torch() -> Any:
    """The module with what the verbs do that need PyTorch. Call it when all else is checked."""
    from search.cli import training  # late: with torch, which wrong input need not wait for

    return training


def say_each(lines: list[str]) -> None:
    """Print lines to stderr."""
    for line in lines:
        say(line)

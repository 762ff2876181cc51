"""The verb init: what to begin a search with, and what to type next."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from dashboards.terminal import printable
from search.cli.options import Data, Weights, check_output, command
from search.errors import InputError
from search.init import Draft, draft_for_machine, draft_for_site
from search.slurm.environment import habits
from search.slurm.submit import check_weights
from storage.ownership import with_users_umask
from storage.url import configured_url
from trainer.dataset import DatasetError, read_dataset


def init(
    template: Annotated[
        Path | None,
        typer.Argument(help="Study file to begin with; default: one that is ready, by the GPUs."),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")] = Path(
        "study.toml"
    ),
    partition: Annotated[
        str | None, typer.Option(help="This one of SLURM's partitions, instead of the best.")
    ] = None,
    account: Annotated[str | None, typer.Option(help="SLURM's account that pays.")] = None,
    local: Annotated[
        bool, typer.Option("--local", help="For this machine alone, also where SLURM is.")
    ] = False,
    data: Data = None,
    weights: Weights = None,
) -> None:
    """Write a study file for this site or this machine.

    It asks SLURM for partitions, limits and GPUs, and sbatch whether it accepts what it writes.
    """
    check_output(output)
    if output.exists():
        raise InputError(f"{output}: there is a file already; give another name with -o, or remove it")
    changes = {key: value for key, value in (("data", data), ("weights", weights)) if value is not None}
    if local or shutil.which("sbatch") is None:
        if partition or account:
            raise InputError(
                "--partition and --account are of SLURM, which is not asked here; leave them out"
            )
        draft = draft_for_machine(template, changes)
    else:
        usual = habits()
        draft = draft_for_site(template, changes, partition or usual[0], account or usual[1])
    with with_users_umask(), output.open("x", encoding="utf-8") as file:
        file.write(draft.text)
    for line in draft.found:
        typer.echo(printable(line))
    typer.echo(f"written: {output}; next:")
    for line in _next_steps(draft, output):
        typer.echo(f"  {line}")


def _next_steps(draft: Draft, path: Path) -> list[str]:
    """What is still missing, then the commands to type."""
    config = draft.config.shared
    steps = []
    try:
        read_dataset(config.data, unknown_labels=config.unknown_labels)
    except DatasetError as error:
        steps.append(f"# {error}")
    try:
        if draft.array or config.weights != "timm":  # which a machine with internet downloads
            check_weights(config)
    except InputError as error:
        steps.append(f"# {error}")
    if draft.array is None:
        return [*steps, command("search", str(path))]
    if configured_url() is None:
        steps.append(command("db", "start", "--listen", "ADDRESS") + "  # or another: docs/cluster.md")
    submit = command("submit", str(path), "--array", draft.array)
    return [*steps, f"{submit} --dry-run", submit]

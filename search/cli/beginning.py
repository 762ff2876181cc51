"""The verbs that write a study file: example and init."""

from pathlib import Path
from typing import Annotated

import typer

from dashboards.outputs import check_output
from dashboards.terminal import printable, say
from search.cli.finding import command
from search.cli.options import Data, Weights
from search.errors import InputError
from search.init import Draft, draft_for_machine, draft_for_site
from search.slurm.environment import habits
from search.slurm.site import absent_commands
from search.slurm.submit import check_weights
from search.study_config import NO_FILE
from search.toml_file import READY
from storage.ownership import with_users_umask
from storage.url import configured_url
from trainer.dataset import DatasetError, read_dataset
from trainer.text import read_text


def example(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A ready study file, as in fashion.toml; default: list them.",
            autocompletion=lambda: list(_ready()),
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write it; default: here.")
    ] = None,
) -> None:
    """Write a ready study file, to be edited, or list those that there are."""
    files = _ready()
    if name is None:
        width = max(map(len, files))
        for file, path in files.items():
            first = read_text(path).partition("\n")[0]
            typer.echo(f"{file:{width}}  {first.removeprefix('# ')}")
        return
    if name not in files:
        raise InputError(f"no ready study file {name!r}; there are: {', '.join(files)}")
    output = output or Path(name)
    check_output(output)
    try:
        with with_users_umask(), output.open("xb") as copy:
            copy.write(files[name].read_bytes())
    except FileExistsError:
        raise InputError(f"{output} exists; remove it, or give another --output") from None
    say(f"wrote {output}; edit it, then: {command('search', str(output), '--data', 'FOLDER')}")


def _ready() -> dict[str, Path]:
    """The ready study files, by name."""
    return {path.name: path for path in sorted(READY.glob("*.toml"))}


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
    # Absolute, since the file may be used from another folder.
    changes = {} if data is None else {"data": str(Path(data).absolute())}
    if weights is not None:
        changes["weights"] = weights if weights in NO_FILE else str(Path(weights).absolute())
    if local or "sbatch" in absent_commands():
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

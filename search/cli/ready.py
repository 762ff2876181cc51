"""The verbs for a beginning: demo runs a whole search, example writes a ready study file."""

from pathlib import Path
from typing import Annotated

import typer

from search.cli.errors import say
from search.cli.options import Output, Set, Workers, command, load_study
from search.cli.searching import search
from search.errors import InputError
from storage.ownership import with_users_umask
from trainer.demo import write_demo
from trainer.text import read_text

READY = Path(__file__).parents[2] / "studies"  # of the clone, or beside the installed packages


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
    try:
        with with_users_umask(), output.open("xb") as copy:
            copy.write(files[name].read_bytes())
    except FileExistsError:
        raise InputError(f"{output} exists; remove it, or give another --output") from None
    say(f"wrote {output}; edit it, then: {command('search', str(output), '--data', 'FOLDER')}")


def _ready() -> dict[str, Path]:
    """The ready study files, by name."""
    return {path.name: path for path in sorted(READY.glob("*.toml"))}

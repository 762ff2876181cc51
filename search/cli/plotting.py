"""The verb plot, in a module of its own because it draws."""

from pathlib import Path
from typing import Annotated

import typer

from dashboards.plot import plot_study
from dashboards.terminal import say
from search.cli.finding import StudyName, find_study
from storage.ownership import with_users_umask


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

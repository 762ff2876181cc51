"""`atelier data`: draws a dataset, or checks one."""

from pathlib import Path
from typing import Annotated

import typer

from dashboards.terminal import printable
from search.cli import group_of_verbs
from search.json_output import AsJson, print_json
from storage.ownership import with_users_umask
from storage.words import counted
from trainer.check import check_dataset, summary
from trainer.dataset import DatasetError
from trainer.demo import write_demo

MOST_DRAWN = 1_000_000  # images of a split
data_app = group_of_verbs("data")


@data_app.command("check")
def data_check(folder: Path, as_json: AsJson = False) -> None:
    """Check a dataset, and list errors and warnings with file and line.

    Exit codes: 0 it can be used, though there may be warnings, 2 it has errors.
    """
    dataset, findings = check_dataset(folder)
    if as_json:
        images = {name: len(split) for name, split in dataset.splits.items()} if dataset else {}
        print_json(folder=folder, images=images, findings=findings)
    else:
        for finding in findings:
            typer.echo(printable(f"{'error' if finding.is_error else 'warning'}: {finding}"))
    if dataset is None or any(finding.is_error for finding in findings):
        raise DatasetError(f"{folder} has {summary(findings)}; correct what is marked error")
    if as_json:
        return
    counts = ", ".join(f"{len(split)} {name}" for name, split in dataset.splits.items())
    typer.echo(
        f"{folder}: {counts}; {counted(len(dataset.attributes), 'attribute')}; {summary(findings)}"
    )
    if all(split.labels is None for split in dataset.splits.values()):
        splits = " or ".join(dataset.splits)
        typer.echo(f"without labels it is good for: atelier predict --split {splits}")


@data_app.command("demo")
def data_demo(
    folder: Path,
    train_images: Annotated[int, typer.Option("--train", min=1, max=MOST_DRAWN)] = 1000,
    val_images: Annotated[int, typer.Option("--val", min=1, max=MOST_DRAWN)] = 400,
    test_images: Annotated[int, typer.Option("--test", min=1, max=MOST_DRAWN)] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a small generated dataset of drawn garments."""
    with with_users_umask():
        write_demo(folder, train_images, val_images, test_images, seed)
    typer.echo(f"wrote {folder}; check it with: atelier data check {folder}")

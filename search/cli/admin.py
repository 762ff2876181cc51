"""`atelier data` and `atelier user`: datasets, and the dashboard's accounts."""

from pathlib import Path
from typing import Annotated

import typer

from dashboards.terminal import printable
from dashboards.web.accounts import Accounts
from search.cli import group_of_verbs
from search.cli.errors import say
from storage.ownership import with_users_umask
from trainer.check import check_dataset, summary
from trainer.dataset import DatasetError
from trainer.demo import write_demo
from trainer.text import read_text

data_app, user_app = group_of_verbs("data"), group_of_verbs("user")


@data_app.command("check")
def data_check(folder: Path) -> None:
    """Check a dataset; list what is wrong, and what may mislead, with file and line.

    Exit codes: 0 nothing is wrong, though there may be warnings, 2 it cannot be used as it is.
    """
    dataset, findings = check_dataset(folder)
    for one in findings:
        typer.echo(printable(f"{'error' if one.is_error else 'warning'}: {one}"))
    if dataset is None or any(one.is_error for one in findings):
        raise DatasetError(f"{folder} has {summary(findings)}; mend what is marked error")
    counts = ", ".join(f"{len(split)} {name}" for name, split in dataset.splits.items())
    typer.echo(f"{folder}: {counts}; {len(dataset.attributes)} attributes; {summary(findings)}")
    if all(split.labels is None for split in dataset.splits.values()):
        able = " or ".join(dataset.splits)
        typer.echo(f"without labels it is good for: atelier predict --split {able}")


@data_app.command("demo")
def data_demo(
    folder: Path,
    train_images: Annotated[int, typer.Option("--train", min=1)] = 1000,
    val_images: Annotated[int, typer.Option("--val", min=1)] = 400,
    test_images: Annotated[int, typer.Option("--test", min=1)] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a small generated dataset of drawn garments."""
    with with_users_umask():
        write_demo(folder, train_images, val_images, test_images, seed)
    typer.echo(f"wrote {folder}; check it with: atelier data check {folder}")


@user_app.command("add")
def user_add(
    name: str,
    role: Annotated[
        str, typer.Option(help="viewer: looks; editor: also changes and deletes.")
    ] = "viewer",
    password_file: Annotated[
        Path | None, typer.Option(help="Read the password from the first line; default: ask.")
    ] = None,
) -> None:
    """Add somebody, or give a new role and password; older sessions end."""
    if password_file is None:
        password = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    else:
        password = read_text(password_file).partition("\n")[0]
    Accounts().put(name, role, password)
    typer.echo(f"{name} may log in as {role}")


@user_app.command("remove")
def user_remove(name: str) -> None:
    """Let somebody in no longer; their sessions end."""
    Accounts().remove(name)
    typer.echo(f"{name} may not log in any more")


@user_app.command("list")
def user_list() -> None:
    """Show who may log in."""
    accounts = Accounts().all()
    for account in accounts.values():
        typer.echo(f"{account.name}: {account.role}")
    if not accounts:
        say("nobody yet; add somebody with: atelier user add NAME")

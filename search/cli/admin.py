"""`atelier data` and `atelier user`: datasets, and the dashboard's accounts."""

from pathlib import Path
from typing import Annotated

import typer

from dashboards.terminal import printable, say
from dashboards.web.accounts import Accounts
from search.cli import group_of_verbs
from search.json_output import AsJson, print_json
from storage.ownership import with_users_umask
from storage.words import counted
from trainer.check import check_dataset, summary
from trainer.dataset import DatasetError
from trainer.demo import write_demo
from trainer.text import read_text

MOST_DRAWN = 1_000_000  # images of a split
data_app, user_app = group_of_verbs("data"), group_of_verbs("user")


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


@user_app.command("add")
def user_add(
    name: str,
    role: Annotated[
        str, typer.Option(help="viewer: may look; editor: may also change and delete.")
    ] = "viewer",
    password_file: Annotated[
        Path | None, typer.Option(help="File whose first line is the password; default: ask.")
    ] = None,
) -> None:
    """Add an account, or give it a new role and password, which ends its sessions."""
    if password_file is None:
        password = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    else:
        password = read_text(password_file).partition("\n")[0]
    Accounts().put(name, role, password)
    typer.echo(f"{name} may log in as {role}")


@user_app.command("remove")
def user_remove(name: str) -> None:
    """Remove an account, which ends its sessions."""
    Accounts().remove(name)
    typer.echo(f"{name} may not log in any more")


@user_app.command("list")
def user_list(as_json: AsJson = False) -> None:
    """Show who may log in."""
    accounts = Accounts().all()
    if as_json:
        print_json(users=[{"name": one.name, "role": one.role} for one in accounts.values()])
        return
    for account in accounts.values():
        typer.echo(f"{account.name}: {account.role}")
    if not accounts:
        say("nobody yet; add somebody with: atelier user add NAME")

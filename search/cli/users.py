"""`atelier user`: who may log in to the dashboard."""

from pathlib import Path
from typing import Annotated

import typer

from dashboards.terminal import say
from dashboards.web.accounts import Accounts
from search.cli import group_of_verbs
from search.json_output import AsJson, print_json
from trainer.text import read_text

user_app = group_of_verbs("user")


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

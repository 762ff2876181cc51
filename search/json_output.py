"""What `--json` prints: facts for programs, in the form that docs/json.md states."""

from typing import Annotated, Any

import typer

JSON_VERSION = 1  # a key that goes or changes its meaning makes it a higher one
AsJson = Annotated[bool, typer.Option("--json", help="For programs; docs/json.md has the form.")]


def print_json(**facts: Any) -> None:
    """Print facts as an object. What is not a number in JSON becomes null."""
    from pydantic_core import to_json  # late: of a short command it would be a thirtieth

    text = to_json({"version": JSON_VERSION} | facts, indent=2, inf_nan_mode="null")
    typer.echo(text.decode())

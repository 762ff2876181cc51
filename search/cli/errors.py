"""Every error of a command becomes one line on stderr and an exit code."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from dashboards.terminal import printable, say
from search.error_lines import exit_code, one_line
from search.exit_codes import ExitCode


@contextmanager
def errors_in_one_line(group: Any = None) -> Iterator[None]:
    """End the command with one line for any error that is not a fault of ours, which is raised again.

    `group` is the context of the group whose verb is read, if there is one. Raises typer.Exit.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        say("interrupted; the same command, given again, goes on")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except typer.TyperException as error:
        if _is_help(error):
            raise
        say(f"error: {printable(_usage(error))}; see: {_help_command(error, group)}")
        raise typer.Exit(ExitCode.WRONG_INPUT) from None
    except Exception as error:  # `one_line` tells the user's from ours, which are raised again
        line = one_line(error)
        if line is None:
            raise
        say(f"error: {line}")
        raise typer.Exit(exit_code(error)) from None


def _is_help(error: Any) -> bool:
    """Whether no arguments were given at all: then the message is the help."""
    context = getattr(error, "ctx", None)
    return context is not None and error.message == context.get_help()


def _help_command(error: Any, group: Any) -> str:
    """The command that shows the help of the verb whose options are wrong."""
    context, words = getattr(error, "ctx", None), []
    if context is None and group is not None:  # errors of the parser have no context
        context, words = group, [group.invoked_subcommand]
    while context is not None and context.parent is not None:
        context, words = context.parent, [context.info_name, *words]
    return shlex.join(["atelier", *words, "--help"])


def _usage(error: typer.TyperException) -> str:
    """What is wrong with an option or an argument."""
    details = getattr(error.__cause__, "errors", None)  # of pydantic's ValidationError
    if isinstance(error, typer.BadParameter) and error.param and details:
        from search.typed import in_our_words  # late: `atelier --help` would wait for pydantic

        name = error.param.get_error_hint().replace("'", "")
        return f"{name}: {in_our_words(details()[0])}"
    text = error.format_message().rstrip(".")
    return text[:1].lower() + text[1:]

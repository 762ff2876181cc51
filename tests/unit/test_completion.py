"""What Tab offers, in a real bash and as zsh and fish ask for it."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from storage.paths import RunFolder

ATELIER = Path(sys.executable).with_name("atelier")
# Bash sets these variables on Tab, and reads COMPREPLY.
TAB = """
source <(atelier --show-completion)
complete -p atelier > /dev/null || exit
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_atelier_completion atelier
printf '%s\\n' "${COMPREPLY[@]}"
"""
OFFERED = {
    "verbs": (["st"], ["stop", "status"]),
    "options": (["submit", "--dr"], ["--dry-run"]),
    "verbs of a group": (["db", "st"], ["start", "stop", "status"]),
    "studies and study files": (["status", ""], ["demo", "größe", "mine.toml", "studies/fashion.toml"]),
    "a study that begins so": (["confirm", "gr"], ["größe"]),
    "a study for an optional argument": (["db", "prune", "d"], ["demo"]),
    "a study file": (["search", "st"], ["studies/fashion.toml"]),
    "a study for a worker": (["worker", "dem"], ["demo"]),
    "ready study files": (["example", "f"], ["fashion-cpu.toml", "fashion.toml"]),
    "no study that begins so": (["status", "x"], []),
}


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """A folder with study files, and a home with studies. No database is there."""
    for name in ("demo", "größe", "a b", "$(touch x)"):
        RunFolder(name, datetime.now(UTC)).make()
    RunFolder("deleted", datetime.now(UTC)).make().mark_deleted()
    (tmp_path / "studies").mkdir()
    for name in ("mine.toml", "studies/fashion.toml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(words, **changed):
    """What a command prints; it must say nothing on stderr."""
    path = f"{ATELIER.parent}:{os.environ['PATH']}"
    asked = subprocess.run(
        words, env=os.environ | {"PATH": path} | changed, capture_output=True, text=True
    )
    assert asked.stderr == ""
    return asked.stdout.split("\n")


@pytest.mark.parametrize("name", OFFERED)
def test_bash_offers(name, here, home):
    words, expected = OFFERED[name]
    offered = ask(["bash", "--norc", "-c", TAB, "bash", "atelier", *words])
    assert [line for line in offered if line] == expected
    assert [path.name for path in home.iterdir()] == ["runs"]  # no database was started


def test_zsh_and_fish_get_the_same(here):
    line = {"_TYPER_COMPLETE_ARGS": "atelier status d"}
    assert ask(["atelier"], _ATELIER_COMPLETE="complete_zsh", **line)[0] == (
        "_arguments '*: :((\"demo\"))'"
    )
    fish = {"_ATELIER_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert ask(["atelier"], **fish, **line)[0] == "demo"


def test_a_home_that_is_not_there_offers_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    offered = ask(["bash", "--norc", "-c", TAB, "bash", "atelier", "status", ""])
    assert offered == ["", ""]
    assert not list(tmp_path.iterdir())

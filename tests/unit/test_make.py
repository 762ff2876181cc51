"""What `make venv` says before it downloads anything."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LACKING = {  # what a Python fails at, or a setting; what make says
    "no Python": (None, [], "is no Python 3.11 or newer; install one or name another"),
    "an old Python": ("version_info", [], "is no Python 3.11 or newer; install one or name another"),
    "no venv": ("ensurepip", [], "has no venv; on Debian and Ubuntu: apt install python3-venv"),
    "no certificates": (
        "ssl",
        [],
        "no certificates to download with; on Debian and Ubuntu: apt install ca-cert",
    ),
    "a full disk": ("", ["MEGABYTES=999999999"], "less than 999999999 MB are free here"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_is_missing_is_said_before_anything_is_downloaded(name, tmp_path):
    fails_at, settings, expected = LACKING[name]
    for file in ("Makefile", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / file, tmp_path)
    python = tmp_path / "python"
    if fails_at is not None:
        fails = f'case "$2" in *{fails_at}*) exit 1;; esac\n' if fails_at else ""
        python.write_text(f'#!/bin/sh\n{fails}exec {sys.executable} "$@"\n')
        python.chmod(0o755)
    result = subprocess.run(
        ["make", "venv", f"PYTHON={python}", *settings], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert expected in result.stderr.splitlines()[0]
    assert not (tmp_path / ".venv").exists()

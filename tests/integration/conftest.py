"""The command as a user types it, in a folder of the test's own."""

import os
import subprocess
import sys

import pytest


@pytest.fixture
def atelier(tmp_path, study_text, database_url, home):
    """Runs `atelier WORDS` beside a study.toml, and checks the exit code."""
    (tmp_path / "study.toml").write_text(study_text)

    def run(*words, code=0):
        result = subprocess.run(
            [sys.executable, "-m", "search", *map(str, words)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == code, result.stderr + result.stdout
        return result

    return run

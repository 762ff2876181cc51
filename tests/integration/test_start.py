"""The installed command runs this project's code, whatever else has its packages' names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ATELIER = Path(sys.executable).with_name("atelier")
OTHERS = (
    "search.py",
    "search/__init__.py",
    "storage.py",
    "trainer/__init__.py",
    "dashboards/__init__.py",
)
STOLEN = "raise SystemExit('this is somebody else\\'s')\n"


def run(folder, *words, **environment):
    return subprocess.run(
        [ATELIER, *words], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.fixture
def others(tmp_path):
    """A folder with other packages of these names."""
    folder = tmp_path / "others"
    for name in OTHERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(STOLEN)
    return folder


@pytest.mark.parametrize("path", ["{}", "{}:", ":", ":{}", "{}/nowhere:{}"])
def test_no_folder_on_the_path_takes_the_place_of_our_packages(path, others, demo):
    result = run(others, "data", "check", str(demo), PYTHONPATH=path.format(others, others))
    assert (result.returncode, result.stderr) == (0, ""), result
    assert "no errors" in result.stdout


def test_nor_in_the_processes_of_a_search(others, study_text, prepared_url, home):
    (others / "study.toml").write_text(study_text)
    few = ("--set", "study.max_trials=1", "--set", "train.epochs=2", "--workers", "1")
    result = run(others, "search", "study.toml", *few, PYTHONPATH=f"{others}:")
    assert result.returncode == 0, result
    assert "1/1 trials (1 complete)" in result.stdout

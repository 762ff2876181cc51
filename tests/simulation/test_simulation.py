"""The simulation itself: it finds what is planted, shrinks it, and repeats it."""

import re
import subprocess
import sys

import pytest

from tests.simulation.shrink import shrink


def simulate(*words):
    result = subprocess.run(
        [sys.executable, "-m", "tests.simulation", *words], capture_output=True, text=True
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result


def test_a_plant_is_found_shrunk_and_repeated_by_the_command_that_is_printed():
    found = simulate("--plant", "no-sweep", "--faults", "1000")
    assert found.returncode == 1
    [command] = re.findall(r"^python -m tests\.simulation (.*)$", found.stdout, re.MULTILINE)
    seed, faults = re.findall(r'--seed (\d+) --only "(.*)"', command)[0]
    assert len(faults.split(",")) <= 5
    again = simulate("--seed", seed, "--only", faults, "--plant", "no-sweep")
    assert again.returncode == 1
    assert "nothing_is_left" in again.stdout
    without = simulate("--seed", seed, "--only", faults)
    assert without.returncode == 0, without.stdout


def test_a_search_without_faults_breaks_no_rule_and_trains_all_its_trials():
    result = simulate("--seed", "1", "--only", "")
    assert result.returncode == 0, result.stdout
    assert "faults: []" in result.stdout
    assert re.search(r"trials: .*COMPLETE", result.stdout)


@pytest.mark.parametrize("cause", [["c"], ["b", "f"], ["a", "b", "g"], []])
def test_shrinking_keeps_the_cause_alone(cause):
    tried = []

    def fails(faults):
        tried.append(faults)
        return set(cause) <= set(faults)

    assert shrink("abcdefgh", fails) == cause
    assert len(tried) < 20

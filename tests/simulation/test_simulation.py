"""The simulation itself: it finds what is planted, shrinks it, and repeats it."""

import os
import shlex
import subprocess
import sys
import traceback

import pytest

import tests.simulation.job  # noqa: F401  # what the plants change
from tests.simulation import plants
from tests.simulation.__main__ import FEW, command, hunt, pool, smallest
from tests.simulation.shrink import shrink


@pytest.fixture(scope="module")
def jobs():
    with pool(1) as jobs:
        yield jobs


def simulate(jobs, **task):
    [answer] = jobs.answers(iter([task]))
    return answer


def test_a_plant_is_found_shrunk_and_repeated_by_the_command_that_is_printed(jobs):
    _, failed = hunt(jobs, 1, 1000, "no-sweep")
    few = smallest(jobs, failed, "no-sweep")
    assert len(few["given"]) <= FEW
    words = shlex.split(command(few, "no-sweep"))
    again = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
    assert again.returncode == 1, again.stderr
    assert "nothing_is_left" in again.stdout
    assert not simulate(jobs, seed=few["seed"], faults=few["given"])["violations"]


@pytest.mark.parametrize("name", plants.PLANTS)
def test_a_plants_words_are_still_in_the_source(name):
    child = os.fork()
    if not child:
        code = 1
        try:
            plants.plant(name)
            code = 0
        except BaseException:  # the child must not go on as pytest
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_seed_has_one_history(jobs, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert len(simulate(jobs, seed=3, trace=str(one))["faults"]) > 10
    simulate(jobs, seed=4)
    simulate(jobs, seed=3, trace=str(other))
    assert len(one.read_text().splitlines()) > 1000
    assert one.read_text() == other.read_text()


def test_a_search_without_faults_breaks_no_rule_and_trains_all_its_trials(jobs):
    answer = simulate(jobs, seed=1, faults=[])
    assert answer["violations"] == answer["faults"] == []
    assert answer["trials"]["COMPLETE"] > 0


def test_workers_go_on_while_a_backup_is_made(jobs, tmp_path):
    answer = simulate(jobs, seed=5, faults=["backup@0.500"], trace=str(tmp_path / "trace"))
    assert (answer["faults"], answer["violations"]) == (["backup@0.500"], [])
    who = [line.split("\t") for line in (tmp_path / "trace").read_text().splitlines()]
    copies = [n for n, line in enumerate(who) if line[0] == "backup" and line[2].startswith("COPY")]
    assert {line[0] for line in who[copies[0] : copies[-1]]} > {"backup"}


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("cause", [["c"], ["b", "f"], ["a", "b", "g"], []])
def test_shrinking_keeps_the_cause_alone(cause, at_once):
    tried = []

    def fails(lists):
        tried.extend(lists)
        return [set(cause) <= set(faults) for faults in lists]

    assert shrink("abcdefgh", fails, at_once) == cause
    assert len(tried) < 40

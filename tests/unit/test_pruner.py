"""Pruning and scores decide a search: what they do, from values alone."""

import optuna
import pytest

from search.pruner import RungPruner
from search.study import load_study_file


def study_of(curves):
    study = optuna.create_study(direction="maximize")
    for curve in curves:
        trial = study.ask()
        for step, value in enumerate(curve):
            trial.report(value, step)
    return study


def decides(study, pruner, number=-1):
    return pruner.prune(study, study.trials[number])


def test_between_rungs_nothing_is_pruned():
    study = study_of([[0.9, 0.9], [0.8, 0.8], [0.7, 0.7], [0.1, 0.1]])
    assert not decides(study, RungPruner([3, 9]))
    assert decides(study, RungPruner([1]))


@pytest.mark.parametrize(
    ("values", "pruned"),
    [
        ([0.5], [False]),  # the first to come has no rival
        ([0.5, 0.4], [False, True]),
        ([0.4, 0.5], [True, False]),  # asked again later, it would not go on
        ([0.1, 0.2, 0.3], [True, True, False]),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [True] * 4 + [False] * 2),  # a third goes on
        ([0.5, 0.5, 0.5], [False, False, False]),  # equals go on together
    ],
)
def test_a_third_of_those_at_the_rung_goes_on(values, pruned):
    study = study_of([[value] for value in values])
    pruner = RungPruner([0])
    assert [decides(study, pruner, number) for number in range(len(values))] == pruned


def test_the_decision_can_be_taken_again():
    """A trial that was killed between its report and its decision is decided as it would have been."""
    study = study_of([[0.3], [0.2], [0.1]])
    pruner = RungPruner([0])
    assert decides(study, pruner) is decides(study, pruner) is True
    assert study.trials[-1].system_attrs == {}


def test_trials_that_have_not_reached_the_rung_do_not_count():
    study = study_of([[0.9], [0.8], [0.7], [0.1, 0.1]])
    assert not decides(study, RungPruner([1]))


@pytest.mark.parametrize(
    ("settings", "rungs"),
    [
        ([], [1]),
        (["train.epochs=30", "train.warmup_epochs=5"], [5, 15]),  # the report's search
        (["train.epochs=120", "train.warmup_epochs=5"], [5, 15, 45]),
        (["train.epochs=2", "train.warmup_epochs=1"], []),  # nothing could be saved
        (["train.epochs=10", "train.warmup_epochs=0"], [1, 3]),
        (["study.rungs=[2]"], [2]),
    ],
)
def test_rungs_begin_where_the_warmup_ends(settings, rungs, study_text, tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(study_text)
    assert load_study_file(path, settings).rungs_of() == rungs

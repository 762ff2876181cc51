"""Who goes on, who waits and who ends at a rung, from the values on record alone."""

import math

import pytest

from search.strategy import Decision, make_strategy
from search.toml_file import load_study_file
from storage.ranks import Rank
from tests.integration.test_ledger import RESULT, make_study, make_worker


@pytest.fixture
def decide(engine, study_text, tmp_path):
    """Trials with these values by epoch; returns for each whether it is stopped after its last."""

    def decide(curves, *settings):
        study = make_study(engine, max_trials=len(curves))
        path = tmp_path / "study.toml"
        path.write_text(study_text)
        file = load_study_file(path, ['study.strategy="asha"', "train.epochs=30", *settings])
        strategy = make_strategy(file, study, make_worker(engine, study))
        held = []
        for curve in curves:
            holder = make_worker(engine, study)
            claim = holder.claim()
            for epoch, value in enumerate(curve):
                holder.record(claim, RESULT | {"epoch": epoch}, value)
            held.append((claim, len(curve) - 1, curve[-1]))
        return [
            strategy.decides_at(epoch) and strategy.decide(claim, epoch, value) != Decision.GOES_ON
            for claim, epoch, value in held
        ]

    return decide


def test_between_rungs_nothing_is_pruned(decide):
    curves = [[0.9, 0.9], [0.8, 0.8], [0.7, 0.7], [0.1, 0.1]]
    assert decide(curves, "study.rungs=[3, 9]") == [False] * 4


@pytest.mark.parametrize(
    ("values", "pruned"),
    [
        ([0.5], [False]),  # the first to come has no rival
        ([0.5, 0.4], [False, True]),
        ([0.4, 0.5], [True, False]),  # asked again later, it would not go on
        ([0.1, 0.2, 0.3], [True, True, False]),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [True] * 4 + [False] * 2),  # a third goes on
        ([0.5, 0.5, 0.5], [False, False, False]),  # equals go on together
        ([0.5, math.nan, math.nan], [False, False, False]),  # no number is better than any
    ],
)
def test_a_third_of_those_at_the_rung_goes_on(decide, values, pruned):
    assert decide([[value] for value in values], "study.rungs=[0]") == pruned


@pytest.mark.parametrize(
    ("values", "waits"),
    [([0.5, 0.4], [True, True]), ([0.1, 0.3, 0.2], [True, False, True])],
)
def test_the_promoting_form_lets_nobody_pass_for_being_first(decide, values, waits):
    settings = ('study.strategy="promote"', "study.rungs=[0]")
    assert decide([[value] for value in values], *settings) == waits


def test_optunas_hyperband_decides_by_brackets(decide):
    curves = [[1 - 0.1 * number] * 9 for number in range(9)]
    stopped = decide(curves, 'study.strategy="hyperband"', "study.rungs=[2]", "train.epochs=9")
    assert True in stopped


def test_trials_that_have_not_reached_the_rung_do_not_count(decide):
    curves = [[0.9], [0.8], [0.7], [0.1, 0.1]]
    assert decide(curves, "study.rungs=[1]") == [False] * 4


def test_another_studys_trials_do_not_count(engine, decide):
    assert decide([[0.9], [0.8]], "study.rungs=[0]") == [False, True]
    other = make_study(engine, name="other")
    worker = make_worker(engine, other)
    claim = worker.claim()
    worker.record(claim, RESULT | {"epoch": 0}, 0.1)
    assert worker.rank(0, 0.1) == Rank(0, 1)


def test_optunas_median_reads_what_the_ledger_wrote(engine, decide):
    study = make_study(engine, max_trials=9)
    for value in (0.1, 0.2, 0.3, 0.4, 0.5):
        worker = make_worker(engine, study)
        claim = worker.claim()
        for epoch in range(6):
            worker.record(claim, RESULT | {"epoch": epoch}, value)
        worker.finish(claim, "complete", value)
    curves = [[0.25] * 6, [0.35] * 6, [0.25] * 3]
    settings = ('study.strategy="median"', "study.rungs=[5]")
    assert decide(curves, *settings) == [True, False, False]  # the last is not there yet
    assert decide([[0.1] * 6], 'study.strategy="none"') == [False]


@pytest.mark.parametrize(
    ("settings", "rungs"),
    [
        ([], [1]),
        (["train.epochs=30", "train.warmup_epochs=5"], [4, 12]),  # the report's search
        (["train.epochs=120", "train.warmup_epochs=5"], [4, 12, 36, 108]),
        (["train.epochs=2", "train.warmup_epochs=1"], []),  # nothing could be saved
        (["train.epochs=10", "train.warmup_epochs=0"], [1, 3]),
        (["study.rungs=[2]"], [2]),
    ],
)
def test_rungs_begin_where_the_warmup_ends(settings, rungs, study_text, tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(study_text)
    assert load_study_file(path, ['study.strategy="asha"', *settings]).rungs() == rungs


def test_without_a_strategy_there_are_no_rungs(study_text, tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(study_text)
    assert load_study_file(path, ["study.rungs=[2]"]).rungs() == []

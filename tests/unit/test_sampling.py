"""Where a search begins, and what its sampler learns from trials that have not ended."""

import math

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState, create_trial

from search.sampling import ImputedStudy, StartupSampler, imputed

SPACE = {"lr": FloatDistribution(1e-4, 1e-2, log=True), "batch_size": CategoricalDistribution([64, 128])}


def sampled(name, trials=16, **options):
    study = optuna.create_study(
        study_name=name, sampler=StartupSampler(SPACE, RandomSampler(), **options)
    )
    return [study.ask(SPACE).params for _ in range(trials)]


def test_a_search_begins_with_the_given_points_and_fills_what_they_leave_open():
    first = [{"lr": 5e-3, "batch_size": 128}, {"lr": 1e-3}]
    params = sampled("s", first=first)
    assert params[0] == first[0]
    assert params[1]["lr"] == 1e-3
    assert params[1]["batch_size"] in (64, 128)


def test_the_start_is_the_studys_own_and_spread_over_the_space():
    one, again, other = sampled("one"), sampled("one"), sampled("other")
    assert one[:10] == again[:10]  # two workers of one study agree on every trial
    assert one[10:] != again[10:]
    assert one[:10] != other[:10]
    eight = sorted(params["lr"] for params in sampled("one", 8))
    bounds = [1e-4 * 100 ** (n / 8) for n in range(9)]
    assert all(low <= lr <= high for low, lr, high in zip(bounds, eight, bounds[1:], strict=False))


def trial(values, state=TrialState.RUNNING, score=None):
    values = dict(enumerate(values))
    return create_trial(state=state, value=score, intermediate_values=values)


def test_a_trial_promises_what_those_that_went_further_have_gained():
    trials = [
        trial([0.1, 0.3, 0.5], TrialState.COMPLETE, 0.6),
        trial([0.1, 0.2, 0.3], TrialState.COMPLETE, 0.5),
        trial([0.1, 0.1], TrialState.PRUNED, 0.1),
        trial([0.2, 0.4, 0.1]),
        trial([0.3]),
        trial([]),
    ]
    seen = imputed(trials, rungs=[0, 1])
    # From epoch 0 to 1 the gains are 0.2, 0.1, 0 and 0.2; from epoch 1 to the score 0.3 and 0.3.
    expected = [0.6, 0.5, 0.1 + 0.3, 0.4 + 0.3, 0.3 + 0.125 + 0.3]
    assert [one.value for one in seen[:5]] == pytest.approx(expected)
    assert {one.state for one in seen[:5]} == {TrialState.COMPLETE}
    assert seen[5].state == TrialState.RUNNING
    assert trials[3].state == TrialState.RUNNING  # what Optuna has on record stays


def test_a_value_that_is_no_number_spoils_no_promise():
    trials = [
        trial([0.1, math.nan]),
        trial([math.nan, 0.2]),
        trial([0.2, 0.4], TrialState.COMPLETE, 0.5),
    ]
    assert [one.value for one in imputed(trials, rungs=[0, 1])] == [pytest.approx(0.4), None, 0.5]


@pytest.mark.parametrize("state", [TrialState.PRUNED, TrialState.FAIL])
def test_a_trial_that_ended_for_another_reason_promises_nothing(state):
    ended = trial([0.5, 0.6], state, 0.0 if state == TrialState.PRUNED else None)
    assert imputed([ended], rungs=[0]) == [ended]


def test_a_sampler_sees_the_promises():
    study = optuna.create_study(direction="maximize")
    running = study.ask(SPACE)
    running.report(0.7, 0)
    seen = ImputedStudy(study.study_name, study._storage, study.sampler, rungs=[0])
    assert [one.value for one in seen._get_trials(states=[TrialState.COMPLETE])] == [0.7]
    assert study.get_trials(states=[TrialState.COMPLETE]) == []

"""Trials that come past the study file: enqueued, asked for or added by somebody's own Optuna script."""

import math

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from search.claims import SpoiltStudyError
from search.exit_codes import ExitCode
from search.sampling import distributions
from storage.studies import update_study
from tests.integration.test_worker import attempts, reasons

pytestmark = pytest.mark.usefixtures("all_holds")


def states(worker):
    return [trial.state for trial in worker.study.trials]


def test_enqueued_trials_are_counted_in_the_budget(engine, make_worker, atelier):
    worker = make_worker("study.max_trials=1")
    for _ in range(3):
        worker.study.enqueue_trial({"lr": 1.5e-3})
    assert worker.run() == ExitCode.DONE
    assert states(worker) == [TrialState.COMPLETE, TrialState.WAITING, TrialState.WAITING]
    shown = atelier("status", "tiny").output
    assert "1/1 trials (2 waiting, 1 complete)" in shown
    assert "2 enqueued trials beyond study.max_trials" in shown
    # A local search has nothing to do, and does not wait for them.
    said = atelier("search", "study.toml", "--set", "study.max_trials=1", "--workers", "1").stderr
    assert "2 enqueued trials beyond study.max_trials: with a larger one, more begin" in said
    assert "failed" not in said
    update_study(engine, worker.ledger.study_id, max_trials=2)
    assert make_worker("study.max_trials=2").run() == ExitCode.DONE
    assert states(worker) == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.WAITING]
    worker.study.enqueue_trial({"lr": 5.0})
    said = atelier("search", "study.toml", "--set", "study.max_trials=4", "--workers", "1").stderr
    assert "1 trial failed; see why with: atelier logs tiny" in said


def test_enqueued_trials_come_before_new_ones(make_worker):
    worker = make_worker("study.max_trials=2")
    worker.study.enqueue_trial({"lr": 1.25e-3, "batch_size": 64})
    worker.run()
    first, second = worker.study.trials
    assert first.params == {"lr": 1.25e-3, "batch_size": 64}
    assert {first.state, second.state} == {TrialState.COMPLETE}


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"lr": 5.0}, "lr = 5.0; allowed is 0.001 to 0.002"),
        ({"lr": 0.0}, "lr = 0.0; allowed is 0.001 to 0.002"),
        ({"lr": math.inf}, "lr = inf"),
        ({"lr": "large"}, "lr = 'large'"),
        ({"lr": None}, "lr = None"),
        ({"lr": [1e-3]}, "lr = [0.001]"),
        ({"batch_size": 48}, "batch_size = 48; allowed is [32, 64]"),
        ({"batch_size": "64"}, "batch_size = '64'"),
        ({"momentum": 0.9}, "unknown key 'momentum'"),
        ({"lr": 1.5e-3, "learning_rate": 1.0}, "unknown key 'learning_rate'"),
    ],
)
def test_what_is_not_of_the_space_is_refused_with_a_reason(engine, make_worker, params, reason):
    worker = make_worker("study.max_trials=2")
    worker.study.enqueue_trial(params)
    assert worker.run() == ExitCode.DONE
    assert states(worker) == [TrialState.FAIL, TrialState.COMPLETE]
    assert attempts(engine) == ["failed", "complete"]
    assert reasons(engine)[0].startswith(f"refused: {reason}")


@pytest.mark.parametrize(
    ("name", "distribution"),
    [
        ("lr", FloatDistribution(1, 10)),
        ("batch_size", IntDistribution(1, 512)),
        ("momentum", FloatDistribution(0, 1)),
        ("batch_size", CategoricalDistribution([8, 16])),
    ],
)
def test_what_was_suggested_elsewhere_is_refused_too(engine, make_worker, name, distribution):
    """Somebody's script has asked for a trial, suggested, and ended."""
    worker = make_worker("study.max_trials=1")
    trial = optuna.load_study(study_name="tiny", storage=worker.ledger.storage).ask()
    trial._suggest(name, distribution)
    assert worker.run() == ExitCode.FAILED
    assert attempts(engine) == ["failed"]
    assert reasons(engine)[0].startswith("refused: ")


@pytest.mark.parametrize(
    ("name", "value", "distribution"),
    [
        ("lr", 1.5e-3, FloatDistribution(1e-3, 2e-3)),  # ours is logarithmic
        ("batch_size", 64, IntDistribution(32, 64)),
        ("batch_size", 64, CategoricalDistribution([32, 64, 128])),
    ],
)
def test_another_distribution_is_refused_and_not_the_hosts_fault(
    engine, make_worker, name, value, distribution
):
    worker = make_worker("study.max_trials=3")
    for _ in range(2):
        worker.study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING, params={name: value}, distributions={name: distribution}
            )
        )
    assert worker.run() == ExitCode.DONE
    assert attempts(engine) == ["failed", "failed", "complete"]
    assert reasons(engine)[0].startswith(f"refused: {name} has another distribution: ")


def test_what_was_added_complete_with_another_distribution_is_said(make_worker):
    worker = make_worker("study.max_trials=3")
    space = {"lr": FloatDistribution(1e-3, 2e-3)}
    worker.study.add_trial(optuna.create_trial(params={"lr": 1.5e-3}, distributions=space, values=[0.5]))
    with pytest.raises(SpoiltStudyError, match=r"another distribution of lr .*another name"):
        worker.run()
    assert states(worker) == [TrialState.COMPLETE, TrialState.RUNNING]


def test_an_added_trial_is_no_reason_to_end_with_nothing(make_worker):
    worker = make_worker("study.max_trials=3", 'study.strategy="promote"', "study.rungs=[0]")
    worker.study.add_trial(optuna.create_trial(params={}, distributions={}, values=[0.999]))
    assert worker.run() == ExitCode.DONE
    assert [*map(TrialState.is_finished, states(worker))] == [True] * 3
    assert states(worker)[1:].count(TrialState.COMPLETE) == 1


def test_what_was_never_trained_here_is_not_the_best(make_worker, atelier, tmp_path):
    """Optuna's sampler learns from it; our tables have no epoch of it, and no prediction."""
    worker = make_worker("study.max_trials=3")
    space = distributions(worker.study_config)
    added = optuna.create_trial(
        params={"lr": 1.5e-3, "batch_size": 32}, distributions=space, values=[0.999]
    )
    worker.study.add_trial(added)
    worker.study.add_trial(optuna.create_trial(params={}, distributions={}, values=[0.998]))
    assert worker.run() == ExitCode.DONE
    assert [*map(TrialState.is_finished, states(worker))] == [True] * 3
    atelier("export", "tiny", "-o", "out.toml")
    assert "trial = 2" in (tmp_path / "out.toml").read_text()

"""`strategy = "promote"`: a weak trial waits, and goes on if it is among the best after all."""

from collections import defaultdict

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from dashboards.study_tables import audit_line
from search.exit_codes import ExitCode
from search.study_config import StudyConfig
from storage.ledger import AUDIT, LeaseLost
from storage.outcome import SPENT, Outcome
from storage.ranks import Rank
from storage.status import read_status
from storage.studies import study_entry, update_study
from storage.tables import ATTEMPTS, EPOCHS
from storage.trial_queue import TrialQueue
from tests.integration import test_ledger
from tests.integration.test_ledger import RESULT, make_study

# A network whose first epochs tell trials apart.
pytestmark = pytest.mark.usefixtures("all_holds")
NETWORK = 'train.backbone="resnet10t"'
PROMOTE = ('study.strategy="promote"', "study.rungs=[0]", NETWORK)


def top_third(standing):
    return standing.better < standing.peers // 3


class Trials:
    """Trials that workers hold or that wait, by number."""

    def __init__(self, engine, **values):
        self.engine = engine
        self.study = make_study(engine, **values)

    def worker(self):
        return test_ledger.make_worker(self.engine, self.study)

    def pause(self, worker, value, epoch=0):
        """The worker's next trial, paused after an epoch of this value."""
        claim = worker.claim(promotes=top_third)
        assert claim.last_epoch == epoch - 1
        worker.record(claim, RESULT | {"epoch": epoch}, value)
        assert worker.release(claim, Outcome.PAUSED, f"paused after {epoch + 1} epochs")
        return claim.trial_number

    def states(self):
        return [trial.state for trial in self.study.get_trials()]


def outcomes(engine):
    """By trial number, in order."""
    found = defaultdict(list)
    with engine.connect() as connection:
        query = sa.select(ATTEMPTS.c.trial_id, ATTEMPTS.c.outcome).order_by(
            ATTEMPTS.c.trial_id, ATTEMPTS.c.number
        )
        for trial_id, outcome in connection.execute(query):
            found[trial_id].append(outcome)
    return [*found.values()]


def test_a_paused_trial_goes_on_before_a_new_one_as_soon_as_it_is_among_the_best(engine):
    trials = Trials(engine, max_trials=9)
    worker = trials.worker()
    for value in (0.3, 0.5):
        trials.pause(worker, value)
    assert trials.pause(worker, 0.4) == 2  # of two, no third is a whole one
    claim = worker.claim(promotes=top_third)
    assert (claim.trial_number, claim.attempt, claim.last_epoch, claim.promoted) == (1, 2, 0, True)
    assert worker.claim([claim.trial_id], top_third).trial_number == 3


def test_those_that_are_furthest_go_on_first(engine):
    trials = Trials(engine, max_trials=12)
    worker = trials.worker()
    for value in (0.9, 0.1, 0.1, 0.8, 0.1, 0.1, 0.7, 0.1, 0.1):
        claim = worker.claim()
        worker.record(claim, RESULT | {"epoch": 0}, value)
        if value > 0.5:
            worker.record(claim, RESULT | {"epoch": 1}, value)
        worker.release(claim, Outcome.PAUSED)
    assert worker.claim(promotes=top_third).trial_number == 0


def test_a_promoted_trial_whose_worker_died_is_still_promoted(engine):
    trials = Trials(engine, max_trials=3)
    worker = trials.worker()
    for value in (0.5, 0.3, 0.4):
        trials.pause(worker, value)
    claim = worker.claim(promotes=top_third)
    worker.release(claim, reason="killed before an epoch")
    again = worker.claim(promotes=lambda _: False)  # it was interrupted: nobody is asked
    assert (again.trial_number, again.promoted) == (0, True)
    worker.record(again, RESULT | {"epoch": 1}, 0.5)
    worker.release(again)
    assert not worker.claim().promoted  # after an epoch of its own it is judged anew


def test_the_last_one_out_tells_optuna_that_what_waits_is_pruned(engine):
    trials = Trials(engine, max_trials=4)
    worker, other = trials.worker(), trials.worker()
    worker.finish(worker.claim(), "complete", 0.5)
    trials.pause(worker, 0.3)
    trials.pause(worker, 0.2)
    held = other.claim()
    assert worker.claim(promotes=top_third) is None
    # The other one may still change what is best.
    assert trials.states() == [TrialState.COMPLETE, *[TrialState.RUNNING] * 3]
    other.record(held, RESULT | {"epoch": 0}, 0.1)
    other.release(held, Outcome.PAUSED)
    assert worker.claim(promotes=lambda _: False) is None
    assert trials.states() == [TrialState.COMPLETE, *[TrialState.PRUNED] * 3]
    assert [trial.value for trial in trials.study.get_trials()] == [0.5, 0.3, 0.2, 0.1]
    assert outcomes(engine) == [["complete"], *[["pruned"]] * 3]


def test_a_small_search_does_not_end_with_nothing(make_worker):
    worker = make_worker("study.max_trials=2", *PROMOTE)  # of two, none is in the top third
    assert worker.run() == ExitCode.DONE
    trials = worker.study.get_trials()
    assert sorted(trial.state.name for trial in trials) == ["COMPLETE", "PRUNED"]
    best = max(trials, key=lambda trial: trial.intermediate_values[0])
    assert best.state == TrialState.COMPLETE


def test_what_was_interrupted_is_not_ended_with_what_waits(engine, monkeypatch):
    """A worker that releases its trial while another finds nothing to do."""
    trials = Trials(engine, max_trials=2)
    worker, other = trials.worker(), trials.worker()
    trials.pause(worker, 0.3)
    held = other.claim()
    rest_of_paused = TrialQueue.rest_of_paused

    def meanwhile(*arguments):
        yield from rest_of_paused(*arguments)
        other.release(held, reason="wall time")

    monkeypatch.setattr(TrialQueue, "rest_of_paused", meanwhile)
    assert worker.claim(promotes=top_third) is None
    assert trials.states() == [TrialState.RUNNING] * 2
    monkeypatch.undo()
    assert other.claim().trial_number == held.trial_number


def test_a_worker_that_was_killed_does_not_keep_a_spent_search_open(engine):
    trials = Trials(engine, max_trials=3, max_gpu_seconds=1000.0)
    worker = trials.worker()
    dead = test_ledger.make_worker(engine, trials.study, lease_seconds=-1)
    dead.claim()
    update_study(engine, worker.study_id, max_gpu_seconds=0.0)
    assert worker.claim() is None
    assert trials.states() == [TrialState.PRUNED]
    assert outcomes(engine) == [["lost"]]


def test_the_lease_that_a_killed_worker_leaves_does_not_end_a_search(engine):
    """It counts as GPU time until somebody closes the attempt: then only what was surely worked does."""
    trials = Trials(engine, max_trials=2, max_gpu_seconds=50.0)
    worker = trials.worker()
    trials.pause(worker, 0.3)
    claim = trials.worker().claim()
    ago = sa.func.make_interval(0, 0, 0, 0, 0, 0, 100)
    times = {
        column: column - ago
        for column in (ATTEMPTS.c.claimed, ATTEMPTS.c.renewed, ATTEMPTS.c.lease_until)
    }
    with engine.begin() as connection:
        query = sa.update(ATTEMPTS).where(ATTEMPTS.c.trial_id == claim.trial_id)
        connection.execute(query.values(times))
    worker._probe_liveness = lambda holders: {holder.worker_id: False for holder in holders}
    again = worker.claim()
    assert (again.trial_number, again.attempt) == (claim.trial_number, 2)
    assert trials.states() == [TrialState.RUNNING] * 2


@pytest.mark.parametrize("strategy", ["none", "asha", "median"])
def test_what_another_strategy_left_waiting_goes_on(make_worker, strategy):
    worker = make_worker(f'study.strategy="{strategy}"', "study.rungs=[1]")
    assert worker.strategy.promotes(Rank(better=8, peers=9))


def test_a_search_that_was_stopped_keeps_what_waits(engine):
    trials = Trials(engine, max_trials=1)
    worker = trials.worker()
    trials.pause(worker, 0.3)
    update_study(engine, worker.study_id, stop_requested=sa.func.now())
    assert worker.claim() is None
    assert trials.states() == [TrialState.RUNNING]


def test_gpu_hours_are_spent_on_the_best_once_no_further_trial_may_begin(engine):
    trials = Trials(engine, max_trials=3, max_gpu_seconds=1000.0)
    worker = trials.worker()
    for value in (0.3, 0.5, 0.4):
        trials.pause(worker, value)
    claim = worker.claim(promotes=lambda _: False)
    assert (claim.trial_number, claim.promoted) == (1, True)


def test_gpu_hours_that_are_spent_end_the_search(engine):
    trials = Trials(engine, max_trials=3, max_gpu_seconds=1000.0)
    worker = trials.worker()
    trials.pause(worker, 0.3)
    claim = worker.claim(promotes=lambda _: False)
    assert worker.record(claim, RESULT | {"epoch": 0}, 0.4) is None
    update_study(engine, worker.study_id, max_gpu_seconds=1e-9)
    assert worker.record(claim, RESULT | {"epoch": 1}, 0.5) == SPENT
    worker.release(claim, reason=SPENT)
    assert worker.claim(promotes=lambda _: True) is None
    assert trials.states() == [TrialState.PRUNED] * 2
    assert [trial.value for trial in trials.study.get_trials()] == [0.3, 0.5]


def test_a_whole_search(engine, make_worker):
    worker = make_worker("study.max_trials=7", *PROMOTE)
    assert worker.run() == ExitCode.DONE
    trials = worker.study.get_trials()
    best = sorted(trials, key=lambda trial: -trial.intermediate_values[0])[:2]
    assert {trial.state for trial in best} == {TrialState.COMPLETE}
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    for trial, own in zip(trials, outcomes(engine), strict=True):
        ended = "complete" if trial.state == TrialState.COMPLETE else "pruned"
        assert own in ([ended], [Outcome.PAUSED, ended])
        assert len(trial.intermediate_values) == (3 if ended == "complete" else 1)
    assert [Outcome.PAUSED, "complete"] in outcomes(engine)
    assert not [*worker.runs.path.glob("trial-*")]  # no checkpoint is left


def test_gpu_hours_are_a_hard_limit(engine, make_worker):
    worker = make_worker("study.max_trials=7", "study.max_gpu_hours=1e-9")
    # One that is already at work, and learns of the limit when it reports.
    update_study(engine, worker.ledger.study_id, max_gpu_seconds=None)
    record = worker.ledger.record

    def then_limited(*arguments):
        update_study(engine, worker.ledger.study_id, max_gpu_seconds=1e-9)
        return record(*arguments)

    worker.ledger.record = then_limited
    assert worker.run() == ExitCode.DONE
    [trial] = worker.study.get_trials()
    assert (trial.state, [*trial.intermediate_values]) == (TrialState.PRUNED, [0])
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(EPOCHS)) == 1


def test_a_trial_goes_on_if_the_gpu_hours_are_raised_once_they_are_spent(engine, make_worker):
    worker = make_worker("study.max_trials=1", "study.strategy=none")
    record = worker.ledger.record

    def limited_at_first(claim, result, value):
        update_study(engine, worker.ledger.study_id, max_gpu_seconds=None if result["epoch"] else 1e-9)
        why = record(claim, result, value)
        update_study(engine, worker.ledger.study_id, max_gpu_seconds=None)
        return why

    worker.ledger.record = limited_at_first
    assert worker.run() == ExitCode.DONE
    assert outcomes(engine) == [["released", "complete"]]


@pytest.mark.parametrize("strategy", ["promote", "asha"])
def test_audited_trials_go_on_and_show_what_stopping_them_would_have_cost(engine, make_worker, strategy):
    worker = make_worker("study.max_trials=7", "study.audit=0.5", *PROMOTE, f"study.strategy={strategy}")
    assert worker.run() == ExitCode.DONE
    trials = worker.study.get_trials()
    assert {trial.state for trial in trials[0::2]} == {TrialState.COMPLETE}  # the audited ones
    at_rung = [trial.intermediate_values[0] for trial in trials]
    status = read_status(engine, worker.ledger.study_id, "tiny")
    for trial, row in zip(trials, status.trials, strict=True):
        verdict = trial.user_attrs.get(AUDIT, {}).get("verdict")
        assert verdict is None or trial.number % 2 == 0
        # A wait would have ended by now, if it is among the best two of seven.
        among_the_best = sum(value > at_rung[trial.number] for value in at_rung) < 2
        would_go_on = verdict is None or (verdict == Outcome.PAUSED and among_the_best)
        assert row.audit == (None if would_go_on else f"{verdict} after 1 epoch")
    scores = sorted((t.value for t in trials if t.state == TrialState.COMPLETE), reverse=True)
    places = [scores.index(row.value) + 1 for row in status.completed() if row.audit]
    good = sum(3 * place <= len(scores) for place in places)
    line = audit_line(status)
    assert f"{len(places)} complete trial" in line
    assert f"stopped, {good} of them in the best third of all {len(scores)} (" in line
    assert line.endswith(f"has place {places[0]}")


def test_a_worker_that_was_replaced_notes_nothing(engine):
    trials = Trials(engine, max_trials=1)
    dead = test_ledger.make_worker(engine, trials.study, lease_seconds=-1)
    claim = dead.claim()
    worker = trials.worker()
    own = worker.claim()
    with pytest.raises(LeaseLost):
        dead.note_audit(claim, 0, "pruned")
    worker.note_audit(own, 1, "pruned")
    worker.note_audit(own, 2, "pruned")  # only the first says when it would have ended
    assert trials.study.get_trials()[0].user_attrs == {AUDIT: {"epoch": 1, "verdict": "pruned"}}


def test_a_worker_by_name_searches_as_the_study_does(engine, make_worker):
    worker = make_worker("study.max_trials=7", "study.audit=0.5", "study.sampler=qmc", *PROMOTE)
    entry = study_entry(engine, "tiny")
    assert StudyConfig.from_record(entry).study == worker.study_config.study

"""Whose fault it is that a trial fails: its own, or that of the host."""

import pytest
from optuna.trial import TrialState

import search.worker
from search.blame import SickHostError
from search.exit_codes import ExitCode
from storage import ledger
from storage.optuna_storage import optuna_storage
from tests.integration.test_ledger import make_study
from tests.integration.test_ledger import make_worker as make_ledger
from tests.integration.test_worker import attempts, reasons
from trainer.loop import train_epoch

pytestmark = pytest.mark.usefixtures("all_holds")


@pytest.fixture
def on_host(monkeypatch):
    """Lets what follows happen on a host of this name."""
    return lambda name: monkeypatch.setattr(ledger, "host", lambda: name)


class Faults:
    """Trains, but for the trials and the hosts on which everything fails."""

    def __init__(self, worker, trials=(), everything=False):
        self.worker, self.trials, self.everything = worker, trials, everything

    def __call__(self, runs, interrupt):
        sound = []
        for run in runs:
            [trial] = [one for one in self.worker.trials if one.run is run]
            if self.everything or trial.claim.trial_number in self.trials:
                yield run, RuntimeError("no compiler here")
            else:
                sound.append(run)
        if sound:
            yield from train_epoch(sound, interrupt)


def states(worker):
    return [trial.state for trial in worker.study.trials]


def test_trials_that_a_user_ends_while_they_are_sampled_are_no_fault(engine, make_worker, monkeypatch):
    worker, users = make_worker("study.max_trials=3"), optuna_storage(engine)
    sampler = worker.study.sampler
    infer = sampler.infer_relative_search_space

    def end_two(study, trial):
        if trial.number < 2:
            users.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return infer(study, trial)

    monkeypatch.setattr(sampler, "infer_relative_search_space", end_two)
    assert worker.run() == ExitCode.DONE
    assert attempts(engine) == ["lost", "lost", "complete"]
    assert reasons(engine)[:2] == ["the trial was set to FAIL by somebody else"] * 2


@pytest.mark.parametrize("pack", [1, 2])
def test_a_host_on_which_everything_fails_is_left(engine, make_worker, monkeypatch, atelier, pack):
    worker = make_worker("study.max_trials=5", pack=pack)
    monkeypatch.setattr(search.worker, "train_epoch", Faults(worker, everything=True))
    with pytest.raises(SickHostError, match=r"sick host .*: RuntimeError: no compiler here"):
        worker.run()
    assert attempts(engine) == ["released", "released"], "the trials are not charged with it"
    assert all(reason.startswith("sick host: RuntimeError") for reason in reasons(engine))
    assert "sick host" in atelier("status", "tiny").output
    # Elsewhere, or once it is mended, the same trials go on as if nothing had happened.
    monkeypatch.setattr(search.worker, "train_epoch", train_epoch)
    sound = make_worker("study.max_trials=5")
    assert sound.run() == ExitCode.DONE
    assert TrialState.FAIL not in states(sound)
    assert len(states(sound)) == 5
    assert "sick host" not in atelier("status", "tiny").output


def test_a_broken_gpu_is_no_trials_fault(engine, make_worker, monkeypatch):
    worker = make_worker("study.max_trials=5")
    fault = RuntimeError("CUDA error: uncorrectable ECC error encountered")
    monkeypatch.setattr(search.worker, "train_epoch", lambda runs, _: iter([(runs[0], fault)]))
    with pytest.raises(SickHostError, match="uncorrectable ECC"):
        worker.run()
    assert attempts(engine) == ["released"]


def test_two_bad_trials_do_not_keep_others_from_being_trained(engine, make_worker, monkeypatch):
    """They look like a sick host at first, and are put off: then others pass, and it is their fault."""
    settings = ("study.max_trials=5", "study.max_failures=1")
    worker = make_worker(*settings)
    monkeypatch.setattr(search.worker, "train_epoch", Faults(worker, trials={0, 1}))
    with pytest.raises(SickHostError):
        worker.run()
    worker = make_worker(*settings)
    monkeypatch.setattr(search.worker, "train_epoch", Faults(worker, trials={0, 1}))
    assert worker.run() == ExitCode.DONE
    assert [state == TrialState.FAIL for state in states(worker)] == [True, True, False, False, False]
    assert attempts(engine).count("error") == 2
    assert attempts(engine).count("failed") == 2


def test_what_has_passed_a_step_shows_that_the_host_is_sound(engine, make_worker, monkeypatch):
    worker = make_worker("study.max_trials=5", "study.max_failures=0")
    monkeypatch.setattr(search.worker, "train_epoch", Faults(worker, trials={1, 2, 3}))
    assert worker.run() == ExitCode.DONE
    assert [state == TrialState.FAIL for state in states(worker)] == [False, True, True, True, False]


def test_a_trial_that_fails_alone_is_tried_again_last_of_all(engine, make_worker, monkeypatch):
    worker = make_worker("study.max_trials=3", "study.max_failures=2")
    monkeypatch.setattr(search.worker, "train_epoch", Faults(worker, trials={0}))
    assert worker.run() == ExitCode.DONE
    assert attempts(engine) == ["error", "complete", "complete", "error", "failed"]
    assert "no compiler here" in reasons(engine)[-1]


def test_a_study_of_which_every_trial_fails_does_not_end_well(make_worker, monkeypatch):
    worker = make_worker("study.max_trials=1")
    monkeypatch.setattr(search.worker, "train_epoch", Faults(worker, everything=True))
    assert worker.run() == ExitCode.FAILED
    assert worker.stop.reason == "every trial of the study has failed"


def test_a_trial_is_bad_when_it_fails_on_two_hosts(engine, make_worker, monkeypatch, on_host):
    on_host("one")
    first = make_worker("study.max_trials=1", "study.max_failures=9")
    first.ledger.register()
    claim = first.ledger.claim()
    assert not first.ledger.is_bad(claim, 9)
    first.ledger.release(claim, "error", "a fault")
    on_host("two")
    second = make_worker("study.max_trials=1", "study.max_failures=9")
    monkeypatch.setattr(search.worker, "train_epoch", Faults(second, everything=True))
    assert second.run() == ExitCode.FAILED
    assert attempts(engine) == ["error", "failed"]


def test_a_host_leaves_what_failed_there_to_one_that_has_not_tried_it(engine, on_host):
    study = make_study(engine, max_trials=2)
    here, there = make_ledger(engine, study), None
    on_host("there")
    there = make_ledger(engine, study)
    on_host("here")
    here.worker_id = None
    here.register()
    failed = here.claim()
    on_host("there")
    held = there.claim()
    on_host("here")
    assert not here.is_bad(failed, max_failures=0), "another host may try it"
    here.release(failed, "error", "a fault")
    assert here.claim() is None
    on_host("there")
    there.finish(held, "complete", 0.5)
    on_host("here")
    again = here.claim()
    assert again.trial_number == failed.trial_number, "nobody else is at work"
    here.release(again, "error", "a fault")
    on_host("there")
    assert there.claim().trial_number == failed.trial_number


def test_new_trials_come_before_those_that_have_failed(engine):
    study = make_study(engine, max_trials=2)
    worker = make_ledger(engine, study)
    worker.release(worker.claim(), "error", "a fault")
    fresh = worker.claim()
    assert fresh.trial_number == 1
    assert worker.claim([fresh.trial_id]).trial_number == 0

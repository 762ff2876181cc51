"""Epochs are recorded, decided about and saved beside the training, in this order."""

import json
import threading
import time
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from search.exit_codes import ExitCode
from search.trial import MOST_UNRECORDED
from storage import studies
from storage.outcome import SPENT, STOPPED
from storage.tables import ATTEMPTS, EPOCHS
from tests.studies import MAY_DIFFER
from trainer.checkpoint import Checkpoints
from trainer.predictions import Predictions


def epochs(engine, number=0):
    return studies.epochs_of(engine, 1, number)


def numbers(engine):
    """The trial's epochs without what may differ from one time to the next."""
    return [{key: row[key] for key in row.keys() - MAY_DIFFER} for row in epochs(engine)]


def lose(engine, worker):
    """Let the worker's trials be for others, as if it had been killed."""
    for thread in (worker.recorder, worker.writer):
        thread.shutdown()
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE atelier.attempt SET lease_until = now() - interval '1 h'"))


def saved_epochs(worker):
    state = Checkpoints(worker.runs.checkpoints(0)).latest()
    return 0 if state is None else len(state["history"])


@contextmanager
def locked(engine, table):
    """Nobody can write to a table meanwhile."""
    with engine.connect() as connection:
        connection.execute(sa.text(f"LOCK TABLE {table} IN EXCLUSIVE MODE"))
        yield


def test_a_checkpoint_is_of_epochs_on_record(engine, make_worker, monkeypatch, all_holds):
    worker, seen = make_worker("study.checkpoint_seconds=0"), []
    save = Checkpoints.save

    def compare(checkpoints, done, *details):
        number = int(checkpoints.folder.name.removeprefix("trial-"))
        seen.append((done, len(epochs(engine, number))))
        return save(checkpoints, done, *details)

    monkeypatch.setattr(Checkpoints, "save", compare)
    assert worker.run() == ExitCode.DONE
    assert len(seen) >= 2
    assert all(done <= recorded for done, recorded in seen)


def test_training_goes_on_while_an_epoch_is_recorded_and_waits_after_two(engine, make_worker, all_holds):
    worker = make_worker("study.max_trials=1", "train.epochs=6")
    worker.ledger.register()
    [trial] = worker.fill()
    with locked(engine, "atelier.epoch"):
        for _ in range(MOST_UNRECORDED):
            assert worker.fill() == [trial]
            worker.train()
        waiting = threading.Thread(target=worker.fill)
        waiting.start()
        time.sleep(0.5)
        assert waiting.is_alive(), "it trains on, though nothing can be recorded"
        assert len(trial.run.history) == MOST_UNRECORDED
        assert saved_epochs(worker) == 0
    waiting.join()
    while worker.fill():
        worker.train()
    assert [row["epoch"] for row in epochs(engine)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("seconds", "saved"), [(0, 2), (1e6, 0)])
def test_what_no_checkpoint_has_is_trained_again_and_compared(
    engine, make_worker, caplog, all_holds, seconds, saved
):
    settings = "study.max_trials=1", f"study.checkpoint_seconds={seconds}"
    first = make_worker(*settings)
    first.ledger.register()
    for _ in range(2):
        [trial] = first.fill()
        first.train()
        trial.finish_jobs()
    lose(engine, first)
    recorded = numbers(engine)
    assert saved_epochs(first) == saved
    caplog.set_level("INFO")
    second = make_worker(*settings)
    assert second.run() == ExitCode.DONE
    assert caplog.text.count("was trained again, and equals its record") == 2 - saved
    assert numbers(engine)[:2] == recorded
    assert [row["attempt"] for row in epochs(engine)] == [1, 1, 2]
    predictions = Predictions.load(second.runs.predictions(0))
    assert predictions.attempts.tolist() == ([1, 1, 2] if saved else [2, 2, 2])


def test_where_it_differs_the_first_record_stands_and_is_marked(engine, make_worker, atelier):
    settings = "study.max_trials=1", "study.checkpoint_seconds=1e6"
    first = make_worker(*settings)
    first.ledger.register()
    [trial] = first.fill()
    first.train()
    trial.finish_jobs()
    lose(engine, first)
    with engine.begin() as connection:  # as another kind of device would have recorded it
        change = {"val_accuracy": EPOCHS.c.val_accuracy + 0.125, "value": EPOCHS.c.value + 0.125}
        connection.execute(sa.update(EPOCHS).values(change))
        told = "UPDATE trial_intermediate_values SET intermediate_value = intermediate_value + 0.125"
        connection.execute(sa.text(told))
    [recorded] = numbers(engine)
    assert make_worker(*settings).run() == ExitCode.DONE
    assert numbers(engine)[0] == recorded
    noted = [row["again"] for row in epochs(engine)]
    assert noted == [{"attempt": 2, "val_accuracy": pytest.approx(0.125)}, None, None]
    assert json.loads(atelier("status", "tiny", "--json").stdout)["trials"][0]["differing"] == 1
    said = [
        atelier("status", "tiny").stdout,
        atelier("export", "tiny", "-o", "x.toml").stderr,
        atelier("replay", "tiny", "--trial", "0", code=1).stderr,
    ]
    for text in said:
        assert "epochs of trial 0 gave other numbers" in " ".join(text.split())
    with engine.connect() as connection:  # the score is that of the record
        [value] = connection.scalars(sa.text("SELECT value FROM trial_values"))
    assert value == pytest.approx(sum(row["value"] for row in epochs(engine)) / 3)


def test_a_trial_is_given_back_after_its_epoch_is_recorded(engine, make_worker, all_holds):
    worker = make_worker("study.max_trials=1", "train.epochs=6")
    worker.ledger.register()
    worker.fill()
    with locked(engine, "atelier.epoch"):
        worker.train()
        worker.stop.ask("enough", ExitCode.STOPPED)
        ending = threading.Thread(target=worker.fill)
        ending.start()
        time.sleep(0.5)
        assert ending.is_alive()
    ending.join()
    with engine.connect() as connection:
        [attempt] = connection.execute(sa.select(ATTEMPTS.c.outcome, ATTEMPTS.c.reason))
    assert attempt == ("released", "enough")
    assert saved_epochs(worker) == len(epochs(engine)) == 1


def test_a_paused_trial_keeps_one_checkpoint(engine, make_worker, all_holds):
    promote = 'study.strategy="promote"', "study.rungs=[1]", "study.checkpoint_seconds=0"
    worker, kept = make_worker("study.max_trials=3", *promote), []
    release = worker.ledger.release

    def count(claim, **details):
        folder = worker.runs.checkpoints(claim.trial_number)
        kept.append((details["outcome"], [path.name[:23] for path in folder.glob("*.pt")]))
        return release(claim, **details)

    worker.ledger.release = count
    assert worker.run() == ExitCode.DONE
    assert kept[0] == ("paused", ["attempt-0001-epoch-0002"])


@pytest.mark.parametrize(("answer", "end"), [(SPENT, ExitCode.DONE), (STOPPED, ExitCode.STOPPED)])
def test_an_epoch_that_is_no_longer_wanted_is_cut(engine, make_worker, all_holds, answer, end):
    worker = make_worker("study.max_trials=1", "train.epochs=200")
    record, claims = worker.ledger.record, iter([worker.ledger.claim])
    worker.ledger.record = lambda *details: record(*details) or answer
    worker.ledger.claim = lambda *details: next(claims, lambda *_: None)(*details)
    assert worker.run() == end
    assert 1 <= len(epochs(engine)) <= MOST_UNRECORDED
    assert saved_epochs(worker) == len(epochs(engine))
    with engine.connect() as connection:
        [attempt] = connection.execute(sa.select(ATTEMPTS.c.outcome, ATTEMPTS.c.reason))
    assert attempt == ("released", answer)


def test_a_place_is_free_while_the_trial_before_is_written(engine, make_worker, all_holds):
    worker = make_worker("train.epochs=1", "train.warmup_epochs=0")
    worker.ledger.register()
    finish, may_finish = worker.ledger.finish, threading.Event()

    def finish_late(*details, **more):
        assert may_finish.wait(60)
        finish(*details, **more)

    worker.ledger.finish = finish_late
    [first] = worker.fill()
    worker.train()
    [second] = worker.fill()
    assert second.claim.trial_number == 1
    assert worker.leaving == [first]
    worker.train()  # beside it
    may_finish.set()
    assert worker.fill() == []
    assert [trial.state.name for trial in worker.study.trials] == ["COMPLETE"] * 2

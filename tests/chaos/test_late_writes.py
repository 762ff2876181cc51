"""Writes of workers that were replaced, in a race with their successors: none gets through."""

import threading
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
import sqlalchemy as sa

from storage import optuna_storage
from storage.ledger import LeaseLost, Ledger
from storage.tables import EPOCHS
from tests.integration.test_ledger import RESULT, make_study
from trainer.checkpoint import Checkpoints

PAIRS, TRIALS, WRITES = 4, 10, 43  # 6 kinds of writes: 10,320 that come too late


def state(by):
    return {"by": by, "predictions": []}


class Paused:
    """A worker that records epoch after epoch and does not know when it is taken for dead."""

    def __init__(self, ledger, folder):
        self.ledger, self.claim = ledger, ledger.claim()
        self.checkpoints = Checkpoints(
            folder, self.claim.attempt, before_save=lambda: ledger.renew(self.claim)
        )
        self.recorded = 0
        self.begun = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        try:
            while True:
                self.ledger.record(self.claim, RESULT | {"epoch": self.recorded}, 0.5)
                self.recorded += 1
                self.checkpoints.save(self.recorded, 0, state("paused"))
                self.begun.set()
        except (LeaseLost, FileNotFoundError):  # a successor sweeps away what is half written
            self.begun.set()

    def late_writes(self):
        """Everything that it could try; returns how often nothing came of it."""
        refused = 0
        for number in range(WRITES):
            for write in (
                lambda: self.ledger.renew(self.claim),
                lambda n=number: self.ledger.record(self.claim, RESULT | {"epoch": 100 + n}, 0.9),
                lambda: self.ledger.finish(self.claim, "complete", 0.9),
                lambda n=number: self.checkpoints.save(100 + n, 0, state("paused")),
            ):
                with pytest.raises(LeaseLost):
                    write()
                refused += 1
            for write in (self.ledger.release, self.ledger.withdraw):  # in vain, and no error
                write(self.claim)
                refused += 1
        return refused


def race(engine, study, folder):
    """Trial after trial is taken over while its holder writes. Returns how many writes were too late."""
    refused = 0
    storage = optuna_storage.optuna_storage(engine)
    dead = {}
    first = Ledger(engine, storage, study._study_id, probe_liveness=lambda _: {})
    second = Ledger(engine, storage, study._study_id, probe_liveness=lambda _: dead)
    dead[first.register()] = False
    second.register()
    for number in range(TRIALS):
        place = folder / str(number)
        paused = Paused(first, place)
        paused.begun.wait()
        taken = second.claim()
        assert taken.trial_id == paused.claim.trial_id
        successor = Checkpoints(place, taken.attempt)
        seen = list(successor.newest_first())
        successor.save(1, 0, state("successor"))
        paused.thread.join()
        refused += paused.late_writes()
        # What the claim saw is all that there ever was.
        assert taken.last_epoch == paused.recorded - 1
        assert successor.latest() == state("successor")
        assert seen
        second.record(taken, RESULT | {"epoch": taken.last_epoch + 1}, 0.7)
        second.finish(taken, "complete", 0.7)
    return refused


def test_ten_thousand_late_writes_are_refused(engine, tmp_path):
    def run(number):
        study = make_study(engine, max_trials=TRIALS, name=f"race-{number}")
        return race(engine, study, tmp_path / str(number))

    with ThreadPoolExecutor(PAIRS) as pool:
        refused = sum(pool.map(run, range(PAIRS)))
    assert refused >= 10_000
    with engine.connect() as connection:
        late = sa.select(sa.func.count()).where((EPOCHS.c.epoch >= 100) | (EPOCHS.c.value == 0.9))
        assert connection.scalar(late) == 0
    storage = optuna_storage.optuna_storage(engine)
    for number in range(PAIRS):
        trials = optuna.load_study(study_name=f"race-{number}", storage=storage).trials
        assert [trial.value for trial in trials] == [0.7] * TRIALS
        assert all(max(trial.intermediate_values.values()) == 0.7 for trial in trials)

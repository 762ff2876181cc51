"""The ledger on a real PostgreSQL, with real processes where several workers meet."""

import math
import multiprocessing
import os
import threading
import time
from dataclasses import fields
from datetime import timedelta

import optuna
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from search import forking
from search.sampling import distributions
from storage import database, optuna_storage, schema, studies
from storage.leases import LeaseKeeper
from storage.ledger import LeaseLost, Ledger
from storage.liveness import is_gone, process_identity
from storage.outcome import Outcome
from storage.tables import ATTEMPTS, EPOCHS
from tests.studies import open_storage
from trainer.metrics import EpochResult

RESULT = {
    "stream_epoch": 0,
    "lr": 0.1,
    "train_loss": 1.0,
    "val_loss": 1.0,
    "train_accuracy": 0.5,
    "val_accuracy": 0.5,
    "val_overall": 0.6,
    "val_category": [0.5, 0.7],
    "val_hits": [3, 4, 5],
    "val_log_loss": 1.2,
    "seconds": 1.0,
    "images": 10,
    "peak_memory": 1.0,
}


def test_an_epoch_is_recorded_as_it_was_whatever_its_numbers(engine):
    """Tuples, NULL, NaN and infinity: the statement gives each the type of its column."""
    worker = make_worker(engine, make_study(engine))
    claim = worker.claim()
    odd = {
        "train_loss": math.nan,
        "val_loss": math.inf,
        "val_category": (math.nan, 0.1),
        "val_hits": (),
        "val_log_loss": None,
        "lr": 1e-300,
    }
    worker.record(claim, RESULT | {"epoch": 0} | odd, math.nan)
    row = studies.epochs_of(engine, worker.study_id, 0)[0]
    assert math.isnan(row["train_loss"])
    assert math.isnan(row["val_category"][0])
    assert (row["val_loss"], row["val_category"][1], row["lr"]) == (math.inf, 0.1, 1e-300)
    assert (row["val_hits"], row["val_log_loss"], row["value"]) == ([], None, None)
    assert (row["attempt"], row["study_id"]) == (claim.attempt, worker.study_id)


def test_every_number_of_an_epoch_has_a_column():
    names = {field.name for field in fields(EpochResult)} - {"predictions", "cause"}
    assert names <= set(EPOCHS.columns.keys())


def make_study(engine, max_trials=3, name="s", **values):
    storage = optuna_storage.optuna_storage(engine)
    study = optuna.create_study(
        storage=storage, study_name=name, direction="maximize", load_if_exists=True
    )
    row = {"max_trials": max_trials, "max_gpu_seconds": None, "settings": {}, "dataset": "d"}
    studies.enter_study(engine, study._study_id, **(row | values))
    return study


def make_worker(engine, study, gpu=None, **options):
    worker = Ledger(engine, optuna_storage.optuna_storage(engine), study._study_id, **options)
    worker.register(gpu=gpu)
    return worker


def complete_trial(worker, file, params, score):
    """As a worker leaves it."""
    claim = worker.claim()
    worker.storage.get_all_trials(worker.study_id)  # else its cache refuses the trial
    for name, space in distributions(file).items():
        value = space.to_internal_repr(params[name])
        worker.storage.set_trial_param(claim.trial_id, name, value, space)
    for epoch in range(file.epochs):
        numbers = {"epoch": epoch, "stream_epoch": epoch, "val_accuracy": score}
        worker.record(claim, RESULT | numbers, score)
    worker.finish(claim, "complete", score)


def nobody_knows(_):
    return {}


def test_an_epoch_reaches_optuna_in_the_same_transaction(engine):
    study = make_study(engine)
    worker = make_worker(engine, study)
    claim = worker.claim()
    for epoch in (0, 1, 1):  # the repetition changes nothing
        worker.record(claim, RESULT | {"epoch": epoch, "val_accuracy": epoch / 10}, 0.5 + epoch / 10)
    assert study.trials[0].intermediate_values == {0: 0.5, 1: 0.6}
    worker.finish(claim, "complete", 0.55)
    worker.finish(claim, "complete", 0.55)
    [trial] = study.trials
    assert (trial.state, trial.value) == (optuna.trial.TrialState.COMPLETE, 0.55)
    assert abs((trial.datetime_complete - trial.datetime_start).total_seconds()) < 60
    assert studies.curve(engine, study._study_id, 0) == [0.0, 0.1]


def test_what_the_ledger_writes_is_what_optuna_would_write(engine):
    """Our direct writes and Optuna's own give the same rows."""
    study = make_study(engine)
    worker = make_worker(engine, study)
    claim = worker.claim()
    worker.record(claim, RESULT | {"epoch": 0}, 0.5)
    worker.finish(claim, "pruned", 0.25)
    trial = study.ask()
    trial.report(0.5, 0)
    study.tell(trial, 0.25, state=optuna.trial.TrialState.COMPLETE)
    with engine.connect() as connection:
        for table, columns in (
            ("trial_intermediate_values", "step, intermediate_value, intermediate_value_type"),
            ("trial_values", "objective, value, value_type"),
        ):
            rows = connection.execute(sa.text(f"SELECT {columns} FROM {table} ORDER BY trial_id")).all()
            assert len(rows) == 2
            assert rows[0] == rows[1]
        seconds = connection.scalar(
            sa.text(
                "SELECT max(extract(epoch FROM age(a.datetime_complete, b.datetime_complete))) "
                "FROM trials a, trials b"
            )
        )
    assert seconds < 60  # both in UTC


def test_a_released_trial_is_claimed_again_before_a_new_one(engine):
    study = make_study(engine)
    first, second = make_worker(engine, study), make_worker(engine, study)
    claim = first.claim()
    first.record(claim, RESULT | {"epoch": 0}, 0.5)
    first.release(claim)
    again = second.claim()
    assert (again.trial_number, again.attempt, again.last_epoch) == (0, 2, 0)
    assert first.claim().trial_number == 1


@pytest.mark.parametrize(
    ("gpu", "minutes", "number"),
    [("H100", 0, 0), ("A100", 0, 1), (None, 0, 1), ("A100", 3, 0)],
)
def test_an_interrupted_trial_prefers_its_kind_of_device_for_one_lease(engine, gpu, minutes, number):
    study = make_study(engine, max_trials=2)
    first, second = make_worker(engine, study, "H100"), make_worker(engine, study, gpu)
    first.release(first.claim())
    ago = timedelta(minutes=minutes)
    with engine.begin() as connection:
        connection.execute(sa.update(ATTEMPTS).values(released=ATTEMPTS.c.released - ago))
    claim = second.claim()
    assert claim.trial_number == number
    other = second.claim(held=[claim.trial_id])  # nobody waits for the other kind
    assert {claim.trial_number, other.trial_number} == {0, 1}


def test_a_worker_that_was_replaced_can_write_nothing(engine):
    study = make_study(engine)
    zombie = make_worker(engine, study, lease_seconds=0.0, probe_liveness=nobody_knows)
    successor = make_worker(engine, study, probe_liveness=nobody_knows)
    claim = zombie.claim()
    time.sleep(0.05)
    assert successor.claim().attempt == 2
    for write in (
        lambda: zombie.record(claim, RESULT | {"epoch": 0}, 0.5),
        lambda: zombie.finish(claim, "complete", 0.9),
        lambda: zombie.finish(claim, "failed"),
        lambda: zombie.renew(claim),
    ):
        with pytest.raises(LeaseLost):
            write()
    zombie.release(claim)  # harmless
    assert study.trials[0].intermediate_values == {}
    assert study.trials[0].state == optuna.trial.TrialState.RUNNING
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(EPOCHS)) == 0
        open_attempts = connection.execute(
            sa.select(ATTEMPTS.c.number).where(ATTEMPTS.c.released.is_(None))
        ).all()
    assert open_attempts == [(2,)]


def test_a_living_lease_is_not_taken(engine):
    study = make_study(engine, max_trials=1)
    holder, other = make_worker(engine, study), make_worker(engine, study)
    assert holder.claim() is not None
    assert other.claim() is None


def test_a_repeated_claim_returns_the_same_hold(engine):
    """As after a COMMIT whose reply was lost."""
    study = make_study(engine)
    worker = make_worker(engine, study)
    assert worker.claim() == worker.claim()
    assert len(study.trials) == 1


def test_the_database_refuses_a_second_holder(engine):
    study = make_study(engine)
    worker = make_worker(engine, study)
    claim = worker.claim()
    row = {"trial_id": claim.trial_id, "number": 2, "study_id": study._study_id}
    row |= {"worker_id": worker.worker_id, "lease_until": sa.func.now()}
    with pytest.raises(IntegrityError, match="attempt_open"), engine.begin() as connection:
        connection.execute(sa.insert(ATTEMPTS).values(row))


def test_a_trial_made_by_a_worker_that_died_before_its_attempt_is_taken(engine):
    study = make_study(engine, max_trials=1)
    study._storage.create_new_trial(study._study_id)
    claim = make_worker(engine, study).claim()
    assert (claim.trial_number, claim.attempt) == (0, 1)


def test_a_claim_ahead_of_a_pause_leaves_the_last_trial_to_go_on(engine):
    worker = make_worker(engine, make_study(engine, max_trials=1))
    claim = worker.claim()
    worker.record(claim, RESULT | {"epoch": 0}, 0.5)
    worker.release(claim, outcome=Outcome.PAUSED, reason="paused after 1 epochs")
    assert worker.claim(held=[claim.trial_id]) is None
    assert worker.claim().promoted


def test_a_trial_that_is_enqueued_during_a_claim_does_not_exceed_the_budget(engine):
    study = make_study(engine, max_trials=1)
    make_worker(engine, study).claim()
    worker = make_worker(engine, study)
    counted = []

    @sa.event.listens_for(engine, "after_cursor_execute")
    def enqueue(_connection, _cursor, statement, *_):
        if "count(*)" in statement and not counted:
            counted.append(statement)
            study.enqueue_trial({"lr": 0.5})

    assert worker.claim() is None
    assert len(counted) == 1


def test_an_enqueued_trial_is_claimed(engine):
    study = make_study(engine)
    study.enqueue_trial({"lr": 0.5})
    claim = make_worker(engine, study).claim()
    assert claim.trial_number == 0
    assert study.trials[0].state == optuna.trial.TrialState.RUNNING


def test_a_trial_that_is_finished_while_it_is_claimed_stays_finished(engine):
    study = make_study(engine, max_trials=1)
    holder = make_worker(engine, study, lease_seconds=0.0)
    claim = holder.claim()
    late = make_worker(
        engine, study, probe_liveness=lambda _: holder.finish(claim, "complete", 0.5) or {}
    )
    assert late.claim() is None
    assert study.trials[0].state == optuna.trial.TrialState.COMPLETE
    assert len(study.trials[0].intermediate_values) == 0


def test_a_claim_waits_for_the_holders_transaction_and_then_judges_anew(engine):
    """The holder's COMMIT is under way while its lease has expired."""
    study = make_study(engine, max_trials=1)
    holder = make_worker(engine, study, lease_seconds=0.0, probe_liveness=nobody_knows)
    claim = holder.claim()
    late = make_worker(engine, study, probe_liveness=nobody_knows)
    result = []
    thread = threading.Thread(target=lambda: result.append(late.claim()))
    with engine.begin() as connection:
        holder._fence(connection, claim)  # the row is locked, as by a renewal
        thread.start()
        wait_until_blocked(engine)
        later = sa.func.now() + timedelta(seconds=60)
        connection.execute(sa.update(ATTEMPTS).values(lease_until=later))
    thread.join(30)
    assert result == [None]


def wait_until_blocked(engine):
    query = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with engine.connect() as connection:
            if connection.scalar(sa.text(query)):
                return
        time.sleep(0.02)
    raise AssertionError("nobody waits for the lock")


def test_a_trial_that_somebody_else_ended_is_not_ended_again(engine):
    study = make_study(engine, max_trials=1)
    worker = make_worker(engine, study)
    claim = worker.claim()
    study.tell(claim.trial_number, state=optuna.trial.TrialState.FAIL)  # as in the dashboard
    with pytest.raises(LeaseLost, match="set to FAIL by somebody else"):
        worker.finish(claim, "complete", 0.9)
    assert study.trials[0].state == optuna.trial.TrialState.FAIL
    with engine.connect() as connection:
        assert connection.scalar(sa.select(ATTEMPTS.c.outcome)) == "lost"


@pytest.mark.parametrize(
    ("verdict", "lease_seconds", "taken"),
    [(True, 0.0, False), (False, 60.0, True), (None, 0.0, True), (None, 60.0, False)],
)
def test_a_verdict_on_the_holder_counts_more_than_its_lease(engine, verdict, lease_seconds, taken):
    study = make_study(engine, max_trials=1)
    make_worker(engine, study, lease_seconds=lease_seconds).claim()
    asked = []

    def probe_liveness(holders):
        asked.extend(holders)
        return {} if verdict is None else {holder.worker_id: verdict for holder in holders}

    claim = make_worker(engine, study, probe_liveness=probe_liveness).claim()
    assert [holder.process for holder in asked] == [process_identity()]
    assert (claim is not None) is taken


def test_a_study_that_was_stopped_hands_out_no_trials(engine):
    study = make_study(engine)
    worker = make_worker(engine, study)
    assert worker.stop_reason() is None
    studies.request_stop(engine, study._study_id)
    assert worker.stop_reason() == "atelier stop"
    assert worker.claim() is None
    studies.request_stop(engine, study._study_id, stop=False)
    assert worker.claim() is not None


def test_a_violated_constraint_is_what_optuna_would_write(engine):
    study = make_study(engine)
    worker = make_worker(engine, study)
    worker.finish(worker.claim(), "pruned", 0.0, "out of memory", violated="memory")
    trial = study.ask()
    trial.set_constraint("memory", 1.0)
    ours, theirs = study.trials
    assert ours.constraints == theirs.constraints == {"memory": 1.0}


def test_the_gpu_budget_stops_new_trials(engine):
    study = make_study(engine, max_trials=10, max_gpu_seconds=0.05)
    worker = make_worker(engine, study)
    claim = worker.claim()
    time.sleep(0.1)
    worker.finish(claim, "complete", 0.5)
    assert worker.claim() is None


def test_a_claim_that_was_withdrawn_was_never_there(engine):
    study = make_study(engine, max_trials=1)
    first, second = make_worker(engine, study), make_worker(engine, study)
    claim = first.claim()
    first.withdraw(claim)
    again = second.claim()
    assert (again.trial_number, again.attempt) == (0, 1)
    # The same number, but another worker's hold.
    for write in (first.renew, lambda c: first.record(c, RESULT | {"epoch": 0}, 0.5)):
        with pytest.raises(LeaseLost):
            write(claim)
    with pytest.raises(LeaseLost):
        first.finish(claim, "complete", 0.5)
    first.release(claim)
    first.withdraw(claim)
    assert second.record(again, RESULT | {"epoch": 0}, 0.5) is None


def test_a_trial_that_somebody_else_ended_is_not_given_back(engine):
    """Its checkpoints may be gone by now. So a worker that cannot save is told that it has no trial."""
    study = make_study(engine, max_trials=1)
    worker = make_worker(engine, study)
    claim = worker.claim()
    study.tell(claim.trial_number, state=optuna.trial.TrialState.PRUNED)
    assert not worker.release(claim, reason="no such file")
    assert not worker.release(claim, reason="no such file")  # as after a lost reply
    with engine.connect() as connection:
        ends = connection.execute(sa.select(ATTEMPTS.c.outcome, ATTEMPTS.c.reason)).all()
    assert ends == [("lost", "the trial was set to PRUNED by somebody else")]


def test_a_release_may_be_repeated_after_a_lost_reply(engine):
    study = make_study(engine)
    worker, other = make_worker(engine, study), make_worker(engine, study)
    claim = worker.claim()
    assert worker.release(claim, reason="first")
    assert worker.release(claim, reason="second")  # it is not told that another holds the trial
    taken = other.claim()
    assert worker.release(claim)
    assert not other.release(claim)
    assert (taken.attempt, other.release(taken)) == (2, True)


def test_a_connection_that_is_lost_while_optuna_reads_is_no_error(engine):
    study = make_study(engine, max_trials=1)
    make_worker(engine, study).claim()
    storage = optuna_storage.optuna_storage(engine)
    cut = []

    @sa.event.listens_for(storage._backend.engine, "before_cursor_execute")
    def end_it(connection, _cursor, statement, *_):
        # Optuna's second query of three; after its error it goes on in the same transaction.
        if "trial_intermediate_values" in statement and not cut:
            cut.append(connection.connection.dbapi_connection.info.backend_pid)
            with engine.connect() as other:
                other.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": cut[0]})

    read = database.retrying(lambda: storage.get_all_trials(study._study_id))
    assert len(read()) == len(cut) == 1


def test_the_lease_keeper_renews_until_it_is_left(engine):
    study = make_study(engine)
    worker = make_worker(engine, study, lease_seconds=0.5, probe_liveness=nobody_knows)
    other = make_worker(engine, study, probe_liveness=nobody_knows)
    claim = worker.claim()
    with LeaseKeeper(worker, every=0.1) as keeper:
        keeper.hold(claim)
        time.sleep(1.2)  # longer than the lease
        assert other.claim().trial_number == 1
    time.sleep(1)
    assert other.claim().trial_number == 1  # its own, still
    other.release(other.claim())
    assert other.claim().trial_number == 0  # nobody renews the first one any more


def test_process_identity_tells_the_dead_from_the_living():
    assert not is_gone(process_identity())
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    identity = process_identity(child.pid)
    assert not is_gone(identity)
    child.kill()
    child.join()
    assert is_gone(identity)
    assert is_gone(process_identity().rsplit(":", 1)[0] + ":1.00")  # the pid was used again
    assert not is_gone("another-machine:ns:1:1.00")


def work(barrier) -> None:
    """A worker that claims, records and finishes without training; killed now and then."""
    engine = database.connect()
    study = make_study(engine, max_trials=50)
    worker = make_worker(engine, study)
    barrier.wait()
    while (claim := worker.claim()) is not None:
        for epoch in range(claim.last_epoch + 1, 3):
            worker.record(claim, RESULT | {"epoch": epoch}, 0.5)
            if claim.trial_number % 10 == 3 and claim.attempt == 1 and epoch == 1:
                os.kill(os.getpid(), 9)
        worker.finish(claim, "complete", 0.5)


@pytest.fixture
def start(tmp_path):
    """Calls a function of this module in a process of its own, which finds this test's database."""

    def start(function, *arguments):
        output = tmp_path / "processes.log"
        return forking.start(function, *arguments, environment=os.environ, output=output)

    return start


def test_eight_workers_make_exactly_fifty_trials_and_share_none(engine, start):
    study = make_study(engine, max_trials=50)
    barrier = forking.context.Barrier(8)
    workers = [start(work, barrier) for _ in range(8)]
    for worker in workers:
        worker.join(120)
    # A trial whose worker was killed after all others had left.
    start(work, forking.context.Barrier(1)).join(60)
    killed = sum(worker.exitcode == -9 for worker in workers)
    assert killed == 5  # trials 3, 13, 23, 33, 43
    assert sorted(worker.exitcode for worker in workers) == [-9] * 5 + [0] * 3
    states = [trial.state for trial in study.trials]
    assert states == [optuna.trial.TrialState.COMPLETE] * 50
    assert sorted(trial.number for trial in study.trials) == list(range(50))
    with engine.connect() as connection:
        overlaps = connection.scalar(
            sa.text(
                "SELECT count(*) FROM atelier.attempt a JOIN atelier.attempt b USING (trial_id) "
                "WHERE a.number < b.number AND "
                "tstzrange(a.claimed, a.released) && tstzrange(b.claimed, b.released)"
            )
        )
        attempts, epochs = (
            connection.scalar(sa.select(sa.func.count()).select_from(t)) for t in (ATTEMPTS, EPOCHS)
        )
    assert overlaps == 0
    assert attempts == 55
    assert epochs == 150


def prepare_once(barrier) -> None:
    engine = database.connect()
    barrier.wait()
    open_storage(engine)
    assert schema.schema_revision(engine) == schema.head_revision()


def test_processes_that_start_at_once_on_an_empty_database_do_not_race(database_url, start):
    barrier = forking.context.Barrier(4)
    processes = [start(prepare_once, barrier) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4

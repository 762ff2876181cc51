"""How a trial ends, and how a worker does: errors, out of memory, overflow, requests to stop."""

import itertools
import math
import os
import signal
import time

import optuna
import pytest
import sqlalchemy as sa
import torch
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

import search.worker
from search.exit_codes import ExitCode
from search.sampling import distributions
from search.slurm.job import KILL_SECONDS, seconds_to_kill
from search.stopping import SAVE_SECONDS, Stop
from storage import leases, studies
from storage.tables import ATTEMPTS, EPOCHS
from trainer.device import is_out_of_memory

pytestmark = pytest.mark.usefixtures("all_holds")
KEEPER = leases.LeaseKeeper.__init__


def attempts(engine):
    with engine.connect() as connection:
        return connection.scalars(sa.select(ATTEMPTS.c.outcome).order_by(ATTEMPTS.c.claimed)).all()


def reasons(engine):
    with engine.connect() as connection:
        return connection.scalars(sa.select(ATTEMPTS.c.reason).order_by(ATTEMPTS.c.claimed)).all()


def epochs(engine):
    query = sa.select(EPOCHS.c.trial_id, EPOCHS.c.epoch).order_by("trial_id", "epoch")
    with engine.connect() as connection:
        return connection.execute(query).all()


def test_the_sampler_learns_from_trials_that_finished_after_the_workers_first(engine, make_worker):
    worker = make_worker("study.max_trials=99")
    worker.ledger.register()
    first = worker.ledger.claim()
    worker.claims.sample(first)
    worker.ledger.finish(first, "pruned", 0.5)
    space = distributions(worker.study_config)
    for number in range(12):
        worker.study.add_trial(
            optuna.trial.create_trial(
                params={"lr": 1e-3 + number * 1e-5, "batch_size": 32}, distributions=space, value=0.1
            )
        )
    worker.claims.sample(worker.ledger.claim())
    attributes = worker.study.trials[-1].system_attrs
    assert any(key.startswith("tpe:relative_params") for key in attributes), attributes


def always(error):
    """A turn in which every run raises."""

    def turn(runs, _):
        for run in runs:
            try:
                raise error
            except type(error) as raised:
                yield run, raised

    return turn


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc", "gp"])
def test_a_trial_whose_first_worker_died_before_it_sampled(engine, make_worker, sampler):
    settings = (
        f'study.sampler="{sampler}"',
        "study.max_trials=1",
        "train.epochs=1",
        "train.warmup_epochs=0",
    )
    first = make_worker(*settings)
    first.ledger.register()
    first.ledger.release(first.ledger.claim())
    assert make_worker(*settings).run() == ExitCode.DONE
    assert attempts(engine) == ["released", "complete"]


def test_a_trial_that_keeps_raising_fails_with_its_traceback(engine, make_worker, monkeypatch):
    monkeypatch.setattr(search.worker, "train_epoch", always(KeyError("a user's mistake")))
    worker = make_worker("study.max_trials=1", "study.max_failures=2")
    assert worker.run() == ExitCode.FAILED
    assert attempts(engine) == ["error", "error", "failed"]
    assert all("a user's mistake" in reason and "Traceback" in reason for reason in reasons(engine))
    assert [trial.state for trial in worker.study.trials] == [TrialState.FAIL]


def test_out_of_memory_is_told_to_the_sampler(engine, make_worker, monkeypatch):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    monkeypatch.setattr(search.worker, "train_epoch", always(caught.value))
    worker = make_worker("study.max_trials=1")
    worker.run()
    [trial] = worker.study.trials
    assert (trial.state, trial.value, trial.constraints) == (TrialState.PRUNED, 0.0, {"memory": 1.0})
    assert attempts(engine) == ["pruned"]
    assert reasons(engine)[0].startswith("out of memory")


def test_a_loss_that_overflows_is_told_to_the_sampler(engine, make_worker, caplog):
    worker = make_worker("study.max_trials=1", "space.lr=[1e20]")
    worker.run()
    [trial] = worker.study.trials
    assert (trial.state, trial.value) == (TrialState.PRUNED, 0.0)
    [reason] = reasons(engine)
    steps = math.ceil(150 / trial.params["batch_size"])
    assert reason == (
        f"loss not finite in epoch 1: first the logits of every category, in step 3 of {steps}; "
        "training diverged: lower lr or weight_decay"
    )
    assert f"trial 0: {reason}" in caplog.text


def test_an_error_of_the_database_is_not_charged_to_the_trial(engine, make_worker, monkeypatch):
    error = OperationalError("SELECT 1", {}, Exception("gone"))
    monkeypatch.setattr(search.worker, "train_epoch", always(error))
    with pytest.raises(OperationalError):
        make_worker("study.max_trials=1").run()
    assert attempts(engine) == ["released"]  # as the worker signed off: the database is there again


def test_an_error_of_the_machine_is_not_charged_to_the_trial(engine, make_worker, monkeypatch):
    error = OSError(28, "No space left on device")
    monkeypatch.setattr(search.worker, "train_epoch", always(error))
    with pytest.raises(OSError, match="No space left"):
        make_worker("study.max_trials=1", "study.max_failures=0").run()
    assert attempts(engine) == ["released"]  # for another worker, on another machine


def test_a_gpu_that_broke_ends_the_worker_and_counts_once(engine, make_worker, monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(search.worker, "train_epoch", always(error))
    worker = make_worker("study.max_trials=1")
    worker.blame.made_progress = True  # before that it is the host's fault: see test_blame.py
    with pytest.raises(RuntimeError, match="CUDA error"):
        worker.run()
    assert attempts(engine) == ["error"]


def test_a_worker_that_was_replaced_stops_inside_its_epoch(engine, make_worker, monkeypatch):
    monkeypatch.setattr("storage.leases.LeaseKeeper.__init__", quick_keeper)
    worker = make_worker("study.max_trials=1", "train.epochs=200")
    cuts_epoch = worker.stop.cuts_epoch

    def taken_over(left):
        if not reasons(engine)[-1]:
            with engine.begin() as connection:
                connection.execute(
                    sa.update(ATTEMPTS).values(released=sa.func.now(), outcome="lost", reason="drill")
                )
            worker.stop.ask("enough", ExitCode.STOPPED)
        time.sleep(0.05)
        return cuts_epoch(left)

    worker.stop.cuts_epoch = taken_over
    assert worker.run() == ExitCode.STOPPED
    assert (attempts(engine), epochs(engine)) == (["lost"], [])


def quick_keeper(self, *arguments):
    KEEPER(self, *arguments, every=0.02)


@pytest.mark.parametrize(
    "error", [ValueError("of a zombie"), FileNotFoundError("its folder was cleared")]
)
def test_a_trial_that_fails_after_it_was_lost_does_not_end_the_worker(
    engine, make_worker, monkeypatch, error
):
    worker = make_worker("study.max_trials=1", "study.max_failures=0")

    def lose_then_raise(runs, _):
        with engine.begin() as connection:
            connection.execute(sa.update(ATTEMPTS).values(released=sa.func.now(), outcome="lost"))
        worker.stop.ask("enough", ExitCode.STOPPED)
        yield runs[0], error

    monkeypatch.setattr(search.worker, "train_epoch", lose_then_raise)
    assert worker.run() == ExitCode.STOPPED
    assert attempts(engine) == ["lost"]
    assert [trial.state for trial in worker.study.trials] == [TrialState.RUNNING]


def test_what_a_lost_trial_saves_when_its_epoch_is_cut_is_withdrawn(engine, make_worker, monkeypatch):
    worker = make_worker("study.max_trials=1", "train.epochs=200")
    release, steps = worker.ledger.release, itertools.count()

    def lose_then_release(claim, **details):
        assert list(worker.runs.checkpoints(0).glob("*.pt"))
        with engine.begin() as connection:
            connection.execute(sa.update(ATTEMPTS).values(released=sa.func.now(), outcome="lost"))
        return release(claim, **details)

    def cut(seconds_left):
        if next(steps) < 1:
            return False
        worker.stop.ask("wall time", ExitCode.WALL_TIME)
        return True

    worker.ledger.release = lose_then_release
    worker.stop.cuts_epoch = cut
    assert worker.run() == ExitCode.WALL_TIME
    assert attempts(engine) == ["lost"]
    assert not worker.runs.checkpoints(0).exists()


def test_what_fails_while_the_job_is_being_ended_is_not_the_trials_fault(
    engine, make_worker, monkeypatch
):
    worker = make_worker("study.max_trials=1", "study.max_failures=0")

    def killed(runs, _):
        os.kill(os.getpid(), signal.SIGTERM)
        yield runs[0], RuntimeError("the driver shut down")

    monkeypatch.setattr(search.worker, "train_epoch", killed)
    assert worker.run() == ExitCode.STOPPED
    assert attempts(engine) == ["released"]
    assert reasons(engine)[0].startswith("SIGTERM\n")


def test_atelier_stop_ends_the_worker_after_its_epoch(engine, make_worker):
    worker = make_worker()
    cuts_epoch, steps = worker.stop.cuts_epoch, itertools.count()

    def asked_in_the_first_epoch(left):
        if next(steps) == 2:
            studies.request_stop(engine, worker.ledger.study_id)
        return cuts_epoch(left)

    worker.stop.cuts_epoch = asked_in_the_first_epoch
    assert worker.run() == ExitCode.STOPPED
    assert attempts(engine) == ["released"]
    assert reasons(engine) == ["atelier stop"]
    assert len(epochs(engine)) == 1
    assert make_worker("study.max_trials=1").run() == ExitCode.DONE  # opened by a search: it goes on
    assert attempts(engine) == ["released", "complete"]


def test_an_epoch_that_cannot_end_in_time_is_cut_and_loses_nothing(engine, make_worker):
    whole = make_worker(
        "study.max_trials=1", 'study.name="whole"', "space.lr=[1e-3]", "space.batch_size=[32]"
    )
    whole.run()
    curve = studies.curve(engine, whole.ledger.study_id, 0)
    assert len(curve) == 3
    settings = ("study.max_trials=1", "space.lr=[1e-3]", "space.batch_size=[32]")
    late = make_worker(*settings, wall_end=time.time() + SAVE_SECONDS + 60)
    cuts_epoch, steps, requeued = late.stop.cuts_epoch, itertools.count(), []

    def time_flies(left):
        if next(steps) == 4:
            late.stop.deadline = time.time() + SAVE_SECONDS
        return cuts_epoch(left)

    late.stop.cuts_epoch = time_flies
    late.requeue = lambda: requeued.append(True)
    assert late.run() == ExitCode.WALL_TIME
    assert late.made_progress
    assert requeued == [True]
    assert (attempts(engine), reasons(engine)[1:]) == (["complete", "released"], ["wall time"])
    assert studies.curve(engine, late.ledger.study_id, 0) == []
    [checkpoint] = late.runs.checkpoints(0).glob("*.pt")
    assert checkpoint.name == "attempt-0001-epoch-0000-step-00000005.pt"
    assert make_worker(*settings).run() == ExitCode.DONE
    assert studies.curve(engine, late.ledger.study_id, 0) == curve


def test_a_worker_claims_nothing_that_its_last_epoch_would_not_let_it_finish(engine, make_worker):
    worker = make_worker(wall_end=time.time() + SAVE_SECONDS + 300)
    worker.epoch_seconds = 400.0
    assert worker.run() == ExitCode.WALL_TIME
    assert not worker.made_progress
    assert attempts(engine) == []


@pytest.mark.parametrize(
    ("number", "slurm", "left", "cut"),
    [
        (None, True, 10, False),  # ends in time
        (None, True, 5000, False),  # will not, but nobody has called: use the time there is
        (signal.SIGUSR2, True, 10, False),
        (signal.SIGUSR2, True, 5000, True),
        (signal.SIGTERM, True, KILL_SECONDS, True),
        (signal.SIGTERM, True, 1, False),
        (signal.SIGTERM, False, 500, False),  # nobody is going to kill it
    ],
)
def test_when_an_epoch_is_cut(number, slurm, left, cut, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if slurm:
        monkeypatch.setenv("SLURM_JOB_ID", "1")
    stop = Stop(time.time() + 1000, kill_seconds=seconds_to_kill())
    if number is not None:
        stop(number, None)
    assert stop.cuts_epoch(left) is cut


def test_without_any_signal_an_epoch_is_cut_at_the_last_moment():
    stop = Stop(time.time() + SAVE_SECONDS - 1)
    assert stop.cuts_epoch(5)
    assert (stop.end, stop.reason) == (ExitCode.WALL_TIME, "wall time")


def test_the_end_says_who_asked_first():
    stop = Stop(time.time() + 1000)
    stop(signal.SIGUSR2, None)
    stop(signal.SIGTERM, None)  # SLURM's second word
    assert (stop.end, stop.reason) == (ExitCode.WALL_TIME, "SIGUSR2")
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)


def test_a_study_is_opened_although_the_connection_is_lost(engine, make_worker, monkeypatch):
    """As when a worker starts while the database does."""
    make, lost = optuna.create_study, []

    def interrupted(**arguments):
        if not lost:
            with engine.connect() as connection, engine.connect() as other:
                lost.append(connection.connection.dbapi_connection.info.backend_pid)
                other.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": lost[0]})
                connection.execute(sa.text("SELECT 1"))  # raises
        return make(**arguments)

    monkeypatch.setattr(optuna, "create_study", interrupted)
    assert make_worker().study.study_name == "tiny"
    assert lost

"""Several trials in one worker: they come and go, share what they spend, and can be replayed alone."""

import itertools
from pathlib import Path

import optuna
import psycopg2
import pytest
import sqlalchemy as sa
import torch

from search.exit_codes import ExitCode
from storage import ranks, studies
from storage.status import read_status
from storage.tables import ATTEMPTS
from storage.words import counted
from tests.integration.test_ledger import RESULT
from tests.integration.test_worker import attempts, reasons
from trainer.checkpoint import Checkpoints
from trainer.loop import train
from trainer.run import Run

pytestmark = pytest.mark.usefixtures("all_holds")


def test_every_trial_of_a_packed_search_can_be_replayed_alone(atelier, engine, monkeypatch):
    monkeypatch.setenv("ATELIER_FEATURES", "memory=0 disk=0")  # so that a pack's trials share an epoch
    changes = (
        "study.max_trials=6",
        "space.batch_size=[16,32,64]",
        "study.strategy=asha",
        "study.rungs=[0]",
    )
    settings = [f"--set={change}" for change in changes]
    atelier("search", "study.toml", "--workers", 1, "--pack", 3, *settings)
    entry = studies.study_entry(engine, "tiny")
    rows = [studies.epochs_of(engine, entry.study_id, number) for number in range(6)]
    assert all(rows)
    assert any(row[0]["stream_epoch"] > 0 for row in rows)  # some have joined late
    one, two = ATTEMPTS.alias(), ATTEMPTS.alias()
    pairs = sa.select(sa.func.count()).join_from(one, two, one.c.trial_id < two.c.trial_id)
    overlapping = pairs.where(one.c.claimed < two.c.released, two.c.claimed < one.c.released)
    with engine.connect() as connection:
        assert connection.scalar(overlapping) >= 3
        # What a worker holds side by side counts once.
        held = sa.func.max(ATTEMPTS.c.released) - sa.func.min(ATTEMPTS.c.claimed)
        whole = connection.scalar(sa.select(sa.extract("epoch", held)))
        each = sa.func.sum(ATTEMPTS.c.released - ATTEMPTS.c.claimed)
        assert connection.scalar(sa.select(sa.extract("epoch", each))) > 1.5 * float(whole)
    spent = read_status(engine, entry.study_id, "tiny").gpu_hours * 3600
    assert spent <= float(whole) + 0.01
    for number, row in enumerate(rows):
        result = atelier("replay", "tiny", "--trial", number)
        assert result.stderr.endswith(
            f"the numbers of {counted(len(row), 'epoch')} are equal, bit for bit\n"
        )
        assert len(result.stdout.splitlines()) == len(row)


def test_a_replay_that_comes_out_otherwise_says_so(atelier, engine):
    atelier("search", "study.toml", "--workers", 1, "--set", "study.max_trials=1")
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE atelier.epoch SET val_loss = val_loss + 1e-9 WHERE epoch = 1")
        )
    result = atelier("replay", "tiny", "--trial", 0, code=1)
    lines = result.stdout.splitlines()
    assert [line.split("  ")[-1] for line in lines] == ["equal", "other: val_loss", "equal"]
    assert "1 of 3 epochs differ; the same machine" in result.stderr


def test_a_trial_that_does_not_fit_beside_the_others_waits(engine, make_worker, monkeypatch):
    step, full = Run.train_step, []

    def train_step(run, *arguments):
        if not full and len(worker.trials) == 3 and run is worker.trials[-1].run:
            full.append(worker.trials[-1].claim.trial_number)
            raise torch.cuda.OutOfMemoryError
        return step(run, *arguments)

    monkeypatch.setattr(Run, "train_step", train_step)
    worker = make_worker("study.max_trials=4", 'study.strategy="none"', pack=3)
    assert worker.run() == ExitCode.DONE
    assert worker.pack == 2
    assert sorted(attempts(engine)) == ["complete"] * 4 + ["released"]
    assert "out of memory beside 2 other trials" in reasons(engine)
    assert [trial.state.name for trial in worker.study.trials] == ["COMPLETE"] * 4


def test_an_error_in_a_pack_is_one_trials_own(engine, make_worker, monkeypatch):
    step = Run.train_step

    def train_step(run, *arguments):
        if run is worker.trials[0].run and worker.trials[0].claim.trial_number == 0:
            raise KeyError("a user's mistake")
        return step(run, *arguments)

    monkeypatch.setattr(Run, "train_step", train_step)
    worker = make_worker("study.max_trials=3", "study.max_failures=0", 'study.strategy="none"', pack=3)
    assert worker.run() == ExitCode.DONE
    assert [trial.state.name for trial in worker.study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_a_pack_that_has_to_stop_gives_all_its_trials_back_and_loses_nothing(
    engine,
    make_worker,
):
    settings = ("study.max_trials=3", 'study.strategy="none"')
    worker = make_worker(*settings, pack=3)
    cuts_epoch, steps = worker.stop.cuts_epoch, itertools.count()

    def no_time_left(left):
        if next(steps) == 20:
            worker.stop.deadline = 0.0
        return cuts_epoch(left)

    worker.stop.cuts_epoch = no_time_left
    assert worker.run() == ExitCode.WALL_TIME
    assert attempts(engine) == ["released"] * 3
    steps_done = [run.step for run in (Run(*one) for one in resumed(worker))]
    assert sum(steps_done) >= 20
    later = make_worker(*settings, pack=3)
    assert later.run() == ExitCode.DONE
    for number in range(3):
        rows = studies.epochs_of(engine, worker.ledger.study_id, number)
        assert [row["stream_epoch"] for row in rows] == [0, 1, 2]


def resumed(worker):
    for trial in worker.study.trials:
        config = worker.study_config.config(trial.params)
        yield config, worker.workspace, Checkpoints(worker.runs.checkpoints(trial.number))


@pytest.fixture
def statements(engine):
    """How many statements the server has been sent by new connections; it logs BEGIN and pings too."""
    url = engine.url
    connection = psycopg2.connect(host=url.query["host"], user="postgres", dbname="postgres")
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER DATABASE {url.database} SET log_statement = 'all'")
        cursor.execute("SHOW data_directory")
        log = Path(cursor.fetchone()[0]).parent / "postgres.log"
    connection.close()
    engine.dispose()  # its connections were made before
    begin = log.stat().st_size
    return lambda: log.read_bytes()[begin:].count(b"statement: ")


def test_three_round_trips_to_the_database_per_trial_and_epoch(statements, make_worker):
    counts = []
    for epochs in (5, 25):
        name = f'study.name="of {epochs}"'
        settings = (f"train.epochs={epochs}", "train.warmup_epochs=0", 'study.strategy="asha"', name)
        worker = make_worker("study.max_trials=1", "study.rungs=[1]", *settings)
        before = statements()
        assert worker.run() == ExitCode.DONE
        counts.append(statements() - before)
    assert counts[0] > 10  # they are counted
    assert (counts[1] - counts[0]) / 20 <= 3


def test_a_rung_is_decided_in_one_round_trip(statements, make_worker):
    worker = make_worker("study.max_trials=1", "train.epochs=10")
    ledger = worker.ledger
    ledger.register()
    claim = ledger.claim()
    worker.claims.sample(claim)
    before = statements()
    for epoch in range(10):
        ledger.renew(claim)
        ledger.record(claim, RESULT | {"epoch": epoch, "stream_epoch": epoch}, 0.5)
        assert ledger.rank(epoch, 0.5) == ranks.Rank(0, 1)
    assert statements() - before == 30


def test_a_trial_whose_first_attempt_failed_is_tried_again(engine, make_worker, monkeypatch):
    step, broken = Run.train_step, []

    def train_step(run, *arguments):
        if not broken:
            broken.append(run)
            raise KeyError("for once")
        return step(run, *arguments)

    monkeypatch.setattr(Run, "train_step", train_step)
    assert make_worker("study.max_trials=1", pack=2).run() == ExitCode.DONE
    assert attempts(engine) == ["error", "complete"]


def test_a_trial_that_cannot_be_sampled_is_charged_for_it(engine, make_worker, monkeypatch):
    worker = make_worker("study.max_trials=2", "study.max_failures=0", 'study.strategy="none"', pack=2)
    sample = worker.claims.sample

    def refuse(claim):
        if claim.trial_number == 1:
            raise ValueError("no sample")
        return sample(claim)

    monkeypatch.setattr(worker.claims, "sample", refuse)
    assert worker.run() == ExitCode.DONE
    assert [trial.state.name for trial in worker.study.trials] == ["COMPLETE", "FAIL"]
    assert "no sample" in reasons(engine)[1]


def test_a_claimed_trial_for_which_no_place_became_free_is_given_back(engine, make_worker):
    settings = ('study.strategy="asha"', "study.rungs=[0]", "study.max_trials=2")
    worker, withdrawn = make_worker(*settings), []
    withdraw = worker.ledger.withdraw
    worker.ledger.withdraw = lambda claim: withdrawn.append(claim.trial_number) or withdraw(claim)
    assert worker.run() == ExitCode.DONE  # the first at the rung goes on
    assert attempts(engine)[0] == "complete"
    assert len(attempts(engine)) == 2  # as if it had not been claimed meanwhile
    assert withdrawn == [1]


def test_an_offer_that_ended_meanwhile_does_not_end_the_worker(engine, make_worker):
    worker = make_worker("study.max_trials=2", pack=2)

    def ended_in_the_dashboard(params):
        trial = worker.study.trials[-1]
        if trial.number == 1 and not trial.state.is_finished():
            worker.study.tell(1, state=optuna.trial.TrialState.FAIL)
            return "not worth it"
        return None

    worker.claims.rules_out = ended_in_the_dashboard
    assert worker.run() == ExitCode.DONE
    assert [trial.state.name for trial in worker.study.trials] == ["COMPLETE", "FAIL"]


def test_a_checkpoint_that_is_lost_is_trained_again_on_the_same_stream(engine, make_worker):
    settings = ("study.max_trials=1", "space.lr=[1e-3]", "space.batch_size=[32]")
    worker = make_worker(*settings)
    worker.ledger.register()
    claim = worker.ledger.claim()
    worker.claims.sample(claim)
    late = train(
        worker.study_config.config({"lr": 1e-3, "batch_size": 32}),
        worker.workspace,
        stream_epochs=[7, 8, 9],
    )
    expected = [result.val_loss for result in late]
    result = worker_result(worker, [7, 8])
    for one in result:
        worker.ledger.record(claim, one.columns(), one.val_accuracy)
    worker.ledger.release(claim)
    assert worker.run() == ExitCode.DONE
    rows = studies.epochs_of(engine, worker.ledger.study_id, 0)
    assert [row["stream_epoch"] for row in rows] == [7, 8, 9]
    assert [row["val_loss"] for row in rows] == expected


def worker_result(worker, stream_epochs):
    config = worker.study_config.config({"lr": 1e-3, "batch_size": 32})
    return itertools.islice(train(config, worker.workspace, stream_epochs=stream_epochs), 2)


def test_packs_of_several_workers_cannot_each_take_all_the_memory(atelier):
    result = atelier("search", "study.toml", "--pack", "auto", "--workers", 2, code=2)
    assert "error: --pack auto with 2 workers" in result.stderr


@pytest.mark.parametrize("pack", ["0", "-1", "65", "many", "1.5", ""])
def test_a_pack_that_is_no_number(atelier, pack):
    for verb in (["search", "study.toml"], ["worker", "study.toml"], ["submit", "study.toml"]):
        result = atelier(*verb, f"--pack={pack}", code=2)
        assert f"error: --pack {pack!r}: allowed is a number from 1 to 64, or auto" in result.stderr

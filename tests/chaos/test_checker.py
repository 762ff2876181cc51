"""The checker finds what is planted, and nothing where nothing is."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from typer.testing import CliRunner

from search.cli import app
from search.verify.evidence import gather
from search.verify.rules import Holds, violations
from storage import database
from storage.paths import artifacts
from tests.chaos.checker import References, half_written
from tests.chaos.search import STUDY
from tests.conftest import copied_database
from trainer.predictions import Predictions

TRIALS = 4
FIRST = "(SELECT min(trial_id) FROM public.trials WHERE state = 'COMPLETE')"


@dataclass
class Ended:
    """A study that has ended undisturbed."""

    connection: sa.Connection
    references: References

    def broken(self):
        """The names of the rules that are broken."""
        found = violations(self.evidence, Holds.UNDISTURBED, self.references.curve)
        return {one.rule for one in found}

    @property
    def evidence(self):
        return gather(self.connection, "ended")

    def number(self, query):
        return self.connection.execute(sa.text(query)).scalar_one()


@pytest.fixture(scope="module")
def engine(server, template, demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_DATABASE_URL", copied_database(server, "ended", template))
        patch.setenv("ATELIER_HOME", str(folder / "home"))
        patch.setenv("OMP_NUM_THREADS", "1")
        study = folder / "study.toml"
        text = STUDY.format(name="ended", data=demo).replace("100000", str(TRIALS))
        study.write_text(text.replace("promote", "asha"))  # so that a trial has one attempt
        result = CliRunner().invoke(app, ["worker", str(study)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        engine = database.connect()
        yield engine, References()
        engine.dispose()
    torch.set_num_threads(threads)  # the worker has set its own


@pytest.fixture
def ended(engine):
    """What is planted is rolled back."""
    engine, references = engine
    with engine.connect() as connection:
        yield Ended(connection, references)


def test_nothing_is_found_where_nothing_is(ended):
    assert ended.broken() == set()
    assert ended.number("SELECT count(*) FROM public.trials") == TRIALS
    assert ended.number("SELECT count(*) FROM public.trials WHERE state = 'COMPLETE'") > 0


PLANTED = {
    "a trial too many": (
        "UPDATE atelier.study SET max_trials = max_trials - 1",
        {"the_budget_is_used_up"},
    ),
    "a lost trial": (
        f"UPDATE public.trials SET state = 'RUNNING' WHERE trial_id = {FIRST}",
        {"every_trial_has_ended_well", "each_attempt_ended_once"},
    ),
    "a trial that is gone": (
        "UPDATE public.trials SET number = 7 WHERE number = 1",
        {"the_budget_is_used_up"},
    ),
    "a failed trial": (
        f"UPDATE public.trials SET state = 'FAIL' WHERE trial_id = {FIRST}",
        {"every_trial_has_ended_well", "each_attempt_ended_once"},
    ),
    "a lease that nobody gave back": (
        f"UPDATE atelier.attempt SET released = NULL WHERE trial_id = {FIRST}",
        {"nobody_holds_a_trial"},
    ),
    "a second holder": (
        "INSERT INTO atelier.attempt "
        "SELECT trial_id, 2, study_id, worker_id, claimed + interval '1 ms', "
        f"renewed, lease_until, released, outcome, reason FROM atelier.attempt WHERE trial_id = {FIRST}",
        {"nobody_held_what_another_held", "each_attempt_ended_once"},
    ),
    "a duplicated epoch": (
        "ALTER TABLE atelier.epoch DROP CONSTRAINT epoch_pkey; "
        f"INSERT INTO atelier.epoch SELECT * FROM atelier.epoch WHERE trial_id = {FIRST} AND epoch = 1",
        {"each_epoch_is_on_record_once", "optuna_was_told_the_same"},
    ),
    "a lost epoch": (
        f"DELETE FROM atelier.epoch WHERE trial_id = {FIRST} AND epoch = 2; "
        f"DELETE FROM public.trial_intermediate_values WHERE trial_id = {FIRST} AND step = 2",
        {"each_epoch_is_on_record_once"},
    ),
    "an epoch of nobody": (
        f"UPDATE atelier.epoch SET attempt = 7 WHERE trial_id = {FIRST}",
        {"each_epoch_is_on_record_once"},
    ),
    "an epoch that Optuna was told twice": (
        "ALTER TABLE public.trial_intermediate_values DROP CONSTRAINT "
        "trial_intermediate_values_trial_id_step_key; "
        "INSERT INTO public.trial_intermediate_values "
        "SELECT trial_intermediate_value_id + 10000, trial_id, step, "
        "intermediate_value, intermediate_value_type FROM public.trial_intermediate_values "
        f"WHERE trial_id = {FIRST} AND step = 1",
        {"optuna_was_told_the_same"},
    ),
    "another score": (
        f"UPDATE public.trial_values SET value = value + 1e-9 WHERE trial_id = {FIRST}",
        {"optuna_was_told_the_same"},
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_in_the_database_is_found(ended, planted):
    statements, rules = PLANTED[planted]
    for statement in statements.split("; "):
        assert ended.connection.execute(sa.text(statement)).rowcount != 0
    assert rules <= ended.broken()


@pytest.mark.parametrize(("lease", "rules"), [(-1, set()), (1, {"nobody_held_what_another_held"})])
def test_a_successor_that_did_not_wait_for_the_lease_is_found(ended, lease, rules):
    for statement in (
        "INSERT INTO atelier.worker (id, host, pid, process) VALUES ('b', 'b', 1, 'b:1:1')",
        f"UPDATE atelier.attempt SET number = 2 WHERE trial_id = {FIRST}",
        f"UPDATE atelier.epoch SET attempt = 2 WHERE trial_id = {FIRST}",
        "INSERT INTO atelier.attempt SELECT trial_id, 1, study_id, 'b', "
        "claimed - interval '2 s', claimed - interval '1 s', "
        f"claimed + interval '{lease} ms', claimed - interval '1 s', 'lost' "
        f"FROM atelier.attempt WHERE trial_id = {FIRST}",
    ):
        assert ended.connection.execute(sa.text(statement)).rowcount != 0
    assert ended.broken() == rules


@pytest.mark.parametrize("column", ["train_loss", "val_accuracy", "val_log_loss", "lr"])
def test_a_curve_that_is_off_by_one_bit_is_found(ended, column):
    where = f"WHERE trial_id = {FIRST} AND epoch = 2"
    value = ended.number(f"SELECT {column} FROM atelier.epoch {where}")
    off = sa.text(f"UPDATE atelier.epoch SET {column} = :value {where}")
    ended.connection.execute(off, {"value": math.nextafter(value, 2)})
    assert "each_curve_is_that_of_an_undisturbed_run" in ended.broken()


def test_one_of_the_best_that_waited_to_the_end_is_found(ended):
    best = "(SELECT trial_id FROM atelier.epoch WHERE epoch = 1 ORDER BY value DESC LIMIT 1)"
    for statement, rules in (
        ("", set()),
        (f"DELETE FROM atelier.epoch WHERE epoch > 1 AND trial_id = {best}", {RUNG}),
    ):
        if statement:
            ended.connection.execute(sa.text(statement))
        evidence = ended.evidence
        settings = evidence.config.study.model_copy(update={"strategy": "promote"})
        config = evidence.config.model_copy(update={"study": settings})
        assert rules <= {
            one.rule for one in violations(replace(evidence, config=config), Holds.UNDISTURBED)
        }


RUNG = "the_best_at_each_rung_went_on"


@contextmanager
def put(path, data):
    before = path.read_bytes() if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data) if data is not None else path.unlink()
    yield
    path.unlink(missing_ok=True) if before is None else path.write_bytes(before)


def test_what_is_planted_on_the_disk_is_found(ended, tmp_path):
    runs = ended.evidence.runs
    first = min(runs.predictions(0).parent.iterdir())
    own, other = Predictions.load(first), tmp_path / "other.npz"
    all_right = np.broadcast_to(own.labels, own.classes.shape)
    Predictions(own.labels, all_right, own.log_probs).save(other)
    for path, data, rule in (
        (
            runs.checkpoints(0) / "attempt-0001-epoch-0001-step-00000004.pt",
            b"",
            "nothing_is_left",
        ),
        (runs.path / "logs" / ".log.1234", b"", None),
        (artifacts() / ".picture.1234", b"", None),
        (runs.predictions(99), b"", "nothing_is_left"),
        (first, None, "each_complete_trial_has_its_predictions"),
        (first, first.read_bytes()[:-20], "each_complete_trial_has_its_predictions"),
        (first, other.read_bytes(), "each_complete_trial_has_its_predictions"),
    ):
        with put(path, data):
            if rule is None:
                [left] = half_written(runs.path)
                assert path.name in left
            else:
                assert rule in ended.broken(), path
    assert ended.broken() <= {"nothing_is_left"}  # the emptied folder of trial 0

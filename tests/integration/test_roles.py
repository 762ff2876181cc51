"""The ways into the database: the dashboard's reads everything and writes nothing, a worker's deletes
no study and changes no table."""

import optuna
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from storage import database, network, roles
from tests.integration.test_ledger import RESULT, make_study, make_worker

DESTRUCTION = [
    "DELETE FROM studies",
    "DELETE FROM trials",
    "DELETE FROM atelier.epoch",
    "DELETE FROM atelier.study",
    "TRUNCATE trials CASCADE",
    "DROP TABLE atelier.attempt",
    "DROP SCHEMA atelier CASCADE",
    "ALTER TABLE atelier.epoch ADD COLUMN x int",
    "CREATE TABLE t (i int)",
    "CREATE ROLE another",
]

WRITES = [
    "DELETE FROM trials",
    "UPDATE studies SET study_name = 'x'",
    "DELETE FROM atelier.epoch",
    "CREATE TABLE t (i int)",
    "SELECT pg_terminate_backend(0) FROM atelier.study FOR UPDATE",
]


def test_everything_can_be_read(engine):
    study = make_study(engine)
    make_worker(engine, study).claim()
    looking = roles.read_only(engine)
    assert looking.has_role
    assert len(optuna.load_study(study_name="s", storage=looking.storage).trials) == 1
    with looking.engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM atelier.attempt")) == 1
        assert connection.scalar(sa.text("SELECT current_user")) == network.VIEWER
    looking.engine.dispose()


@pytest.mark.parametrize("statement", WRITES)
def test_nothing_can_be_written_even_in_a_transaction_that_may(engine, statement):
    make_study(engine)
    looking = roles.read_only(engine)
    with looking.engine.connect() as connection:
        connection.execute(sa.text("SET TRANSACTION READ WRITE"))
        with pytest.raises(DBAPIError, match="permission denied"):
            connection.execute(sa.text(statement))
    with pytest.raises(optuna.exceptions.StorageInternalError):
        looking.storage.set_study_user_attr(1, "a", 1)
    looking.engine.dispose()


def test_without_the_role_the_transactions_are_read_only(engine, monkeypatch):
    make_study(engine)
    monkeypatch.setattr(roles, "VIEWER", "a_role_that_is_not_there")
    looking = roles.read_only(engine)
    assert not looking.has_role
    with (
        looking.engine.connect() as connection,
        pytest.raises(DBAPIError, match="read-only transaction"),
    ):
        connection.execute(sa.text("DELETE FROM trials"))
    looking.engine.dispose()


@pytest.mark.parametrize("statement", DESTRUCTION)
def test_a_worker_can_destroy_nothing(engine, statement):
    make_study(engine)
    work = roles.for_worker(engine)
    assert work.has_role
    with (
        work.engine.connect() as connection,
        pytest.raises(DBAPIError, match=r"permission denied|owner"),
    ):
        connection.execute(sa.text(statement))
    with pytest.raises(optuna.exceptions.StorageInternalError):
        work.storage.delete_study(1)
    work.engine.dispose()


def test_a_worker_can_do_its_work(engine):
    study = make_study(engine)
    work = roles.for_worker(engine)
    worker = make_worker(work.engine, study)
    claim = worker.claim()
    worker.withdraw(claim)
    claim = worker.claim()
    worker.record(claim, RESULT | {"epoch": 0}, 0.5)
    worker.finish(claim, "complete", 0.5)
    assert study.trials[0].value == 0.5
    work.engine.dispose()


def test_a_user_who_has_only_a_workers_rights_runs_a_worker(engine, atelier, monkeypatch):
    atelier("search", "study.toml", "--set", "study.max_trials=1")
    superuser = database.connect(engine.url.set(username="postgres"))
    with superuser.begin() as connection:
        connection.execute(sa.text(f"CREATE ROLE hand LOGIN IN ROLE {network.WORKER}"))
        connection.execute(sa.text("UPDATE atelier.study SET max_trials = 2"))
    superuser.dispose()
    url = engine.url.set(username="hand").render_as_string(hide_password=False)
    monkeypatch.setenv("ATELIER_DATABASE_URL", url)
    atelier("worker", "study.toml")
    assert "2/2 trials" in atelier("status", "tiny").stdout
    refused = atelier("db", "upgrade", code=2).stderr
    assert "permission denied" in refused
    assert "let the owner of the tables run: atelier db upgrade" in refused
    hand = database.connect()
    with hand.connect() as connection, pytest.raises(DBAPIError, match="permission denied"):
        connection.execute(sa.text("DELETE FROM studies"))
    hand.dispose()

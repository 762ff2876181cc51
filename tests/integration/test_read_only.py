"""The dashboard's way into the database: it reads everything and writes nothing."""

import optuna
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from storage import database
from tests.integration.test_ledger import make_study, make_worker

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
    looking = database.read_only(engine)
    assert looking.has_role
    assert len(optuna.load_study(study_name="s", storage=looking.storage).trials) == 1
    with looking.engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM atelier.attempt")) == 1
        assert connection.scalar(sa.text("SELECT current_user")) == database.VIEWER
    looking.engine.dispose()


@pytest.mark.parametrize("statement", WRITES)
def test_nothing_can_be_written_even_in_a_transaction_that_may(engine, statement):
    make_study(engine)
    looking = database.read_only(engine)
    with looking.engine.connect() as connection:
        connection.execute(sa.text("SET TRANSACTION READ WRITE"))
        with pytest.raises(DBAPIError, match="permission denied"):
            connection.execute(sa.text(statement))
    with pytest.raises(optuna.exceptions.StorageInternalError):
        looking.storage.set_study_user_attr(1, "a", 1)
    looking.engine.dispose()


def test_without_the_role_the_transactions_are_read_only(engine, monkeypatch):
    make_study(engine)
    monkeypatch.setattr(database, "VIEWER", "a_role_that_this_user_may_not_make")
    looking = database.read_only(engine)
    assert not looking.has_role
    with (
        looking.engine.connect() as connection,
        pytest.raises(DBAPIError, match="read-only transaction"),
    ):
        connection.execute(sa.text("DELETE FROM trials"))
    looking.engine.dispose()

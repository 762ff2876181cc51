"""Make Optuna's tables and ours, check their versions, and upgrade them."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from storage.clock import NOW
from storage.database import WORK, is_pooled, log, other_settings, retrying, settings_of
from storage.faults import (
    INSUFFICIENT_PRIVILEGE,
    NO_POOLER,
    reason,
    sqlstate,
)
from storage.network import VIEWER, WORKER
from storage.properties import Property, is_owner, make_roles, properties, tables, why_without
from storage.tables import SCHEMA
from storage.url import DatabaseError, shown
from storage.words import counted

_CREATE_LOCK = 0x41544C52  # advisory lock: two processes must not create the tables at once


def examine(engine: sa.Engine) -> Iterator[Property]:
    """All checks of `atelier db check`: whether the database can be used.

    The engine's sessions need not be checked ones: this checks their settings too.
    """
    with engine.connect() as connection:
        present = settings_of(connection.connection.driver_connection, WORK)
        general = list(properties(connection))
        pooled = is_pooled(connection)
    yield from general
    problem = f"is reached through a pooler; {NO_POOLER}" if pooled else None
    yield Property("way", "through a pooler" if pooled else "to PostgreSQL itself", problem)
    for name, asked in WORK.settings.items():
        yield Property(name, present[name], other_settings(present, {name: asked}))
    if any(check.problem for check in general if check.name == "rights"):
        return  # this user may not read what the other checks need
    revision = schema_revision(engine)
    if revision is None:
        yield Property(
            "schema", "none yet", remark="the first search, submit or worker makes the tables"
        )
        return
    try:
        yield Property("schema", require_schema(engine))
    except DatabaseError as error:
        yield Property("schema", revision, str(error).removeprefix("the database "))
        return
    with engine.connect() as connection:
        yield tables(connection)
        why = why_without(connection, WORKER, VIEWER)
    everything = "workers and viewers have all rights of this user"
    yield Property("roles", everything if why else "both", remark=why)


def require_fit(engine: sa.Engine, only: str | None = None) -> None:
    """Raises DatabaseError for the first property of the database that prevents writing to it.

    With `only`, no other property is checked.
    """
    with engine.connect() as connection:
        for check in properties(connection):
            if check.problem and only in (None, check.name):
                raise DatabaseError(f"the database at {shown(engine.url)} {check.problem}")


@retrying
def ensure_tables(engine: sa.Engine) -> None:
    """Give an empty database Optuna's tables and ours.

    Raises DatabaseError if there are tables of another version, or if the database takes no writes.
    """
    require_fit(engine)
    if schema_revision(engine) is None:
        upgrade(engine)
    else:
        require_schema(engine)


@retrying
def upgrade(engine: sa.Engine, revision: str = "head") -> None:
    """Create the tables and roles, or upgrade ours; several processes may do so at once.

    Logs a warning if workers will have all rights of this user. Raises DatabaseError if the schema is
    newer than this program, or older and in use. It does so too if the tables are another user's, or
    if the database does not fit.
    """
    require_fit(engine)
    check_schema(engine)
    by_owner = "let the owner of the tables run: atelier db upgrade"
    with engine.connect() as connection:
        if schema_revision(engine) is not None and not is_owner(connection):
            raise DatabaseError(f"permission denied: the tables are another user's; {by_owner}")
    try:
        _upgrade(engine, revision)
    except SQLAlchemyError as error:
        if sqlstate(error) != INSUFFICIENT_PRIVILEGE:
            raise
        # The error is about Optuna's tables.
        raise DatabaseError(f"{reason(error)}; {by_owner}") from error
    with engine.connect() as connection:
        why = why_without(connection, WORKER, VIEWER)
    if why is not None:
        log.warning("workers and viewers will have all rights of this user: %s", why)


def _upgrade(engine: sa.Engine, wanted: str) -> None:
    from storage import migrate, optuna_storage  # late: slow to import, and looking needs neither

    with engine.connect() as lock:
        lock.execute(sa.text("SELECT pg_advisory_lock(:key)"), {"key": _CREATE_LOCK})
        lock.commit()
        try:
            optuna_storage.optuna_storage(engine)  # makes Optuna's tables
            revision = schema_revision(engine)
            with engine.begin() as connection:
                if revision not in (None, head_revision()):
                    _refuse_if_held(connection)
                if not connection.dialect.has_schema(connection, SCHEMA):  # else an administrator's
                    connection.execute(sa.schema.CreateSchema(SCHEMA))
                optuna_storage.show_optunas_tables(connection)
                migrate.upgrade(migrations(), connection, wanted)
                make_roles(connection)
        finally:
            lock.execute(sa.text("SELECT pg_advisory_unlock(:key)"), {"key": _CREATE_LOCK})


def _refuse_if_held(connection: sa.Connection) -> None:
    """Raises DatabaseError while workers hold trials. Locks claims out until the transaction ends."""
    # SQL as text: the tables are older than the models.
    connection.exec_driver_sql(f"LOCK TABLE {SCHEMA}.attempt IN SHARE ROW EXCLUSIVE MODE")
    held = f"FROM {SCHEMA}.attempt WHERE released IS NULL AND lease_until > {NOW}"
    if number := connection.scalar(sa.text(f"SELECT count(*) {held}")):
        raise DatabaseError(
            f"workers of an older Atelier hold {counted(number, 'trial')}; let them end first: "
            "atelier stop STUDY, with the version that they run"
        )


def check_schema(engine: sa.Engine) -> None:
    """Raises DatabaseError if our tables were made by a newer version of Atelier."""
    revision = schema_revision(engine)
    if revision is not None and not knows(revision):
        raise DatabaseError(
            f"the database has schema {revision}, which this version of Atelier does not know "
            f"(it knows up to {head_revision()}); use the newer Atelier that made it"
        )


def knows(revision: str) -> bool:
    """Whether this program can make the tables of that schema revision."""
    return revision in _revisions(migrations())


def require_schema(engine: sa.Engine) -> str:
    """The schema's revision. Raises DatabaseError unless this program wants that revision."""
    check_schema(engine)
    revision = schema_revision(engine)
    if revision is None:
        raise DatabaseError("there are no tables yet; the first search, submit or worker makes them")
    if revision != head_revision():
        raise DatabaseError(
            f"the database has schema {revision}, this version of Atelier wants {head_revision()}; let "
            "its workers end (atelier stop STUDY), then run: atelier db upgrade"
        )
    return revision


def schema_revision(engine: sa.Engine) -> str | None:
    """The revision of our tables in the database; None before they exist."""
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version", SCHEMA):
            return None
        revision: str | None = connection.scalar(
            sa.text(f"SELECT version_num FROM {SCHEMA}.alembic_version")
        )
        return revision


def head_revision() -> str:
    """The revision that this program wants."""
    return _revisions(migrations())[-1]


def migrations() -> Path:
    """The folder of Alembic's files."""
    return Path(__file__).with_name("migrations")


@cache
def _revisions(folder: Path) -> list[str]:
    """The revisions of all migrations, oldest first. The names of their files begin with them."""
    return sorted(path.name.partition("_")[0] for path in (folder / "versions").glob("[0-9]*.py"))

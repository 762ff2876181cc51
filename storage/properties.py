"""Check that a PostgreSQL database fits Atelier, and give the roles their rights in it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from storage.faults import is_transient
from storage.network import VIEWER, WORKER
from storage.optuna_tables import OPTUNAS_TABLES
from storage.tables import METADATA, SCHEMA

MINIMUM_SERVER = 14
_EVERYWHERE = f"SCHEMA public, {SCHEMA}"
# What each role may do with Optuna's tables and ours. No role may change or drop a table.
RIGHTS = {
    VIEWER: (f"SELECT ON ALL TABLES IN {_EVERYWHERE}",),
    WORKER: (
        f"SELECT, INSERT, UPDATE ON ALL TABLES IN {_EVERYWHERE}",
        f"USAGE ON ALL SEQUENCES IN {_EVERYWHERE}",
        f"DELETE ON {SCHEMA}.attempt",  # Ledger.withdraw
    ),
}


class Property(NamedTuple):
    """One thing about a database."""

    name: str
    value: str
    problem: str | None = None  # and what to do; the sentence begins with "the database at ..."
    remark: str | None = None  # of what works, but could be better


def properties(connection: sa.Connection) -> Iterator[Property]:
    """What must be right before Atelier makes tables or writes to them."""
    answer = _row(
        connection,
        """
        SELECT current_setting('server_version') AS version,
            current_setting('server_version_num')::int / 10000 AS major,
            current_setting('server_encoding') AS encoding,
            current_setting('transaction_read_only') = 'on' AS read_only,
            quote_ident(current_user) AS me
        """,
    )
    yield Property(
        "server",
        f"PostgreSQL {answer.version}",
        f"is PostgreSQL {answer.version}; allowed is {MINIMUM_SERVER}+"
        if answer.major < MINIMUM_SERVER
        else None,
    )
    yield Property(
        "encoding",
        answer.encoding,
        f"has the encoding {answer.encoding}, which cannot hold every name; make another with: CREATE "
        "DATABASE name ENCODING 'UTF8' TEMPLATE template0; what is in this one moves with: atelier db "
        "backup and restore"
        if answer.encoding != "UTF8"
        else None,
    )
    yield Property(
        "writes",
        "no" if answer.read_only else "yes",
        "takes no writes (a standby, or default_transaction_read_only); give the primary"
        if answer.read_only
        else None,
    )
    grants = "; ".join(_missing_grants(connection))
    yield Property(
        "rights",
        f"enough for {answer.me}",
        f"gives {answer.me} too few rights; let its owner or an administrator run: {grants}"
        if grants
        else None,
    )


def _missing_grants(connection: sa.Connection) -> Iterator[str]:
    """SQL statements that would let this user make the tables, or read the existing ones."""
    answer = _row(
        connection,
        """
        SELECT quote_ident(current_user) AS me, quote_ident(current_database()) AS database,
            public IS NULL AS no_public, ours IS NULL AS no_schema,
            -- Not to_regclass: it fails if this user may not look into the schema.
            NOT EXISTS (
                SELECT FROM pg_class WHERE relnamespace = public AND relname = 'studies'
            ) AS makes_optunas,
            NOT EXISTS (
                SELECT FROM pg_class WHERE relnamespace = ours AND relname = 'alembic_version'
            ) AS makes_ours,
            has_schema_privilege(public, 'USAGE') AS sees_public,
            has_schema_privilege(public, 'CREATE') AS fills_public,
            has_schema_privilege(ours, 'USAGE') AS sees_schema,
            has_schema_privilege(ours, 'CREATE') AS fills_schema,
            has_database_privilege(current_database(), 'CREATE') AS makes_schemas
        FROM (SELECT to_regnamespace('public')::oid, to_regnamespace(:schema)::oid) AS _ (public, ours)
        """,
        schema=SCHEMA,
    )
    if answer.no_public:
        yield "CREATE SCHEMA public"
    if not answer.sees_public:
        yield f"GRANT USAGE ON SCHEMA public TO {answer.me}"
    if answer.makes_optunas and not answer.fills_public:
        yield f"GRANT CREATE ON SCHEMA public TO {answer.me}"
    if answer.no_schema:
        if not answer.makes_schemas:
            yield f"GRANT CREATE ON DATABASE {answer.database} TO {answer.me}"
        return
    if not answer.sees_schema:
        yield f"GRANT {'USAGE ON SCHEMA ' + SCHEMA if answer.makes_ours else WORKER} TO {answer.me}"
    if answer.makes_ours and not answer.fills_schema:
        yield f"GRANT CREATE ON SCHEMA {SCHEMA} TO {answer.me}"


def tables(connection: sa.Connection) -> Property:
    """Whether all tables of this version exist, and whether this user's workers may use them."""
    names = [f"public.{table.name}" for table in OPTUNAS_TABLES] + list(METADATA.tables)
    role = (
        WORKER if why_without(connection, WORKER) is None else _row(connection, "SELECT current_user")[0]
    )
    answer = _row(
        connection,
        """
        SELECT array(SELECT name FROM unnest(:names) AS name WHERE to_regclass(name) IS NULL) AS missing,
            array(
                SELECT privilege || ' on ' || name
                FROM unnest(:names) AS name, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) AS privilege
                WHERE NOT has_table_privilege(:role, to_regclass(name), privilege)
            ) AS denied
        """,
        names=names,
        role=role,
    )
    problem = None
    if answer.missing:
        problem = (
            f"has no table {', '.join(answer.missing)} any more; restore a backup: atelier db restore"
        )
    elif answer.denied:
        problem = f"gives {role} no {', '.join(answer.denied)}; let their owner run: atelier db upgrade"
    return Property("tables", f"{len(names)}, open to {role}", problem)


def is_owner(connection: sa.Connection) -> bool:
    """Whether this user, or a role that it is a member of, owns Atelier's tables."""
    query = """
        SELECT bool_or(pg_has_role(relowner, 'USAGE')) FROM pg_class
        WHERE relnamespace = to_regnamespace(:schema) AND relname = 'alembic_version'
    """
    return bool(_row(connection, query, schema=SCHEMA)[0])


def why_without(connection: sa.Connection, *roles: str) -> str | None:
    """Why this user cannot act as all of the roles, and who can change that; None if it can."""
    query = """
        SELECT array(SELECT name FROM wanted WHERE oid IS NULL) AS missing,
            -- Since PostgreSQL 16 a member needs the SET option to act as the role.
            array(
                SELECT name FROM wanted WHERE NOT coalesce(pg_has_role(oid, CASE
                    WHEN current_setting('server_version_num')::int < 160000 THEN 'MEMBER' ELSE 'SET'
                END), false)
            ) AS not_usable,
            -- Roles belong to the whole server, their rights to this database.
            array(
                SELECT name FROM wanted
                WHERE NOT coalesce(
                    has_schema_privilege(wanted.oid, to_regnamespace(:schema)::oid, 'USAGE'), false
                )
            ) AS without_rights,
            quote_ident(current_user) AS me,
            (SELECT rolcreaterole OR rolsuper FROM pg_roles WHERE rolname = current_user) AS makes_roles
    """
    wanted = (
        "SELECT name, pg_roles.oid FROM unnest(:roles) AS name LEFT JOIN pg_roles ON rolname = name "
        "ORDER BY name"
    )
    answer = _row(connection, f"WITH wanted AS ({wanted}) {query}", roles=list(roles), schema=SCHEMA)
    if not (answer.not_usable or answer.without_rights):
        return None
    owner = is_owner(connection)
    upgrade = f"{'run' if owner else 'let the owner of the tables run'}: atelier db upgrade"
    if owner and answer.makes_roles and answer.not_usable == answer.missing:
        statements = []  # the upgrade does all of it
    else:
        statements = [f"CREATE ROLE {name} NOLOGIN" for name in answer.missing]
        statements += [f"GRANT {name} TO {answer.me}" for name in answer.not_usable]
    todo = [f"let an administrator run: {'; '.join(statements)}"] if statements else []
    todo += [upgrade] if answer.without_rights else []
    no_createrole = " and has no CREATEROLE" if statements and owner and not answer.makes_roles else ""
    names = " or ".join(dict.fromkeys(answer.not_usable + answer.without_rights))
    return f"{answer.me} cannot act as {names}{no_createrole}; {', then '.join(todo)}"


def make_roles(connection: sa.Connection) -> None:
    """Make the roles and give them their rights, if this user may."""
    run = connection.exec_driver_sql
    for role, rights in RIGHTS.items():
        try:
            with connection.begin_nested():
                if not run(f"SELECT 1 FROM pg_roles WHERE rolname = '{role}'").scalar():
                    run(f"CREATE ROLE {role} NOLOGIN")
                    run(f"GRANT {role} TO CURRENT_USER")
                for right in (f"USAGE ON {_EVERYWHERE}", *rights):
                    run(f"GRANT {right} TO {role}")
        except (
            DBAPIError
        ) as error:  # not allowed, or another database of the server has just made the role
            if is_transient(error):
                raise


def _row(connection: sa.Connection, query: str, **parameters: object) -> Any:
    return connection.execute(sa.text(query), parameters).one()

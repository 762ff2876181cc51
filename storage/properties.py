"""What a server, a database and its user must have for us, and who may do what in it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from storage.faults import is_transient
from storage.network import VIEWER, WORKER
from storage.optuna_tables import BaseModel as OptunasBase
from storage.tables import SCHEMA, Base

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
    found: str
    problem: str | None = None  # with what to do; it goes on after "the database at ..."


def properties(connection: sa.Connection) -> Iterator[Property]:
    """What has to be right before tables are made, or written to."""
    found = _row(
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
        f"PostgreSQL {found.version}",
        f"is PostgreSQL {found.version}; allowed is {MINIMUM_SERVER}+"
        if found.major < MINIMUM_SERVER
        else None,
    )
    yield Property(
        "encoding",
        found.encoding,
        f"has the encoding {found.encoding}, which cannot hold every name; make another with: CREATE "
        "DATABASE name ENCODING 'UTF8' TEMPLATE template0; what is in this one moves with: atelier db "
        "backup and restore"
        if found.encoding != "UTF8"
        else None,
    )
    yield Property(
        "writes",
        "no" if found.read_only else "yes",
        "takes no writes (a standby, or default_transaction_read_only); give the primary"
        if found.read_only
        else None,
    )
    grants = "; ".join(_missing_grants(connection))
    yield Property(
        "rights",
        f"enough for {found.me}",
        f"gives {found.me} too few rights; let its owner or an administrator run: {grants}"
        if grants
        else None,
    )


def _missing_grants(connection: sa.Connection) -> Iterator[str]:
    """Statements that let this user make the tables, or see those that are there."""
    found = _row(
        connection,
        """
        SELECT quote_ident(current_user) AS me, quote_ident(current_database()) AS database,
            public IS NULL AS no_public, ours IS NULL AS no_schema,
            -- Not by to_regclass, which is an error where the schema may not be looked into.
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
    if found.no_public:
        yield "CREATE SCHEMA public"
    if not found.sees_public:
        yield f"GRANT USAGE ON SCHEMA public TO {found.me}"
    if found.makes_optunas and not found.fills_public:
        yield f"GRANT CREATE ON SCHEMA public TO {found.me}"
    if found.no_schema:
        if not found.makes_schemas:
            yield f"GRANT CREATE ON DATABASE {found.database} TO {found.me}"
        return
    if not found.sees_schema:
        yield f"GRANT {'USAGE ON SCHEMA ' + SCHEMA if found.makes_ours else WORKER} TO {found.me}"
    if found.makes_ours and not found.fills_schema:
        yield f"GRANT CREATE ON SCHEMA {SCHEMA} TO {found.me}"


def tables(connection: sa.Connection) -> Property:
    """Whether all tables of this version are there, and a worker of this user may work with them."""
    names = [f"public.{name}" for name in OptunasBase.metadata.tables] + list(Base.metadata.tables)
    role = (
        WORKER if why_without(connection, WORKER) is None else _row(connection, "SELECT current_user")[0]
    )
    found = _row(
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
    if found.missing:
        problem = (
            f"has no table {', '.join(found.missing)} any more; restore a backup: atelier db restore"
        )
    elif found.denied:
        problem = f"gives {role} no {', '.join(found.denied)}; let their owner run: atelier db upgrade"
    return Property("tables", f"{len(names)}, open to {role}", problem)


def is_owner(connection: sa.Connection) -> bool:
    """Whether there are tables of ours that are this user's, or those of a role that it is in."""
    query = """
        SELECT bool_or(pg_has_role(relowner, 'USAGE')) FROM pg_class
        WHERE relnamespace = to_regnamespace(:schema) AND relname = 'alembic_version'
    """
    return bool(_row(connection, query, schema=SCHEMA)[0])


def why_without(connection: sa.Connection, *roles: str) -> str | None:
    """Why this user may not act as each of the roles, and who can change that; None if it may."""
    query = """
        SELECT array(SELECT name FROM known WHERE oid IS NULL) AS missing,
            -- Since 16 a member may be kept from acting as the role.
            array(
                SELECT name FROM known WHERE NOT coalesce(pg_has_role(oid, CASE
                    WHEN current_setting('server_version_num')::int < 160000 THEN 'MEMBER' ELSE 'SET'
                END), false)
            ) AS foreign_,
            -- The role is the server's, its rights are this database's.
            array(
                SELECT name FROM known
                WHERE NOT coalesce(
                    has_schema_privilege(known.oid, to_regnamespace(:schema)::oid, 'USAGE'), false
                )
            ) AS powerless,
            quote_ident(current_user) AS me,
            (SELECT rolcreaterole OR rolsuper FROM pg_roles WHERE rolname = current_user) AS makes_roles
    """
    known = (
        "SELECT name, pg_roles.oid FROM unnest(:roles) AS name LEFT JOIN pg_roles ON rolname = name "
        "ORDER BY name"
    )
    found = _row(connection, f"WITH known AS ({known}) {query}", roles=list(roles), schema=SCHEMA)
    if not (found.foreign_ or found.powerless):
        return None
    owner = is_owner(connection)
    upgrade = f"{'run' if owner else 'let the owner of the tables run'}: atelier db upgrade"
    if owner and found.makes_roles and found.foreign_ == found.missing:
        statements = []  # the upgrade does all of it
    else:
        statements = [f"CREATE ROLE {name} NOLOGIN" for name in found.missing]
        statements += [f"GRANT {name} TO {found.me}" for name in found.foreign_]
    todo = [f"let an administrator run: {'; '.join(statements)}"] if statements else []
    todo += [upgrade] if found.powerless else []
    lacks = " and has no CREATEROLE" if statements and owner and not found.makes_roles else ""
    names = " or ".join(dict.fromkeys(found.foreign_ + found.powerless))
    return f"{found.me} cannot act as {names}{lacks}; {', then '.join(todo)}"


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
        except DBAPIError as error:  # not allowed, or just made for another database of the server
            if is_transient(error):
                raise


def _row(connection: sa.Connection, query: str, **parameters: object) -> Any:
    return connection.execute(sa.text(query), parameters).one()

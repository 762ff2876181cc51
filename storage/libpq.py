"""The one way to a connection, and what libpq may take of this process's environment for it.

A database is named by a URL, or by a home. Where these are silent, libpq asks some forty variables,
and a variable that was set for psql would send us to another server.
"""

import logging
import os
import re
from typing import Any

import psycopg2

log = logging.getLogger(__name__)

# Where a user keeps what proves who somebody is, for every server; and, the last two, where libpq finds
# the `service=` that a URL names.
FILES = (
    *("PGPASSFILE", "PGSSLCERT", "PGSSLKEY", "PGSSLROOTCERT", "PGSSLCRL", "PGSSLCRLDIR"),
    *("PGSERVICEFILE", "PGSYSCONFDIR"),
)
KEPT = {"PGPASSWORD", *FILES}
# Every variable of libpq's is named so, and of PostgreSQL's programs', as PGDATA.
_POSTGRESQLS = re.compile("PG[A-Z]+|PGCONNECT_TIMEOUT")
# Without these the way leads elsewhere, or is guarded less; the rest only changes how things look.
_TELLING = re.compile(
    "PG(HOST|HOSTADDR|PORT|DATABASE|USER|SERVICE|TARGETSESSIONATTRS|REQUIREAUTH|REQUIREPEER"
    "|CHANNELBINDING|REQUIRESSL|SSL(MODE|NEGOTIATION|M(IN|AX)PROTOCOLVERSION)|GSSENCMODE|KRBSRVNAME)"
)


def connect(*positional: Any, **named: Any) -> Any:
    """psycopg2's connection with what these arguments say, and nothing else but what KEPT names.

    The first call takes the other variables out of this process's environment, and so of its children's.
    """
    foreign = _foreign()
    # What is said here, no variable would have changed.
    said = {"PG" + name.upper().replace("_", "").replace("DBNAME", "DATABASE") for name in named}
    if missed := sorted(name for name in foreign if _TELLING.fullmatch(name) and name not in said):
        log.warning(
            "%s: not heeded, for what ATELIER_DATABASE_URL or the home says is the whole way to the "
            "database; what shall be heeded belongs into the URL (docs/cluster.md)",
            ", ".join(missed),
        )
    for name in foreign:
        os.environ.pop(name, None)  # another thread may have been first
    if "passfile" in named:
        named = {"password": "", **named}  # else PGPASSWORD would come before what the file says
    return psycopg2.connect(*positional, **named)


def environment() -> dict[str, str]:
    """This process's environment for PostgreSQL's programs: without what would steer them."""
    foreign = _foreign()
    return {name: value for name, value in os.environ.items() if name not in foreign}


def _foreign() -> set[str]:
    return {name for name in os.environ if _POSTGRESQLS.fullmatch(name) and name not in KEPT}

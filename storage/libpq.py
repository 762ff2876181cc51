"""Open connections with psycopg2, and keep libpq's environment variables from steering them.

A URL or the home folder names the database. For what they leave open, libpq reads some forty
environment variables. A variable that was set for psql could send us to another server.
"""

import logging
import os
import re
from typing import Any

import psycopg2

log = logging.getLogger(__name__)

# The first six name files with passwords and certificates, which a user has for all servers. The last
# two say where libpq looks up the `service=` of a URL.
FILES = (
    *("PGPASSFILE", "PGSSLCERT", "PGSSLKEY", "PGSSLROOTCERT", "PGSSLCRL", "PGSSLCRLDIR"),
    *("PGSERVICEFILE", "PGSYSCONFDIR"),
)
KEPT = {"PGPASSWORD", *FILES}
# The names of all variables that libpq reads, and PostgreSQL's programs, such as PGDATA.
_POSTGRESQL_NAMES = re.compile("PG[A-Z]+|PGCONNECT_TIMEOUT")
# These choose the server, or how the connection is protected: who set one must hear that it is ignored.
_WORTH_A_WARNING = re.compile(
    "PG(HOST|HOSTADDR|PORT|DATABASE|USER|SERVICE|TARGETSESSIONATTRS|REQUIREAUTH|REQUIREPEER"
    "|CHANNELBINDING|REQUIRESSL|SSL(MODE|NEGOTIATION|M(IN|AX)PROTOCOLVERSION)|GSSENCMODE|KRBSRVNAME)"
)


def connect(*positional: Any, **named: Any) -> Any:
    """Connect with psycopg2 by these arguments; of the environment only the variables in KEPT count.

    The first call removes the other variables from the environment of this process and its children.
    """
    foreign = _foreign()
    # An argument wins over its variable in any case, so that variable needs no warning.
    overridden = {"PG" + name.upper().replace("_", "").replace("DBNAME", "DATABASE") for name in named}
    if ignored := sorted(
        name for name in foreign if _WORTH_A_WARNING.fullmatch(name) and name not in overridden
    ):
        log.warning(
            "%s: ignored; only ATELIER_DATABASE_URL, or the home, says how to reach the database; put "
            "settings into the URL (docs/cluster.md)",
            ", ".join(ignored),
        )
    for name in foreign:
        os.environ.pop(name, None)  # another thread may have removed it
    if "passfile" in named:
        named = {"password": "", **named}  # else PGPASSWORD would win over the file
    return psycopg2.connect(*positional, **named)


def environment() -> dict[str, str]:
    """The environment for PostgreSQL's programs: this process's, without variables that steer them."""
    foreign = _foreign()
    return {name: value for name, value in os.environ.items() if name not in foreign}


def _foreign() -> set[str]:
    return {name for name in os.environ if _POSTGRESQL_NAMES.fullmatch(name) and name not in KEPT}

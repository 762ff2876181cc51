"""Find the database's URL: from the environment, or from the home's own server."""

import ipaddress
import os
from urllib.parse import unquote

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from storage.embedded import EmbeddedPostgres
from storage.paths import home
from storage.postgres_programs import EmbeddedPostgresError


class DatabaseError(RuntimeError):
    """The database cannot be used; the message is one line and says what to do next."""


def configured_url() -> str | None:
    """The URL from the environment, or of the server that `atelier db start --listen` set up."""
    url = EmbeddedPostgres(home()).network.url
    return os.environ.get("ATELIER_DATABASE_URL") or (url and url.render_as_string(hide_password=False))


def database_url(make: bool = True) -> URL:
    """The configured URL, or the embedded server's; that server is started, and with `make` also made.

    Raises DatabaseError (also if there is no database and `make` is false), ForeignHomeError,
    LimitError.
    """
    text = configured_url()
    if text is None:
        embedded = EmbeddedPostgres(home())
        if not make and not embedded.exists():
            raise DatabaseError(
                f"no database in {home()}; atelier search STUDY.toml makes one, or name another with "
                "ATELIER_HOME or ATELIER_DATABASE_URL"
            )
        try:
            return make_url(embedded.acquire(make))
        except EmbeddedPostgresError as error:
            raise DatabaseError(str(error)) from error
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        url = None
    if url is None or "\0" in unquote(text):
        raise DatabaseError(
            "ATELIER_DATABASE_URL is not a URL; write postgresql://USER@HOST:5432/DATABASE"
        )
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise DatabaseError(
            f"ATELIER_DATABASE_URL names {url.get_backend_name()}; allowed is only PostgreSQL: "
            "postgresql://USER@HOST:5432/DATABASE"
        )
    _refuse_unprotected(url)
    return url.set(drivername="postgresql+psycopg2")


def server_host(url: URL) -> str:
    """The host that libpq will connect to; commas separate several; empty for the default socket."""
    host = url.query.get("hostaddr") or url.query.get("host", url.host)
    if isinstance(host, tuple):  # `host=` was given several times
        host = ",".join(host)
    if "service" in url.query and not host:
        return f"service {url.query['service']}"
    return host or ""


def is_local(hosts: str) -> bool:
    """Whether connections to all of these hosts stay on this machine."""
    return all(
        host == "" or host.startswith("/") or is_loopback(host)  # the first two are Unix sockets
        for host in hosts.split(",")
    )


def is_loopback(host: str) -> bool:
    """Whether a host name or address is the loopback, so only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse_unprotected(url: URL) -> None:
    """Raises DatabaseError if libpq might fall back to an unencrypted connection to a remote server.

    Its default, `prefer`, does so when the server, or an attacker in between, refuses TLS.
    """
    mode = str(url.query.get("sslmode", "prefer"))
    if mode in ("prefer", "allow") and not is_local(server_host(url)):
        raise DatabaseError(
            f"the connection to the database on {server_host(url)} may be unencrypted (sslmode={mode}); "
            "add to ATELIER_DATABASE_URL ?sslmode=verify-full&sslrootcert=FILE, or, on a network that "
            "you trust, ?sslmode=disable"
        )


def shown(url: URL) -> str:
    """The URL as text, without a password."""
    return url.difference_update_query(["password"]).render_as_string()

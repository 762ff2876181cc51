"""`atelier dashboard`: checks the address and serves optuna-dashboard and our pages in one process."""

import getpass
import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from flask import Flask
from gunicorn.app.base import BaseApplication

from dashboards.web.accounts import Accounts, OneTimeLink, session_key
from dashboards.web.app import make_app
from dashboards.web.auth import RoleConnection
from dashboards.web.optuna import connect_role
from dashboards.web.pages import ReadConfirmed
from storage import database, optuna_storage, roles, schema
from storage.network import VIEWER
from storage.properties import why_without
from storage.url import is_loopback

THREADS = 8
# The first parts of the paths that the dashboard serves.
OWN_PATHS = {"atelier", "login", "logout", "healthz", "dashboard", "api", "static", "csv", "artifacts"}


class ServeError(ValueError):
    """The dashboard cannot or must not be served at this address. The message is one line."""


@dataclass(frozen=True)
class Address:
    """Where the dashboard listens, and how people reach it."""

    host: str
    port: int
    certificate: Path | None = None  # PEM files
    key: Path | None = None
    behind_proxy: bool = False  # that does TLS and sets X-Forwarded-*
    in_clear: bool = False  # other machines may send passwords without encryption
    prefix: str = ""

    def check(self, accounts: Accounts) -> None:
        """Check that it is safe to listen there. Raises ServeError."""
        if self.prefix and not re.fullmatch(r"(/(?!\.)[\w.~@:+-]+)+", self.prefix):
            raise ServeError(f"--prefix {self.prefix!r}: write it as in /node/login1/8080")
        if (first := self.prefix.split("/")[1:2]) and first[0] in OWN_PATHS:
            # It could not be told from a path that a proxy has taken the prefix from.
            raise ServeError(
                f"--prefix {self.prefix!r} begins as a path of the dashboard itself does; choose another"
            )
        self._check_certificate()
        if is_loopback(self.host):
            return
        if not accounts.all():
            raise ServeError(
                f"--host {self.host} lets other machines in, and nobody has an account yet; add one "
                "with: atelier user add NAME"
            )
        if not (self.certificate or self.behind_proxy or self.in_clear):
            raise ServeError(
                f"--host {self.host} would send passwords in clear; give --certificate and --key, or "
                "say --behind-proxy if a proxy encrypts, or --no-tls if the network is your own"
            )

    def _check_certificate(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ServeError("--certificate and --key go together; give both files")
        for path in (self.certificate, self.key):
            if path is not None and not path.is_file():
                raise ServeError(f"{path}: no such file; give the PEM file")
        if self.certificate and self.key:
            try:
                ssl.create_default_context().load_cert_chain(self.certificate, self.key)
            except (ssl.SSLError, OSError) as error:
                raise ServeError(
                    f"{self.certificate} and {self.key} are no PEM certificate and its key ({error})"
                ) from None

    def url(self, path: str = "/") -> str:
        """The address for a browser: on the network if the dashboard listens there."""
        scheme = "https" if self.certificate else "http"
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.bracketed
        return f"{scheme}://{host}:{self.port}{self.prefix}{path}"

    @property
    def bracketed(self) -> str:
        """The host, in brackets if a port could not follow it otherwise."""
        return f"[{self.host}]" if ":" in self.host else self.host


def serve(address: Address, read_confirmed: ReadConfirmed) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ServeError, AccountError, DatabaseError."""
    accounts = Accounts()
    accounts.all()  # the errors of the file belong to the terminal
    address.check(accounts)
    with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise ServeError(
                f"cannot listen at {address.host}:{address.port} ({error.strerror}); "
                "choose another --port or --host"
            ) from None
    engine = database.look()
    schema.require_schema(engine)  # as do those of the database
    engine.dispose()
    _Server(address, accounts, read_confirmed).run()


def _say_where(address: Address, token: str | None) -> None:
    typer.echo(f"dashboard: {address.url('/login?token=' + token if token else '/')}")
    if is_loopback(address.host):
        host = socket.gethostname()
        typer.echo(
            f"  from your own machine: ssh -N -L {address.port}:{address.bracketed}:{address.port} "
            f"{getpass.getuser()}@{host}   then open the link above"
        )


def connect_roles() -> dict[str, RoleConnection]:
    """The connections of both roles. Raises DatabaseError."""
    engine = database.look(database.PAGES)
    schema.require_schema(engine)
    viewer = roles.read_only(engine)
    if not viewer.has_role:
        with engine.connect() as connection:
            why = why_without(connection, VIEWER)
        typer.echo(
            f"note: only the connection's own setting keeps viewers from writing: {why}", err=True
        )
    return {
        "editor": connect_role(
            engine, optuna_storage.optuna_storage(engine, database.PAGES, make_tables=False)
        ),
        "viewer": connect_role(viewer.engine, viewer.storage),
    }


class _Server(BaseApplication):  # type: ignore[misc]
    """gunicorn with one process, whose threads share the caches."""

    def __init__(self, address: Address, accounts: Accounts, read_confirmed: ReadConfirmed) -> None:
        self._address, self._accounts, self._read_confirmed = address, accounts, read_confirmed
        super().__init__()

    def load_config(self) -> None:
        settings: dict[str, Any] = {
            "bind": f"{self._address.bracketed}:{self._address.port}",
            "workers": 1,
            "worker_class": "gthread",
            "threads": THREADS,
            "loglevel": "warning",
            "proc_name": "atelier-dashboard",
            "control_socket_disable": True,
        }
        if self._address.certificate:
            settings |= {"certfile": str(self._address.certificate), "keyfile": str(self._address.key)}
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """The application, made in the process that serves it, with connections of its own."""
        address = self._address
        link = None
        if self._accounts.all():
            _say_where(address, None)
        else:
            link = OneTimeLink(lambda token: _say_where(address, token))
        return make_app(
            connect_roles(),
            self._accounts,
            session_key(),
            link,
            prefix=address.prefix,
            https=address.certificate is not None or (address.behind_proxy and not address.in_clear),
            behind_proxy=address.behind_proxy,
            read_confirmed=self._read_confirmed,
        )

"""The verb dashboard, in a module of its own because Flask and optuna-dashboard import slowly."""

from pathlib import Path
from typing import Annotated

import typer

from dashboards.web.server import Address, serve
from search.confirm.page import confirmed_reader


def dashboard(
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    certificate: Annotated[Path | None, typer.Option(help="PEM file, for TLS.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    behind_proxy: Annotated[
        bool,
        typer.Option("--behind-proxy", help="A proxy in front sets X-Forwarded-For, -Proto, -Host."),
    ] = False,
    no_tls: Annotated[
        bool, typer.Option("--no-tls", help="Let other machines send passwords unencrypted.")
    ] = False,
    prefix: Annotated[
        str, typer.Option(help="Path under which a proxy serves it, as in /node/login1/8080.")
    ] = "",
) -> None:
    """Serve optuna-dashboard and Atelier's pages, behind a login."""
    serve(Address(host, port, certificate, key, behind_proxy, no_tls, prefix), confirmed_reader())

"""Builds the web application: a login, our pages and optuna-dashboard, with headers and error pages.

Every request passes `authorize` first, whatever its path. Only the login page, its style and the health
check need no login. A viewer's request is served from a connection that cannot write.
"""

import hashlib
import logging
from datetime import timedelta
from typing import Any

from flask import Flask, Response, g, redirect, render_template, request, url_for
from optuna.artifacts.exceptions import ArtifactNotFound
from sqlalchemy.exc import NoResultFound
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import RequestRedirect

from dashboards.web import images, pages
from dashboards.web.accounts import Accounts, OneTimeLink
from dashboards.web.auth import (
    SESSION,
    RoleConnection,
    add_login,
    authorize,
    is_navigation,
    log_out,
    refuse,
)
from dashboards.web.optuna import mount_optuna
from storage import faults, url
from storage.optuna_storage import DATABASE_ERRORS

log = logging.getLogger(__name__)
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)


def make_app(
    connections: dict[str, RoleConnection],
    accounts: Accounts,
    key: bytes,
    link: OneTimeLink | None = None,
    prefix: str = "",
    https: bool = False,
    behind_proxy: bool = False,
    read_confirmed: pages.ReadConfirmed = lambda *_: None,
) -> Flask:
    """The application. `connections` are by role. `prefix` is the path under which a proxy serves it."""
    app = Flask("dashboards", static_url_path="/atelier/static")
    # Cookies ignore ports, so another dashboard on the same host needs another name.
    app.config.update(
        READ_CONFIRMED=read_confirmed,
        SECRET_KEY=key,
        SESSION_COOKIE_NAME=f"atelier-{hashlib.sha256(b'name' + key).hexdigest()[:8]}",
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_COOKIE_SECURE=https,
        SESSION_COOKIE_PATH=f"{prefix}/",
        SESSION_REFRESH_EACH_REQUEST=False,  # an open page does not prolong the session
        PERMANENT_SESSION_LIFETIME=SESSION,
        SEND_FILE_MAX_AGE_DEFAULT=timedelta(days=1),
    )
    app.wsgi_app = _under(prefix, app.wsgi_app)  # type: ignore[method-assign]
    if behind_proxy:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_proto=1, x_host=1)  # type: ignore[method-assign]
    add_login(app, accounts, link)
    app.before_request(lambda: authorize(connections, accounts, link))
    app.after_request(_harden)
    app.register_error_handler(Exception, _explain)
    app.register_blueprint(pages.blueprint)
    app.register_blueprint(images.blueprint)
    app.add_url_rule("/", "root", lambda: redirect(url_for("pages.index")))
    app.add_url_rule("/logout", "logout", log_out, methods=["POST"])
    app.add_url_rule("/healthz", "health", lambda: "ok\n")
    mount_optuna(app, prefix)
    return app


def _under(prefix: str, app: Any) -> Any:
    """Serve under a path, whether the proxy leaves it in the request or has taken it away."""

    def call(environ: dict[str, Any], start_response: Any) -> Any:
        environ["SCRIPT_NAME"] = prefix
        environ["PATH_INFO"] = environ["PATH_INFO"] or "/"
        return app(environ, start_response)

    # ProxyFix(x_prefix=1) would not serve: it needs a header, which not every proxy sends, and does not
    # take the prefix out of the path.
    return DispatcherMiddleware(call, {prefix: call})


def _harden(response: Response) -> Response:
    response.headers.remove("Access-Control-Allow-Origin")
    response.headers.setdefault("Content-Security-Policy", CONTENT_POLICY)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["Referrer-Policy"] = "same-origin"
    if request.path.startswith("/artifacts/"):  # a file that somebody has uploaded, of any type
        response.headers["Content-Security-Policy"] = (
            "sandbox; default-src 'none'; style-src 'unsafe-inline'"
        )
    if request.endpoint != "static" and "Cache-Control" not in response.headers:
        response.headers["Cache-Control"] = "no-cache"
    return response


def _explain(error: Exception) -> Any:
    """The answer to an error: what happened and what to do next, on a page or as JSON."""
    if isinstance(error, RequestRedirect):
        return error  # to the same path in its usual form
    if isinstance(error, HTTPException):
        status, words = error.code or 500, error.description or ""
    elif isinstance(error, (NoResultFound, ArtifactNotFound)):
        status, words = 404, "There is no such study or file. It may have been deleted."
    elif isinstance(error, DATABASE_ERRORS):
        status, words = 503, _database_error(error)
    else:
        raise error
    if g.get("role") is None or not is_navigation():
        return refuse(status, words)
    return render_template("message.html", status_code=status, words=words), status


def _database_error(error: Exception) -> str:
    """The text for an error of the database, which may be shown without a login.

    Raises the error again if it is a fault of this program.
    """
    if faults.sqlstate(error) == faults.READ_ONLY:
        return "The database is read-only now: it is a standby server, or a standby is taking over."
    kind = faults.classify(error)
    if kind is faults.ErrorKind.AGAIN:
        return "The database does not answer. This page asks again by itself."
    if kind is faults.ErrorKind.OURS and not isinstance(error, url.DatabaseError):
        raise error
    log.error("%s", faults.explain(error))
    return "The database cannot be used. Its administrator can see why with: atelier db check"

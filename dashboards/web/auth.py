"""Decides who may see and change what: login, sessions, and the check before every request."""

import re
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from flask import (
    Flask,
    Response,
    abort,
    current_app,
    g,
    jsonify,
    redirect,
    render_template,
    request,
    session,
    url_for,
)

from dashboards.web.accounts import Accounts, OneTimeLink, Throttle
from storage import database, studies
from storage.url import is_loopback

SESSION = timedelta(hours=12)
PAGE_SECONDS = 3.0  # for which a page retries while the database is away
OPEN = {"login", "log_in", "logout", "static", "health"}  # endpoints that need no login


@dataclass
class RoleConnection:
    """A role's connection to the database, and an optuna-dashboard that has the same rights."""

    engine: sa.Engine
    optuna_app: Any = field(repr=False)


def authorize(
    connections: dict[str, RoleConnection], accounts: Accounts, link: OneTimeLink | None
) -> Any:
    """The answer to a request that is not allowed; None to a request that is.

    Sets g.role, and for who is logged in g.user, g.engine and g.optuna_app.
    """
    database.thread_patience.set(PAGE_SECONDS)
    g.role = None
    if _is_cross_site():
        return refuse(403, "requests from other sites are refused")
    if request.endpoint in OPEN:
        return None
    g.role, g.user = _who(accounts, link)
    if g.role is None:
        if is_navigation():
            return redirect(url_for("login", next=request.full_path.rstrip("?")))
        return refuse(401, "log in first")
    if any(part.isdecimal() and len(part) > 9 for part in request.path.split("/")):
        abort(404, "There is no such study or trial.")  # the database has no such number
    connection = connections[g.role]
    g.engine, g.optuna_app = connection.engine, connection.optuna_app
    if request.method in ("GET", "HEAD"):
        return None
    if g.role != "editor":
        return refuse(403, "a viewer may look, not change; ask for an account with the role editor")
    reason = _forbidden_to_editors(g.engine, request.method, request.path)
    return refuse(409, reason) if reason else None


def _is_cross_site() -> bool:
    """Whether a page of another site makes this request. Following a link from there is allowed."""
    site = request.headers.get("Sec-Fetch-Site", "none")
    reads = request.method in ("GET", "HEAD")
    if site not in ("same-origin", "none"):
        return not (reads and request.headers.get("Sec-Fetch-Mode") == "navigate")
    origin = request.headers.get("Origin")
    return not reads and origin is not None and urlsplit(origin).netloc != request.host


def is_navigation() -> bool:
    """Whether a browser will show the answer. If not, an error is JSON."""
    return request.method == "GET" and "text/html" in request.headers.get("Accept", "")


def _who(accounts: Accounts, link: OneTimeLink | None) -> tuple[str | None, str | None]:
    """Role and name of the session. It ends when its account changes."""
    by_name = accounts.all()
    account = by_name.get(session.get("user", ""))
    if account is not None and session.get("stamp") == account.stamp:
        return account.role, account.name
    if link is not None and not by_name and session.get("stamp") == link.stamp:
        return "editor", None
    return None, None


def refuse(status: int, reason: str) -> Response:
    """An error as JSON, in the form of optuna-dashboard's errors."""
    response = jsonify(reason=reason)
    response.status_code = status
    return response


def add_login(app: Flask, accounts: Accounts, link: OneTimeLink | None) -> None:
    """Add the login page and what its form sends."""
    throttle = Throttle()

    def ask(problem: str = "", status: int = 200) -> Any:
        target, by_link = request.values.get("next", ""), not accounts.all()
        return render_template("login.html", problem=problem, by_link=by_link, next=target), status

    @app.get("/login")
    def login() -> Any:
        token = request.args.get("token")
        if token is None and "entered" in request.args:
            return redirect(_wanted()) if _who(accounts, link)[0] else ask(_cookieless(), 401)
        if token is None:
            return ask()
        if link is not None and not accounts.all() and link.use(token):
            return _enter(link.stamp)
        if accounts.all():
            return ask("Links stop working once there is an account. Log in with yours.", 401)
        return ask("This link has been used or is wrong. The terminal shows the next one.", 401)

    @app.post("/login")
    def log_in() -> Any:
        name, password = request.form.get("name", ""), request.form.get("password", "")
        keys = _throttled(name, request.remote_addr or "")
        if wait := throttle.wait(*keys):
            return ask(f"Too many attempts. Try again in {wait} s.", 429)
        account = accounts.check(name, password)
        if account is None:
            throttle.failed(*keys)
            return ask("Wrong name or password.", 401)
        throttle.succeeded(*keys)
        return _enter(account.stamp, account.name)


def _enter(stamp: str, user: str = "") -> Any:
    session.clear()
    session.permanent = True
    session.update(user=user, stamp=stamp)
    # The next request shows whether the browser keeps the cookie.
    return redirect(url_for("login", entered="", next=request.values.get("next", "")))


def _cookieless() -> str:
    """The login page's text for somebody who has logged in but comes without the session's cookie."""
    if current_app.config["SESSION_COOKIE_SECURE"] and not request.is_secure:
        return "If you have just logged in: sessions here are for https only. Open this page with https."
    return (
        f"If you have just logged in: this browser keeps no cookies of {request.host}, so you "
        "cannot stay logged in. Allow them, then log in again."
    )


def log_out() -> Any:
    session.clear()
    return redirect(url_for("login"))


def _wanted() -> str:
    """The address that was requested before the login, or the list of studies."""
    target = request.values.get("next", "")
    # Only a path of ours, not another host. Browsers leave out control characters.
    safe = re.fullmatch(r"/(?![/\\])[^\\\x00-\x20\x7f]*", target)
    # A download or a logout would show no page.
    is_page = not re.match(r"/logout|/csv/|[^?]*\.csv", target)
    return request.script_root + target if safe and is_page else url_for("pages.index")


def _throttled(name: str, address: str) -> list[str]:
    """What has to wait after failures: the name, and the address unless it is this machine's own.

    Through `ssh -L` everybody has this machine's own address.
    """
    return [f"name {name[:200]}", *([] if is_loopback(address) else [f"address {address}"])]


# What optuna-dashboard can do to a study or a trial, as method and path.
_RENAME = re.compile(r"POST /api/studies/\d+/rename")
_DELETE = re.compile(r"DELETE /api/studies/(\d+)")
_OF_TRIAL = re.compile(r"(?:POST|PUT|DELETE) /api/trials/(\d+)/.*")


def _forbidden_to_editors(engine: sa.Engine, method: str, path: str) -> str | None:
    """Why not even an editor may do this now. optuna-dashboard knows nothing of the workers' leases."""
    call = f"{method} {path.rstrip('/')}"
    if _RENAME.fullmatch(call):
        return (
            "optuna-dashboard renames by copying, which loses epochs and checkpoints; start another "
            "study instead, with another [study] name"
        )
    if (match := _DELETE.fullmatch(call)) and not studies.stop_unless_held(engine, int(match[1])):
        return "workers hold trials of this study; stop them first: atelier stop STUDY"
    if (match := _OF_TRIAL.fullmatch(call)) and studies.is_held(engine, int(match[1])):
        return "a worker holds this trial; stop the workers first: atelier stop STUDY"
    return None

"""The web application: one gate in front of optuna-dashboard and of our own pages.

Every request passes `_gate` before anything else, whatever its path; only the login page, its style and
the health check are open. A viewer's request is served from a connection that cannot write.
"""

import hashlib
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import optuna
import optuna_dashboard
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
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from sqlalchemy.exc import NoResultFound
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import RequestRedirect

from dashboards import tables
from dashboards.web import pages
from dashboards.web.accounts import Accounts, OneTimeLink, Throttle, is_loopback
from storage import database, faults, studies, url
from storage.ownership import as_owner
from storage.paths import artifacts, home, make_private

SESSION = timedelta(hours=12)
OPEN = {"login", "log_in", "logout", "static", "health"}  # endpoints that need no login
log = logging.getLogger(__name__)

PAGE_SECONDS = 3.0  # that a page goes on trying while the database is away
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


@dataclass
class Door:
    """One role's way to the data: a connection, and optuna-dashboard on top of one."""

    engine: sa.Engine
    optuna_app: Any = field(repr=False)

    @classmethod
    def to(cls, engine: sa.Engine, storage: optuna.storages.BaseStorage) -> "Door":
        app: Any = optuna_dashboard.wsgi(storage, _Artifacts(artifacts()))
        app.catchall = False  # its errors are ours to answer
        return cls(engine, app)


class _Artifacts(FileSystemArtifactStore):
    """Files of the home, in a folder that the first one makes."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        with as_owner(home()):
            make_private(artifacts())
            super().write(artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        """Also what has gone already: else a study with a missing picture could not be deleted."""
        with suppress(ArtifactNotFound):
            super().remove(artifact_id)


def make_app(
    doors: dict[str, Door],
    accounts: Accounts,
    key: bytes,
    link: OneTimeLink | None = None,
    prefix: str = "",
    https: bool = False,
    behind_proxy: bool = False,
) -> Flask:
    """The application; `doors` are by role. `prefix` is the path that a proxy serves it under."""
    app = Flask("dashboards", static_url_path="/atelier/static")
    # Cookies do not know ports: another dashboard on the same host needs another name.
    app.config.update(
        SECRET_KEY=key,
        SESSION_COOKIE_NAME=f"atelier-{hashlib.sha256(b'name' + key).hexdigest()[:8]}",
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_COOKIE_SECURE=https,
        SESSION_COOKIE_PATH=f"{prefix}/",
        SESSION_REFRESH_EACH_REQUEST=False,  # a page that is left open does not prolong it
        PERMANENT_SESSION_LIFETIME=SESSION,
        SEND_FILE_MAX_AGE_DEFAULT=timedelta(days=1),
    )
    app.wsgi_app = _under(prefix, app.wsgi_app)  # type: ignore[method-assign]
    if behind_proxy:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_proto=1, x_host=1)  # type: ignore[method-assign]
    _add_login(app, accounts, link)
    app.before_request(lambda: _gate(doors, accounts, link))
    app.after_request(_harden)
    app.register_error_handler(Exception, _explain)
    app.register_blueprint(pages.blueprint)
    app.add_url_rule("/", "root", lambda: redirect(url_for("pages.index")))
    app.add_url_rule("/logout", "logout", _log_out, methods=["POST"])
    app.add_url_rule("/healthz", "health", lambda: "ok\n")
    _mount_optuna(app, prefix)
    return app


def _under(prefix: str, app: Any) -> Callable[..., Any]:
    """Serve under a path, whether the proxy leaves it in the request or not."""

    def call(environ: dict[str, Any], start_response: Any) -> Any:
        environ.setdefault("HTTP_ACCEPT_ENCODING", "")  # optuna-dashboard reads it unasked
        path = environ.get("PATH_INFO", "")
        if prefix and (path == prefix or path.startswith(f"{prefix}/")):
            environ["PATH_INFO"] = path[len(prefix) :] or "/"
        environ["SCRIPT_NAME"] = prefix
        return app(environ, start_response)

    return call


def _gate(doors: dict[str, Door], accounts: Accounts, link: OneTimeLink | None) -> Any:
    database.thread_patience.set(PAGE_SECONDS)
    g.role = None
    if _is_cross_site():
        return _refuse(403, "requests from other sites are refused")
    if request.endpoint in OPEN:
        return None
    g.role, g.user = _who(accounts, link)
    if g.role is None:
        if _is_navigation():
            return redirect(url_for("login", next=request.full_path.rstrip("?")))
        return _refuse(401, "log in first")
    if any(part.isdecimal() and len(part) > 9 for part in request.path.split("/")):
        abort(404, "There is no such study or trial.")  # nor a number of the database's that is so large
    door = doors[g.role]
    g.engine, g.optuna_app = door.engine, door.optuna_app
    if request.method in ("GET", "HEAD"):
        return None
    if g.role != "editor":
        return _refuse(403, "a viewer may look, not change; ask for an account with the role editor")
    reason = _forbidden_to_editors(g.engine, request.method, request.path)
    return _refuse(409, reason) if reason else None


def _is_cross_site() -> bool:
    """Whether another site's page makes this request. A link that somebody follows is no such thing."""
    site = request.headers.get("Sec-Fetch-Site", "none")
    reads = request.method in ("GET", "HEAD")
    if site not in ("same-origin", "none"):
        return not (reads and request.headers.get("Sec-Fetch-Mode") == "navigate")
    origin = request.headers.get("Origin")
    return not reads and origin is not None and urlsplit(origin).netloc != request.host


def _is_navigation() -> bool:
    """Whether a browser will show the answer: to all others an error is JSON."""
    return request.method == "GET" and "text/html" in request.headers.get("Accept", "")


def _who(accounts: Accounts, link: OneTimeLink | None) -> tuple[str | None, str | None]:
    """Role and name of the session; it ends when its account changes."""
    known = accounts.all()
    account = known.get(session.get("user", ""))
    if account is not None and session.get("stamp") == account.stamp:
        return account.role, account.name
    if link is not None and not known and session.get("stamp") == link.stamp:
        return "editor", None
    return None, None


# What optuna-dashboard can do to a study or trial, as (method, path).
_RENAME = re.compile(r"POST /api/studies/\d+/rename")
_DELETE = re.compile(r"DELETE /api/studies/(\d+)")
_OF_TRIAL = re.compile(r"(?:POST|PUT|DELETE) /api/trials/(\d+)/.*")


def _forbidden_to_editors(engine: sa.Engine, method: str, path: str) -> str | None:
    """Why not even an editor may do this now: the workers' fence does not know optuna-dashboard."""
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


def _refuse(status: int, reason: str) -> Response:
    """In optuna-dashboard's form of an error."""
    response = jsonify(reason=reason)
    response.status_code = status
    return response


def _harden(response: Response) -> Response:
    response.headers.remove("Access-Control-Allow-Origin")
    response.headers.setdefault("Content-Security-Policy", CONTENT_POLICY)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["Referrer-Policy"] = "same-origin"
    if request.path.startswith("/artifacts/"):  # somebody's file, of any type
        response.headers["Content-Security-Policy"] = (
            "sandbox; default-src 'none'; style-src 'unsafe-inline'"
        )
    if request.endpoint != "static" and "Cache-Control" not in response.headers:
        response.headers["Cache-Control"] = "no-cache"
    return response


def _explain(error: Exception) -> Any:
    """A page for every error: what happened and what to do next."""
    if isinstance(error, RequestRedirect):
        return error  # to the same path, written better
    if isinstance(error, HTTPException):
        status, words = error.code or 500, error.description or ""
    elif isinstance(error, (NoResultFound, ArtifactNotFound)):
        status, words = 404, "There is no such study or file, or not any more."
    elif isinstance(error, database.DATABASE_ERRORS):
        status, words = 503, _of_the_database(error)
    else:
        raise error
    if g.get("role") is None or not _is_navigation():
        return _refuse(status, words)
    return render_template("message.html", status_code=status, words=words), status


def _of_the_database(error: Exception) -> str:
    """What a page says of it; who has not logged in sees it too. Raises the error if it is our fault."""
    if faults.sqlstate(error) == faults.READ_ONLY:
        return "The database takes no writes now: it is a standby, or gives its work to one."
    verdict = faults.judge(error)
    if verdict is faults.Verdict.AGAIN:
        return "The database does not answer. This page asks again by itself."
    if verdict is faults.Verdict.OURS and not isinstance(error, url.DatabaseError):
        raise error
    log.error("%s", faults.explain(error))
    return "The database cannot be used. Whoever runs it sees why with: atelier db check"


def _add_login(app: Flask, accounts: Accounts, link: OneTimeLink | None) -> None:
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
            return ask("Links end with the first account: log in.", 401)
        return ask("This link is not valid any more; the terminal shows the next one.", 401)

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
    # By way of a question of our own: whether the browser sends back what it was given.
    return redirect(url_for("login", entered="", next=request.values.get("next", "")))


def _cookieless() -> str:
    """What the login page says to who was let in, but comes without the session's cookie."""
    if current_app.config["SESSION_COOKIE_SECURE"] and not request.is_secure:
        return "If you have just logged in: sessions here are for https only; open this page by https."
    return (
        f"If you have just logged in: this browser keeps no cookies of {request.host}, and so nobody "
        "stays logged in. Allow them, then log in again."
    )


def _log_out() -> Any:
    session.clear()
    return redirect(url_for("login"))


def _wanted() -> str:
    """The page that was asked for before the login."""
    target = request.values.get("next", "")
    # A path of ours, not another host; a browser leaves out control characters.
    safe = re.fullmatch(r"/(?![/\\])[^\\\x00-\x20\x7f]*", target)
    # After a file, or the end of a session, there would be no page.
    is_page = not re.match(r"/logout|/csv/|[^?]*\.csv", target)
    return request.script_root + target if safe and is_page else url_for("pages.index")


def _throttled(name: str, address: str) -> list[str]:
    """What has to wait after failures. Through ssh -L all come from this machine's own address."""
    return [f"name {name[:200]}", *([] if is_loopback(address) else [f"address {address}"])]


def _mount_optuna(app: Flask, prefix: str) -> None:
    page_link = '<a href="{}" style="{}">Atelier’s pages</a></body>'
    style = (
        "position:fixed;right:16px;bottom:16px;z-index:2000;padding:8px 14px;border-radius:20px;"
        "background:#3b82f6;color:#fff;font:500 14px system-ui,sans-serif;text-decoration:none"
    )
    bundle = pages.Script(lambda: _prefixed(prefix))

    @app.route("/<path:path>", methods=METHODS)
    def optuna_pages(path: str) -> Any:
        if path.startswith("atelier/"):
            abort(404, "There is no such page.")
        if prefix and path == "static/bundle.js":
            return bundle.response()
        # The path that the gate has judged, not its raw bytes, which Bottle decodes in another way.
        environ = {**request.environ, "PATH_INFO": request.path.encode().decode("latin-1")}
        is_page = path.split("/")[0] == "dashboard"
        try:
            answer = Response.from_app(g.optuna_app, environ, buffered=is_page)
        except KeyError:  # Optuna's word for a study or trial that there is not
            abort(404, "There is no such study or trial, or not any more.")
        if answer.status_code == 404 and _is_navigation():
            abort(404, "There is no such page.")
        if answer.status_code == 500:  # optuna-dashboard's word for any error of its storage
            _raise_the_reason(request.path)
        if answer.mimetype == "text/csv":
            _name_table(answer.headers)
        if is_page and answer.mimetype == "text/html":
            text = answer.get_data(as_text=True).replace('="/static/', f'="{prefix}/static/')
            answer.set_data(text.replace("</body>", page_link.format(url_for("pages.index"), style)))
        return answer


def _name_table(headers: Headers) -> None:
    """optuna-dashboard's table is UTF-8, as is its name; it says neither in a way that browsers know."""
    _, _, name = headers.get("Content-Disposition", "").partition("filename=")
    words = name.encode("latin-1").decode().removesuffix(".csv")
    headers["Content-Type"] = "text/csv; charset=utf-8"
    headers["Content-Disposition"] = tables.attachment(words)


def _raise_the_reason(path: str) -> None:
    """Raises what `_explain` knows, if the database is away or the path's study has gone."""
    with g.engine.connect():
        pass
    if (match := re.match(r"/api/studies/(\d+)", path)) and not studies.study_entry(
        g.engine, int(match[1])
    ):
        abort(404, "There is no such study, or not any more.")
    if (match := re.match(r"/api/trials/(\d+)", path)) and not studies.trial_exists(
        g.engine, int(match[1])
    ):
        abort(404, "There is no such trial, or not any more.")


def _prefixed(prefix: str) -> bytes:
    """optuna-dashboard's script with its absolute paths under the prefix."""
    text = (Path(optuna_dashboard.__file__).parent / "public" / "bundle.js").read_text(encoding="utf-8")
    for old, new in (
        ("`${this.baseURL}/api/", f"`{prefix}/api/"),
        ("`/artifacts/", f"`{prefix}/artifacts/"),
        ("(/artifacts/", f"({prefix}/artifacts/"),
        ("`/csv/", f"`{prefix}/csv/"),
        ('url_prefix:"/dashboard"', f'url_prefix:"{prefix}/dashboard"'),
    ):
        text = text.replace(old, new)
    return text.encode()

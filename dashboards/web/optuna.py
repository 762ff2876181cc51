"""Serves optuna-dashboard behind our login, with our prefix and our error pages."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import optuna
import optuna_dashboard
import sqlalchemy as sa
from flask import Flask, Response, abort, g, request, url_for
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from werkzeug.datastructures import Headers

from dashboards import csv_tables
from dashboards.web.auth import RoleConnection, is_navigation
from dashboards.web.scripts import Script
from storage import studies
from storage.ownership import as_owner
from storage.paths import RunFolder, artifacts, home, make_private

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


class _Artifacts(FileSystemArtifactStore):
    """The artifacts of a home. The first one makes their folder."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        with as_owner(home()):
            make_private(artifacts())
            super().write(artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        """Remove an artifact if it is there: a study with a missing picture can be deleted, too."""
        with suppress(ArtifactNotFound):
            super().remove(artifact_id)


def mount_optuna(app: Flask, prefix: str) -> None:
    """Serve all paths that no other route has with optuna-dashboard."""
    page_link = '<a href="{}" style="{}">Atelier’s pages</a></body>'
    style = (
        "position:fixed;right:16px;bottom:16px;z-index:2000;padding:8px 14px;border-radius:20px;"
        "background:#3b82f6;color:#fff;font:500 14px system-ui,sans-serif;text-decoration:none"
    )
    bundle = Script(lambda: _prefixed(prefix))

    @app.route("/<path:path>", methods=METHODS)
    def optuna_pages(path: str) -> Any:
        if path.startswith("atelier/"):
            abort(404, "There is no such page.")
        if prefix and path == "static/bundle.js":
            return bundle.response()
        # The path that `authorize` has checked. Bottle would decode the raw bytes in another way.
        environ = {
            "HTTP_ACCEPT_ENCODING": "",  # a header that optuna-dashboard expects
            **request.environ,
            "PATH_INFO": request.path.encode().decode("latin-1"),
        }
        is_page = path.split("/")[0] == "dashboard"
        deletes = re.fullmatch(r"DELETE api/studies/(\d+)/?", f"{request.method} {path}")
        entry = deletes and studies.study_entry(g.engine, int(deletes[1]))
        try:
            answer = Response.from_app(g.optuna_app, environ, buffered=is_page)
        except KeyError:  # Optuna's error for an unknown study or trial
            abort(404, "There is no such study or trial. It may have been deleted.")
        if entry and answer.status_code < 300:
            with as_owner(home()):
                RunFolder(entry.name, entry.created).mark_deleted()
        if answer.status_code == 404 and is_navigation():
            abort(404, "There is no such page.")
        if answer.status_code == 500:  # optuna-dashboard's answer to any error of its storage
            _raise_the_reason(request.path)
        if answer.mimetype == "text/csv":
            _name_table(answer.headers)
        if is_page and answer.mimetype == "text/html":
            text = answer.get_data(as_text=True).replace('="/static/', f'="{prefix}/static/')
            answer.set_data(text.replace("</body>", page_link.format(url_for("pages.index"), style)))
        return answer


def _name_table(headers: Headers) -> None:
    """Declare that the table and its name are UTF-8, in the way that browsers understand."""
    _, _, name = headers.get("Content-Disposition", "").partition("filename=")
    words = name.encode("latin-1").decode().removesuffix(".csv")
    headers["Content-Type"] = "text/csv; charset=utf-8"
    headers["Content-Disposition"] = csv_tables.attachment(words)


def _raise_the_reason(path: str) -> None:
    """Raise the reason if the database is away, or if the study or trial of the path is deleted."""
    with g.engine.connect():
        pass
    if (match := re.match(r"/api/studies/(\d+)", path)) and not studies.study_entry(
        g.engine, int(match[1])
    ):
        abort(404, "There is no such study. It may have been deleted.")
    if (match := re.match(r"/api/trials/(\d+)", path)) and not studies.trial_exists(
        g.engine, int(match[1])
    ):
        abort(404, "There is no such trial. It may have been deleted.")


def _prefixed(prefix: str) -> bytes:
    """The script of optuna-dashboard, with the prefix before its absolute paths."""
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


def connect_role(engine: sa.Engine, storage: optuna.storages.BaseStorage) -> RoleConnection:
    """A role's connection, with an optuna-dashboard on this storage."""
    app: Any = optuna_dashboard.wsgi(storage, _Artifacts(artifacts()))
    app.catchall = False  # exceptions reach our error pages
    return RoleConnection(engine, app)

"""The dashboard's gate, roles and pages, through the real application on a real PostgreSQL."""

import csv
import io
import json
import re
import subprocess
import sys
import threading
import time
from html import unescape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import optuna
import optuna_dashboard
import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from optuna.trial import TrialState
from werkzeug.test import Client as WerkzeugClient
from werkzeug.test import EnvironBuilder

from dashboards.plot import attach_curve, plot_study
from dashboards.web.accounts import AccountError, Accounts, OneTimeLink, Throttle, session_key
from dashboards.web.app import make_app
from dashboards.web.auth import RoleConnection
from dashboards.web.server import connect_roles
from storage import database, ledger, optuna_storage, studies
from storage.embedded import EmbeddedPostgres
from storage.paths import RunFolder, studies_here
from tests.conftest import PASSWORD, copied_database, give_accounts
from tests.studies import fill, open_storage

MIXED = ["complete", "pruned", "failed", "running", "waiting", "complete"]
HTML = {"Accept": "text/html"}


@pytest.fixture
def connections(engine, home):
    connections = connect_roles()
    yield connections
    for role in connections.values():
        role.engine.dispose()


@pytest.fixture
def app(connections, accounts):
    app = make_app(connections, accounts, b"k" * 32)
    app.test_client_class = Client
    return app


class Shown(NamedTuple):
    """The application before one study with every kind of trial."""

    app: Flask
    connections: dict[str, RoleConnection]
    engine: sa.Engine
    accounts: Accounts
    study: int
    seen: dict[str, FlaskClient]

    def by(self, name):
        """Somebody's browser; each logs in once."""
        if name not in self.seen:
            self.seen[name] = log_in(self.app, name)
        return self.seen[name]


@pytest.fixture(scope="module")
def shown(server, template, tmp_path_factory):
    """For tests that change nothing: to begin anew takes longer than to look."""
    home = tmp_path_factory.mktemp("shown")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_HOME", str(home))
        patch.setenv("ATELIER_DATABASE_URL", copied_database(server, "shown", template))
        accounts = give_accounts(home, patch)
        engine = database.connect()
        study = fill(engine, MIXED, name="secret name")
        connections = connect_roles()
        app = make_app(connections, accounts, b"k" * 32)
        app.test_client_class = Client
        yield Shown(app, connections, engine, accounts, study, {})
    for one in (engine, *(role.engine for role in connections.values())):
        one.dispose()


def is_whole(shown):
    """Whether nobody has changed what is shown."""
    states = [
        trial.state for trial in optuna_storage.optuna_storage(shown.engine).get_all_trials(shown.study)
    ]
    return len(states) == len(MIXED) and states.count(TrialState.RUNNING) == 2


class Client(FlaskClient):
    """Reads each answer to its end, as a browser does."""

    def open(self, *args, **options):
        return super().open(*args, **options | {"buffered": True})


def log_in(app, name):
    client = app.test_client()
    response = client.post("/login", data={"name": name, "password": PASSWORD})
    assert response.status_code == 302
    return client


def mutating_routes():
    """(method, path) of everything in the installed optuna-dashboard that is not a GET."""
    app = optuna_dashboard.wsgi(optuna.storages.InMemoryStorage())
    filled = {"study_id": "1", "trial_id": "1", "artifact_id": "ab-cd", "history_id": "x"}
    for route in app.routes:
        if route.method not in ("GET", "HEAD"):
            path = re.sub(r"<(\w+)[^>]*>", lambda match: filled[match[1]], route.rule)
            yield route.method, path


def test_there_are_mutating_routes_to_guard():
    routes = list(mutating_routes())
    assert len(routes) >= 15
    assert ("DELETE", "/api/studies/1") in routes


@pytest.mark.parametrize(("method", "path"), list(mutating_routes()))
def test_no_mutating_route_is_open_to_strangers_or_viewers(shown, method, path):
    assert shown.app.test_client().open(path, method=method, json={}).status_code == 401
    assert shown.by("vera").open(path, method=method, json={}).status_code == 403
    assert is_whole(shown)


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/dashboard", "/dashboard/studies/1", "/api/studies", "/api/studies/1", "/csv/1"),
        *("/static/bundle.js", "/atelier/", "/atelier/studies/1", "/atelier/plotly.js", "/nowhere"),
        *("/artifacts/1/1/ab", "//api/studies", "/api//studies", "/API/studies", "/api/studies/"),
        *("/login/../api/studies", "/login;/api/studies", "/%2e%2e/api/studies"),
    ],
)
def test_nothing_is_shown_without_a_login(shown, path):
    response = shown.app.test_client().get(path)
    assert response.status_code == 401
    assert b"secret name" not in response.data
    page = shown.app.test_client().get(path, headers=HTML)
    assert page.status_code == 302


def test_what_needs_no_login(shown):
    client = shown.app.test_client()
    assert client.get("/login").status_code == 200
    assert client.get("/atelier/static/atelier.css").status_code == 200
    assert client.get("/healthz").data == b"ok\n"
    assert client.get("/atelier/static/../web.py").status_code == 404


def test_wrong_passwords_are_refused_and_then_slowed_down(app):
    client = app.test_client()
    away = {"REMOTE_ADDR": "192.0.2.7"}
    for name in ("vera", "nobody", "", "vera", "vera"):
        response = client.post("/login", data={"name": name, "password": "wrong"}, environ_base=away)
        assert response.status_code == 401
        assert b"Wrong name or password" in response.data
    right = {"name": "vera", "password": PASSWORD}
    response = client.post("/login", data=right, environ_base=away)
    assert response.status_code == 429  # this address has failed five times
    assert b"Try again in 2 s" in response.data
    # Through ssh -L all come from this machine: only the name counts, and vera failed three times.
    assert client.post("/login", data=right).status_code == 302


def test_through_a_tunnel_the_name_is_slowed_down(app):
    client = app.test_client()
    for _ in range(5):
        client.post("/login", data={"name": "vera", "password": "wrong"})
    assert client.post("/login", data={"name": "vera", "password": PASSWORD}).status_code == 429
    assert client.post("/login", data={"name": "ed", "password": PASSWORD}).status_code == 302


def test_the_throttle_waits_longer_each_time_and_forgets_on_success():
    now = [0.0]
    throttle = Throttle(clock=lambda: now[0])
    waits = []
    for _ in range(20):
        throttle.failed("name a", "address b")
        waits.append(throttle.wait("name a"))
    assert waits[:4] == [0, 0, 0, 0]
    assert waits[4:8] == [2, 4, 8, 16]
    assert max(waits) == 900
    assert throttle.wait("name c", "address b") == 900  # the address alone is enough
    now[0] += 900
    assert throttle.wait("name a") == 0
    throttle.failed("name a")
    assert throttle.wait("name a") == 0  # the old failures are forgotten
    throttle.succeeded("name a")
    throttle.failed("name a")
    assert throttle.wait("name a") == 0


def test_a_session_ends_with_its_account_its_password_and_its_time(app, accounts, monkeypatch):
    client = log_in(app, "vera")
    assert client.get("/atelier/").status_code == 200
    accounts.put("vera", "viewer", PASSWORD + " new")
    assert client.get("/atelier/").status_code == 401
    client = log_in(app, "ed")
    accounts.remove("ed")
    assert client.get("/atelier/").status_code == 401
    accounts.put("ed", "editor", PASSWORD)
    client = log_in(app, "ed")
    client.post("/logout")
    assert client.get("/atelier/").status_code == 401
    client = log_in(app, "ed")
    later = time.time() + 12 * 3600 + 60
    monkeypatch.setattr("itsdangerous.timed.time.time", lambda: later)
    assert client.get("/atelier/").status_code == 401


def test_a_forged_or_foreign_cookie_opens_nothing(shown):
    other = make_app(shown.connections, shown.accounts, b"x" * 32).test_client()
    other.post("/login", data={"name": "ed", "password": PASSWORD})
    [cookie] = other._cookies.values()
    client = shown.app.test_client()
    client.set_cookie(shown.app.config["SESSION_COOKIE_NAME"], cookie.value)
    assert client.get("/atelier/").status_code == 401


def test_the_cookie_is_for_this_site_only(shown):
    response = shown.app.test_client().post("/login", data={"name": "ed", "password": PASSWORD})
    cookie = response.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie


@pytest.mark.parametrize(
    "target",
    [
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "/a\r\nX: y",
        "/\t/evil.example",
    ],
)
def test_a_login_leads_to_no_other_site(shown, target):
    data = {"name": "ed", "password": PASSWORD, "next": target}
    response = shown.app.test_client().post("/login", data=data, follow_redirects=True)
    assert response.request.path == "/atelier/"
    assert [one.headers["Location"].split("?")[0] for one in response.history] == ["/login", "/atelier/"]


def test_a_login_leads_to_the_page_that_was_asked_for(shown):
    client = shown.app.test_client()
    asked = client.get("/atelier/studies/1/curves?trials=3&smooth=40", headers=HTML)
    page = client.get(asked.headers["Location"])
    target = unescape(re.search(r'name="next" value="([^"]*)"', page.text)[1])
    data = {"name": "ed", "password": PASSWORD, "next": target}
    response = client.post("/login", data=data, follow_redirects=True)
    assert response.request.full_path == "/atelier/studies/1/curves?trials=3&smooth=40"


CROSS_SITE = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},  # another port of this host
]


@pytest.mark.parametrize("headers", CROSS_SITE)
def test_other_sites_cannot_act_in_an_editors_name(shown, headers):
    client = shown.by("ed")
    # Nobody holds a trial of it, so the editor himself might delete it.
    study = fill(shown.engine, ["complete"], name=f"idle {CROSS_SITE.index(headers)}")
    assert client.delete(f"/api/studies/{study}", json={}, headers=headers).status_code == 403
    assert client.post("/logout", headers=headers).status_code == 403
    assert shown.app.test_client().post("/login", headers=headers).status_code == 403
    if "Sec-Fetch-Site" in headers:
        read = client.get("/api/studies", headers=headers | {"Sec-Fetch-Mode": "cors"})
        assert read.status_code == 403
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/atelier/", headers=link).status_code == 200  # somebody followed a link


def test_an_editor_may_delete_but_not_under_the_workers(app, engine, home):
    busy, idle = fill(engine, MIXED, name="busy"), fill(engine, ["complete"], name="idle")
    client = log_in(app, "ed")
    refused = client.delete(f"/api/studies/{busy}", json={})
    assert refused.status_code == 409
    assert "atelier stop" in refused.json["reason"]
    assert client.delete(f"/api/studies/{busy}/", json={}).status_code == 409
    runs = [
        RunFolder(name, studies.study_entry(engine, name).created).make() for name in ("busy", "idle")
    ]
    assert studies_here() == {"busy", "idle"}
    assert client.delete(f"/api/studies/{idle}", json={}).status_code == 204
    assert studies_here() == {"busy"}  # what a shell offers
    assert all(folder.path.is_dir() for folder in runs)
    assert studies.study_entry(engine, "idle") is None  # its rows went with it
    assert studies.study_entry(engine, "busy") is not None
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(DISTINCT study_id) FROM atelier.attempt")) == 1


def test_an_editor_may_tell_a_trial_only_if_nobody_holds_it(app, engine):
    study = fill(engine, MIXED)
    storage = open_storage(engine)
    trials = {trial.number: trial for trial in storage.get_all_trials(study)}
    client = log_in(app, "ed")
    running, waiting = (trials[MIXED.index(state)]._trial_id for state in ("running", "waiting"))
    tell = {"state": "Fail"}
    assert client.post(f"/api/trials/{running}/tell", json=tell).status_code == 409
    assert client.post(f"/api/trials/{waiting}/tell", json=tell).status_code == 204
    assert storage.get_trial(waiting).state == TrialState.FAIL
    assert storage.get_trial(running).state == TrialState.RUNNING


@pytest.mark.parametrize("path", ["/api/studies/\xff1", "/api/stud\xffies/1", "/api/trials/1\xff/tell"])
def test_the_path_that_is_judged_is_the_path_that_is_served(app, engine, path):
    """Flask and Bottle decode bytes that are no UTF-8 in different ways."""
    study = fill(engine, ["running"])
    assert study == 1
    client = log_in(app, "ed")
    environ = EnvironBuilder("/", method="POST" if "tell" in path else "DELETE", json={"state": "Fail"})
    environ = environ.get_environ() | {"PATH_INFO": path}  # as the server hands on raw bytes
    environ["HTTP_COOKIE"] = "; ".join(f"{c.key}={c.value}" for c in client._cookies.values())
    status = []
    list(app.wsgi_app(environ, lambda line, headers: status.append(line)))
    assert status[0].startswith("404")
    assert open_storage(engine).get_all_trials(study)[0].state == TrialState.RUNNING


def test_a_deleted_study_was_stopped_first_so_that_no_worker_begins(app, engine):
    study = fill(engine, ["complete"], max_trials=5)
    worker = ledger.Ledger(engine, open_storage(engine), study)
    worker.register()
    assert studies.stop_unless_held(engine, study)
    assert worker.claim() is None
    assert log_in(app, "ed").delete(f"/api/studies/{study}", json={}).status_code == 204
    assert worker.claim() is None  # it ends like a worker that finds nothing to do


def test_a_worker_whose_study_was_deleted_by_force_has_lost_its_lease(app, engine):
    study = fill(engine, ["waiting"])
    storage = open_storage(engine)
    worker = ledger.Ledger(engine, storage, study)
    worker.register()
    claim = worker.claim()
    storage.delete_study(study)
    for write in (lambda: worker.finish(claim, "complete", 0.5), lambda: worker.renew(claim)):
        with pytest.raises(ledger.LeaseLost):
            write()


def test_nobody_renames_by_copying(app, engine):
    study = fill(engine, ["complete"])
    response = log_in(app, "ed").post(f"/api/studies/{study}/rename", json={"study_name": "new"})
    assert response.status_code == 409
    assert "loses epochs" in response.json["reason"]
    assert studies.study_entry(engine, "filled") is not None


def test_a_viewers_connection_could_not_write_even_past_the_gate(connections, engine):
    study = fill(engine, ["complete"])
    with (
        connections["viewer"].engine.begin() as connection,
        pytest.raises(sa.exc.DBAPIError, match=r"read-only|denied"),
    ):
        connection.execute(sa.text("DELETE FROM studies"))
    answer = WerkzeugClient(connections["viewer"].optuna_app).delete(f"/api/studies/{study}", json={})
    assert answer.status_code == 500
    assert studies.study_entry(engine, "filled") is not None


@pytest.mark.parametrize("before", ["", "/node/a-1/8080"])
def test_a_proxy_may_take_the_prefix_away_or_leave_it(shown, before):
    prefix = "/node/a-1/8080"
    client = make_app(shown.connections, shown.accounts, b"k" * 32, prefix=prefix).test_client()
    assert client.get(f"{before}/healthz").data == b"ok\n"
    assert client.get(f"{before}/", headers=HTML).headers["Location"] == f"{prefix}/login?next=/"
    assert client.get(f"{before}/node/healthz").status_code == 401  # a path like a part of the prefix
    # A header must not decide where the pages are.
    elsewhere = client.get(f"{before}/", headers=HTML | {"X-Forwarded-Prefix": "/elsewhere"})
    assert elsewhere.headers["Location"].startswith(prefix)


def test_headers_that_protect_are_everywhere(shown):
    client = shown.by("vera")
    for path in ("/atelier/", "/dashboard", "/api/studies", "/nowhere", "/login"):
        headers = client.get(path).headers
        assert "Access-Control-Allow-Origin" not in headers
        assert headers["X-Frame-Options"] == "DENY"
        assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert "unsafe-eval" not in client.get("/atelier/").headers["Content-Security-Policy"]


def test_the_one_time_link_lets_in_once_and_only_without_accounts(connections, home):
    shown = []
    accounts = Accounts()
    app = make_app(connections, accounts, b"k" * 32, OneTimeLink(shown.append))
    first = app.test_client()
    assert first.get("/login?token=wrong").status_code == 401
    assert first.get(f"/login?token={shown[0]}").status_code == 302
    assert first.get("/atelier/").status_code == 200
    assert len(shown) == 2
    second = app.test_client()
    assert second.get(f"/login?token={shown[0]}").status_code == 401
    assert second.get("/atelier/").status_code == 401
    assert second.get(f"/login?token={shown[1]}").status_code == 302
    accounts.put("vera", "viewer", PASSWORD)
    assert second.get("/atelier/").status_code == 401
    assert app.test_client().get(f"/login?token={shown[2]}").status_code == 401


PAGES = ["", "/curves", "/curves?smooth=60&top=3&state=pruned", "/compare?by=batch_size", "/trials/0"]
PAGES += ["/compare", "/curves?trials=0,2,999", "/curves?trials=0-3", "/images", "/images?show=all"]


@pytest.mark.parametrize("page", PAGES)
def test_pages_of_a_study_with_every_kind_of_trial(shown, page):
    response = shown.by("vera").get(f"/atelier/studies/{shown.study}{page}")
    assert response.status_code == 200
    for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', response.text, re.S):
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# (address, what the page says of it)
NOT_UNDERSTOOD = [
    ("/curves?trials=x", "trials: 'x': write numbers and ranges of trials, as in 3,5-9"),
    ("/curves?trials=1&trials=2", "trials: given 2 times; give it once"),
    ("/curves?top=0", "top: '0': write a whole number from 1 to 40"),
    ("/curves?top=41", "top: '41': write a whole number from 1 to 40"),
    ("/curves?smooth=z", "smooth: 'z': write a whole number from 0 to 95"),
    ("/curves?smooth=96", "smooth: '96': write a whole number from 0 to 95"),
    ("/curves?state=failled", "state: 'failled': allowed are running, waiting, complete"),
    ("/curves?state=failed,complete", "state: 'failed,complete': allowed are"),
    ("/curves?trails=3", "'trails': no such filter; allowed are trials, top, smooth, state"),
    ("/compare?by=nonsense", "by: 'nonsense': allowed are batch_size, dropout"),
    ("/compare?by=dropout&by=lr", "by: given 2 times; give it once"),
    ("/compare?trials=x", "trials: 'x': write numbers"),
    ("/compare?top=61", "top: '61': write a whole number from 1 to 60"),
    ("/compare?state=FAILED", "state: 'FAILED': allowed are"),
    ("/compare?smooth=40", "'smooth': no such filter; allowed are by, trials, top, state"),
    ("?state=done", "state: 'done': allowed are"),
    ("?rows=many", "rows: 'many': write a whole number from 1 to 4000"),
    ("?rows=4001", "rows: '4001': write a whole number from 1 to 4000"),
    ("?sort=score", "'sort': no such filter; allowed are state, rows"),
    ("/trials/0?epoch=3", "'epoch': no such filter; this page has none"),
    ("/trials.csv?state=done", "state: 'done': allowed are"),
    ("/trials.csv?rows=5", "'rows': no such filter; allowed are state"),
    ("/epochs.csv?trials=x", "trials: 'x': write numbers"),
    ("/epochs.csv?trials=0,999", "No epoch on record of trial 999."),
    ("/ends.csv?x=", "'x': no such filter; this page has none"),
    ("/trials/0/attributes.csv?x=1", "'x': no such filter; this page has none"),
    ("/workers.csv?x=", "'x': no such filter; this page has none"),
    ("/trials/0/attempts.csv?x=1", "'x': no such filter; this page has none"),
    ("/trials/0/settings.csv?x=1", "'x': no such filter; this page has none"),
]


@pytest.mark.parametrize(("page", "said"), NOT_UNDERSTOOD)
def test_what_is_not_understood_is_said_and_nothing_drawn_instead(shown, page, said):
    response = shown.by("vera").get(f"/atelier/studies/{shown.study}{page}")
    assert response.status_code == 400
    assert said in unescape(response.text)
    if page.startswith(("/curves", "/compare")):
        assert "data-plot" not in response.text
    assert 'href="/atelier/studies/1/trials/1"' not in response.text


def test_the_list_of_studies_has_no_filter(shown):
    for path in ("/atelier/?state=failed", "/atelier/studies.csv?state=failed"):
        response = shown.by("vera").get(path)
        assert response.status_code == 400
        assert "'state': no such filter; this page has none" in unescape(response.text)


def drawn_trials(text):
    chips = re.search(r'id="chosen">(.*?)</p>', text, re.S)
    return [int(number) for number in re.findall(r'id="chosen-(\d+)"', chips[1] if chips else "")]


# (address, the trials that are drawn, what it says of the others)
CHOICES = [
    ("trials=1-3", [1, 2, 3], None),
    ("trials=0,2-3", [0, 2, 3], None),
    ("trials=+3+-+5+", [3, 4, 5], None),
    ("trials=4-7", [4, 5], "No epoch on record of trials 6-7."),
    ("trials=0,99", [0], "No epoch on record of trial 99."),
    ("trials=7", [], "No epoch on record of trial 7."),
    ("trials=0-999999999", [0, 1, 2, 3, 4, 5], "No epoch on record of trials 6-999999999."),
    ("trials=0-2&state=complete", [0], "No epoch on record in these states of trials 1-2."),
    ("trials=&top=&smooth=&state=failed", [2], None),  # as a form sends what is left empty
    ("state=failed&state=pruned", [1, 2], None),
]


@pytest.mark.parametrize(("query", "expected", "said"), CHOICES)
def test_what_is_asked_for_is_drawn_and_what_is_absent_is_named(shown, query, expected, said):
    response = shown.by("vera").get(f"/atelier/studies/{shown.study}/curves?{query}")
    assert response.status_code == 200
    assert sorted(drawn_trials(response.text)) == expected
    alert = re.search(r'role="alert">(.*?)</div>', response.text, re.S)
    assert (re.sub(r"<.*?>", "", alert[1]).strip() if alert else None) == said


def test_the_command_line_takes_the_same_words(shown, tmp_path):
    entry = studies.study_entry(shown.engine, shown.study)
    one, other = tmp_path / "one.svg", tmp_path / "other.svg"
    for path, words in ((one, "0-2, 5"), (other, "0,1,2,5")):
        plot_study(shown.engine, entry, "curves", path, trials=words)
    legend = re.compile(r"<!-- (trial .*?) -->")
    assert legend.findall(one.read_text()) == legend.findall(other.read_text())
    assert [line.split(",")[0] for line in legend.findall(one.read_text())] == [
        *("trial 0", "trial 1", "trial 2", "trial 5")
    ]


def test_a_file_has_more_trials_than_a_figure_holds(shown, small_and_large):
    page = f"/atelier/studies/{small_and_large[1]}"
    epochs = read_csv(shown.by("vera").get(f"{page}/epochs.csv?trials=0-99"))
    assert {int(row["trial"]) for row in epochs} == {*range(100)}


def test_more_trials_than_a_figure_holds_are_counted(shown, small_and_large):
    page = f"/atelier/studies/{small_and_large[1]}"
    text = shown.by("vera").get(f"{page}/curves?trials=0-99").text
    assert drawn_trials(text) == list(range(40))
    assert "The first 40 of these 100 trials are drawn." in text
    text = shown.by("vera").get(f"{page}/compare?trials=0-99").text
    assert "The first 60 of these 100 trials are drawn." in text


def test_a_study_without_trials_knows_its_hyperparameters(shown, hollow):
    empty, _ = hollow
    client = shown.by("vera")
    assert client.get(f"/atelier/studies/{empty}/compare?by=dropout").status_code == 200
    assert client.get(f"/atelier/studies/{empty}/compare?by=nonsense").status_code == 400


def read_csv(response):
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert response.headers["Content-Disposition"].startswith("attachment; filename")
    return list(csv.DictReader(io.StringIO(response.data.decode("utf-8"), newline="")))


def test_every_table_can_be_had_whole_as_csv(shown, small_and_large):
    client, page = shown.by("vera"), f"/atelier/studies/{shown.study}"
    large = f"/atelier/studies/{small_and_large[1]}"
    assert len(read_csv(client.get(f"{large}/trials.csv"))) == 200  # of which the page shows 25
    trials = read_csv(client.get(f"{page}/trials.csv"))
    assert [row["state"] for row in trials] == MIXED
    assert float(trials[0]["dropout"]) > 0
    assert "ValueError: x" in trials[2]["reason"]
    some = read_csv(client.get(f"{page}/trials.csv?state=failed&state=waiting"))
    assert [row["number"] for row in some] == ["2", "4"]
    [worker] = read_csv(client.get(f"{page}/workers.csv"))
    assert (worker["host"], worker["job"], worker["trial"]) == ("node-1", "12_3", "3")
    attempts = read_csv(client.get(f"{page}/trials/3/attempts.csv"))
    assert [row["attempt"] for row in attempts] == ["1", "2"]
    settings = read_csv(client.get(f"{page}/trials/0/settings.csv"))
    assert {"part": "setting", "name": "backbone", "value": "resnet10t"} in settings
    assert sum(row["part"] == "configuration" for row in settings) == 5
    attributes = read_csv(client.get(f"{page}/trials/0/attributes.csv"))
    assert [row for row in attributes if float(row["low"]) < float(row["accuracy"]) < float(row["high"])]
    ends = read_csv(client.get(f"{page}/ends.csv"))
    assert {row["outcome"] for row in ends} == {"complete", "pruned", "failed"}
    epochs = read_csv(client.get(f"{page}/epochs.csv?trials=0-1"))
    assert [row["epoch"] for row in epochs if row["trial"] == "1"] == ["1", "2", "3", "4", "5", "6"]
    assert len(epochs) == 36
    assert "sleeve accuracy" in epochs[0]
    studies = read_csv(client.get("/atelier/studies.csv"))
    assert "secret name" in [row["name"] for row in studies]
    assert all(re.search(r"[+-]\d\d:\d\d$", row["created"]) for row in studies)


@pytest.mark.parametrize("page", ["/trials.csv", "/workers.csv", "/epochs.csv"])
def test_a_table_without_rows_has_its_columns(shown, hollow, page):
    response = shown.by("vera").get(f"/atelier/studies/{hollow[0]}{page}")
    assert read_csv(response) == []
    assert "trial" in response.text or "number" in response.text


@pytest.mark.parametrize("page", ["", "/curves", "/compare", "/trials/0"])
def test_every_page_with_a_table_links_to_the_whole(shown, page):
    client = shown.by("vera")
    text = client.get(f"/atelier/studies/{shown.study}{page}").text
    links = re.findall(r'href="([^"]*\.csv[^"]*)"', text)
    assert len(links) == {"": 3, "/trials/0": 4}.get(page, 1)
    for link in links:
        assert read_csv(client.get(unescape(link)))


def test_tables_are_named_after_their_study(shown):
    study = fill(shown.engine, ["complete"], name='größe "漢" / 1')
    client = shown.by("vera")
    for path, name in (
        (f"/atelier/studies/{study}/trials.csv", "größe-漢-1-trials.csv"),
        (f"/atelier/studies/{study}/trials/0/attempts.csv", "größe-漢-1-trial-0-attempts.csv"),
        (f"/csv/{study}", "größe-漢--1.csv"),  # optuna-dashboard's own, which leaves signs out
    ):
        response = client.get(path)
        assert read_csv(response)
        assert response.headers["Content-Disposition"].endswith(f"; filename*=UTF-8''{quote(name)}")
    plain = client.get(f"/csv/{shown.study}")
    assert plain.headers["Content-Disposition"] == 'attachment; filename="secret-name.csv"'
    assert len(read_csv(plain)) == len(MIXED)
    assert client.get("/csv/999").status_code == 404


def test_nobody_gets_a_table_without_a_login(shown):
    for page in ("/trials.csv", "/workers.csv", "/epochs.csv", "/trials/0/attempts.csv"):
        assert shown.app.test_client().get(f"/atelier/studies/{shown.study}{page}").status_code == 401
    assert shown.app.test_client().get("/atelier/studies.csv").status_code == 401


def test_who_logs_out_twice_is_asked_to_log_in(shown):
    client = shown.app.test_client()
    client.post("/login", data={"name": "vera", "password": PASSWORD})
    for _ in range(2):
        response = client.post("/logout", follow_redirects=True)
        assert response.status_code == 200
        assert "<h1>Atelier</h1>" in response.text


@pytest.mark.parametrize(
    "target", ["/logout", "/csv/1", "/atelier/studies.csv", "/atelier/studies/1/trials.csv?state=failed"]
)
def test_a_login_ends_at_a_page(shown, target):
    data = {"name": "vera", "password": PASSWORD, "next": target}
    response = shown.app.test_client().post("/login", data=data, follow_redirects=True)
    assert response.request.path == "/atelier/"


@pytest.mark.parametrize("path", ["/nope", "/csv/abc", "/csv/99", "/artifacts/1/2/3", "/logout"])
def test_who_goes_to_what_there_is_not_gets_a_page_of_ours(shown, path):
    response = shown.by("vera").get(path, headers={"Accept": "text/html"})
    assert response.status_code == 404
    assert "<h1>" in response.text
    assert 'href="/atelier/"' in response.text


def test_what_is_asked_for_stays_in_the_form(shown):
    page = f"/atelier/studies/{shown.study}"
    assert '<option value="nope" selected>nope' in shown.by("vera").get(f"{page}/compare?by=nope").text
    assert 'name="rows" value="5"' in shown.by("vera").get(f"{page}?rows=5").text


def test_the_right_password_without_cookies_is_explained(shown):
    client = shown.app.test_client(use_cookies=False)
    data = {"name": "vera", "password": PASSWORD, "next": f"/atelier/studies/{shown.study}"}
    response = client.post("/login", data=data, follow_redirects=True)
    assert response.status_code == 401
    assert "this browser keeps no cookies of localhost" in response.text
    assert f'value="/atelier/studies/{shown.study}"' in response.text  # the next attempt leads there
    # Who logs in by the link meets the same.
    tokens = []
    link = OneTimeLink(tokens.append)
    client = make_app(shown.connections, Accounts(Path("nowhere")), b"k" * 32, link).test_client(
        use_cookies=False
    )
    response = client.get(f"/login?token={tokens[0]}", follow_redirects=True)
    assert "this browser keeps no cookies of localhost" in response.text
    # And who comes by http, where the session is for https.
    client = make_app(shown.connections, shown.accounts, b"k" * 32, https=True).test_client(
        use_cookies=False
    )
    response = client.post("/login", data=data, follow_redirects=True)
    assert "for https only" in response.text


def test_times_have_their_zone(shown):
    text = shown.by("vera").get("/atelier/").text
    times = re.findall(r"<time datetime=\"([^\"]*)\">(.*?)</time>", text)
    assert times
    for exact, read in times:
        assert exact.endswith("+00:00")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", read)
    assert len(times) == text.count('class="card"')


def test_the_log_says_its_zone():
    code = (
        "import logging; from search.cli import main\ntry: main(['--help'])\nfinally: logging.error('x')"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stderr
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} ERROR x\n", said)


def test_every_page_has_one_heading_with_the_whole_name(shown):
    name = "a name of forty characters and then some more of them"
    study = fill(shown.engine, ["complete"], name=name)
    for page in ("", "/curves", "/compare", "/trials/0"):
        text = shown.by("vera").get(f"/atelier/studies/{study}{page}").text
        [heading] = re.findall(r"<h1>(.*?)</h1>", text, re.S)
        assert name in heading
    assert f'title="{name}"' in text  # where the head of the page cuts it


def test_states_have_words_of_their_own(shown):
    study, client = shown.study, shown.by("vera")
    words = {
        "failed": "failed: ValueError: x",
        "running": "running, resumed (attempt 2)",
        "waiting": "waiting to go on, after: SIGTERM",
        "pruned": "pruned after 6 epochs",
    }
    page = client.get(f"/atelier/studies/{study}").text
    for state, said in words.items():
        assert f'title="{said}' in page or f'title="{state}: {said}' in page
    assert "interrupted, given back" in client.get(f"/atelier/studies/{study}/trials/3").text


@pytest.fixture(scope="module")
def hollow(shown):
    """A study without trials, and one whose trials have no epochs."""
    empty = fill(shown.engine, [], name="empty", max_trials=3)
    return empty, fill(shown.engine, ["waiting", "running"], epochs=0, name="bare")


@pytest.mark.parametrize("page", PAGES)
def test_a_study_without_trials_and_one_whose_trials_have_no_epochs(shown, hollow, page):
    (empty, bare), client = hollow, shown.by("vera")
    expected = 404 if "/trials/" in page else 200
    assert client.get(f"/atelier/studies/{empty}{page}").status_code == expected
    assert client.get(f"/atelier/studies/{bare}{page}").status_code == 200
    assert client.get(f"/dashboard/studies/{empty}").status_code == 200
    assert client.get(f"/api/studies/{empty}").status_code == 200


def test_a_curve_that_diverged_is_drawn_as_far_as_it_goes(app, engine):
    study = fill(engine, ["pruned"])
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE atelier.epoch SET val_loss = 'NaN', train_loss = 'Infinity'"))
    client = log_in(app, "vera")
    for page in ("", "/curves?smooth=50", "/compare", "/trials/0"):
        text = client.get(f"/atelier/studies/{study}{page}").text
        assert "NaN" not in text
        assert "Infinity" not in text


EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'


def test_names_and_reasons_cannot_inject(app, engine, home):
    log = home / "slurm" / "<b>.log"
    log.parent.mkdir()
    log.write_text(EVIL)
    study = fill(engine, MIXED, name=EVIL, log=str(log))
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE atelier.attempt SET reason = :text"), {"text": EVIL})
        connection.execute(
            sa.text("UPDATE atelier.worker SET host = :text, gpu = :text"), {"text": EVIL}
        )
        named = sa.text("UPDATE atelier.study SET attributes = jsonb_set(attributes, '{0,name}', :text)")
        connection.execute(named, {"text": json.dumps("</script>" + EVIL)})
    client = log_in(app, "vera")
    for page in ("/atelier/", *(f"/atelier/studies/{study}{page}" for page in PAGES)):
        text = client.get(page).text
        assert "<script>alert" not in text
        assert "<img src=x" not in text
        assert (
            "onerror" not in re.sub(r"&#34;|&quot;|\\u0022", "", text)
            or "&lt;img" in text
            or "\\u003c" in text
        )


def test_a_log_outside_our_home_is_not_shown(app, engine, home, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.log"
    secret.write_text("top secret")
    (home / "link.log").symlink_to(secret)
    client = log_in(app, "vera")
    for number, log in enumerate([str(secret), str(home / "link.log"), str(home / "dashboard.json")]):
        study = fill(engine, ["complete"], name=f"s{number}", log=log)
        text = client.get(f"/atelier/studies/{study}/trials/0").text
        assert "top secret" not in text
        assert "argon2" not in text
        assert "cannot be read from here" in text


def test_a_study_that_is_deleted_while_its_pages_are_open(app, engine):
    study = fill(engine, ["complete"])
    client = log_in(app, "vera")
    assert client.get(f"/api/studies/{study}").status_code == 200
    assert log_in(app, "ed").delete(f"/api/studies/{study}", json={}).status_code == 204
    for path in (*(f"/atelier/studies/{study}{page}" for page in PAGES), f"/csv/{study}"):
        response = client.get(path)
        assert response.status_code == 404, path
        assert "no such study" in response.text.lower() or "not found" in response.text.lower()
    time.sleep(2.1)  # optuna-dashboard's own cache
    assert client.get(f"/api/studies/{study}").status_code == 404


def test_our_pages_are_found_without_the_last_slash(shown):
    answer = shown.by("vera").get("/atelier")
    assert (answer.status_code, answer.headers["Location"]) == (308, "http://localhost/atelier/")


@pytest.mark.parametrize("number", ["999", "2147483648", "9" * 5000, "0" * 5000 + "999", "١" * 12])
def test_numbers_of_nothing_are_not_found(shown, number):
    client = shown.by("ed")
    for path in (
        *(f"/atelier/studies/{number}{page}" for page in ("", "/curves", "/compare", "/trials/0")),
        *(
            f"/atelier/studies/{shown.study}/trials/{number}",
            f"/api/studies/{number}",
            f"/artifacts/1/{number}/ab",
        ),
    ):
        assert client.get(path).status_code == 404, path
    assert client.delete(f"/api/studies/{number}", json={}).status_code == 404
    assert client.post(f"/api/trials/{number}/tell", json={"state": "Fail"}).status_code == 404


def test_what_has_not_changed_is_not_sent_again(shown):
    study, client = shown.study, shown.by("vera")
    first = client.get(f"/atelier/studies/{study}/curves")
    again = client.get(
        f"/atelier/studies/{study}/curves", headers={"If-None-Match": first.headers["ETag"]}
    )
    assert again.status_code == 304


def test_a_restart_of_the_database_is_an_answer_not_an_error(home, give_data, monkeypatch):
    monkeypatch.delenv("ATELIER_DATABASE_URL", raising=False)
    server = EmbeddedPostgres(give_data(home / "own"))
    monkeypatch.setenv("ATELIER_HOME", str(home / "own"))
    server.start()
    engine = database.connect()
    study = fill(engine, MIXED)
    Accounts().put("vera", "viewer", PASSWORD)
    app = make_app(connect_roles(), Accounts(), b"k" * 32)
    app.test_client_class = Client
    client = log_in(app, "vera")
    paths = [f"/atelier/studies/{study}", "/api/studies", f"/api/studies/{study}", "/dashboard"]
    before = [client.get(path).status_code for path in paths]
    server.stop()
    down = [client.get(path, headers=HTML) for path in paths[:3]]
    server.start()
    after = [client.get(path).status_code for path in paths]
    server.stop()
    assert before == after == [200] * 4
    assert [response.status_code for response in down[:2]] == [503, 503]
    assert down[2].status_code in (200, 503)  # from optuna-dashboard's cache
    assert "asks again by itself" in down[0].text


class Statements:
    """Counts what an engine executes."""

    def __init__(self, engine):
        self.count = 0
        sa.event.listen(engine, "before_cursor_execute", self._one)

    def _one(self, *_):
        self.count += 1


@pytest.fixture(scope="module")
def small_and_large(shown):
    """Studies of 3 and of 200 trials."""
    return [fill(shown.engine, ["complete"] * size, epochs=3, name=f"of {size}") for size in (3, 200)]


@pytest.mark.parametrize("page", ["", "/curves", "/compare", "/trials/0"])
def test_the_number_of_statements_does_not_grow_with_the_trials(shown, small_and_large, page):
    client = shown.by("vera")
    counts = []
    for study in small_and_large:
        statements = Statements(shown.connections["viewer"].engine)
        assert client.get(f"/atelier/studies/{study}{page}").status_code == 200
        counts.append(statements.count)
    # The second counter's engine has the first one's listener too; each counts for itself.
    assert counts[0] == counts[1] <= 13


def test_the_picture_of_a_curve_is_shown_by_optuna_dashboard(app, engine, home):
    from storage.status import TrialRow

    storage = open_storage(engine)
    study = fill(engine, ["waiting"])
    [trial] = storage.get_all_trials(study)
    worker = ledger.Ledger(engine, storage, study)
    worker.register()
    claim = worker.claim()
    with engine.connect() as connection:
        epochs = (
            connection.execute(sa.text("SELECT * FROM atelier.epoch ORDER BY epoch")).mappings().all()
        )
    picture = attach_curve("filled", TrialRow(0, "complete"), list(epochs))
    worker.finish(claim, "complete", 0.5, artifact=picture)
    [meta] = optuna.artifacts.get_all_artifact_meta(storage.get_trial(trial._trial_id), storage=storage)
    client = log_in(app, "vera")
    file = client.get(f"/artifacts/{study}/{trial._trial_id}/{meta.artifact_id}")
    assert (file.status_code, file.mimetype, file.data[:4]) == (200, "image/png", b"\x89PNG")
    assert "Access-Control-Allow-Origin" not in file.headers
    assert file.headers["Content-Security-Policy"].startswith("sandbox")
    assert meta.artifact_id in client.get(f"/atelier/studies/{study}/trials/0").text
    assert list(Path(home / "artifacts").iterdir()) == [home / "artifacts" / meta.artifact_id]
    (home / "artifacts" / meta.artifact_id).unlink()
    assert client.get(f"/artifacts/{study}/{trial._trial_id}/{meta.artifact_id}").status_code == 404
    assert log_in(app, "ed").delete(f"/api/studies/{study}", json={}).status_code == 204


def test_an_artifact_that_was_deleted_is_not_shown(app, engine):
    study = fill(engine, ["waiting"])
    client = log_in(app, "ed")
    [trial] = open_storage(engine).get_all_trials(study)
    file = {"file": "data:text/plain;base64,aGk=", "filename": "note.txt"}
    added = client.post(f"/api/artifacts/{study}/{trial._trial_id}", json=file)
    assert added.status_code == 201
    page = f"/atelier/studies/{study}/trials/0"
    assert "note.txt" in client.get(page).text
    path = f"/api/artifacts/{study}/{trial._trial_id}/{added.json['artifact_id']}"
    assert client.delete(path).status_code == 204
    assert "note.txt" not in client.get(page).text


def test_an_account_with_a_role_that_there_is_not_is_said_at_once(home):
    (home / "dashboard.json").write_text('{"eve": {"role": "admin", "hash": "x"}}')
    with pytest.raises(AccountError, match="'admin'; allowed are viewer and editor"):
        Accounts().all()


def test_the_session_key_is_whole_and_stays(home):
    key = session_key()
    assert len(key) == 32
    assert session_key() == key
    assert [path.name for path in home.iterdir()] == ["dashboard.key"]


ROLES = {"vera": "vera, viewer", "ed": "ed, editor"}


def test_many_at_once(app, engine):
    """Threads share the connections; nobody waits for ever or gets another's role."""
    study = fill(engine, MIXED)
    answers = []

    def look(name):
        client = log_in(app, name)
        for _ in range(5):
            answers.append(ROLES[name] in client.get(f"/atelier/studies/{study}").text)
            answers.append(client.get("/api/studies").status_code == 200)

    threads = [threading.Thread(target=look, args=(name,)) for name in ["vera", "ed"] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [True] * 80

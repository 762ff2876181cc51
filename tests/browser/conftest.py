"""Real Chromium before the dashboard: the application in a thread of ours, or `atelier dashboard`.

Screenshots go to screenshots/, which git ignores.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import sqlalchemy as sa
from werkzeug.serving import WSGIRequestHandler, make_server

from dashboards.web.accounts import session_key
from dashboards.web.app import make_app
from dashboards.web.server import connect_roles
from storage import database
from tests.conftest import PASSWORD, copied_database, free_port, give_accounts

SCREENSHOTS = Path(__file__).parents[2] / "screenshots"
PATIENCE = 180  # seconds, of a browser and of us, on a machine that has other things to do


@pytest.fixture(scope="session")
def chromium():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    SCREENSHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


class Quiet(WSGIRequestHandler):
    """Writes no line for each request."""

    def log_request(self, *_):
        pass


class Thread:
    """The dashboard's whole application, served by threads of this process.

    What is left out is `atelier dashboard` itself: its start and gunicorn.
    """

    def __init__(self, accounts):
        self._connections = connect_roles()
        app = make_app(self._connections, accounts, session_key())
        self._server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
        self.base = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05])
        self._thread.start()

    def stop(self):
        """Nobody listens any more."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for role in self._connections.values():
            role.engine.dispose()


@pytest.fixture
def dashboard(accounts, engine):
    """The dashboard of the test's database."""
    thread = Thread(accounts)
    yield thread
    thread.stop()


class Process:
    """A running `atelier dashboard`."""

    def __init__(self, log, port, options, scheme="http", prefix=""):
        self.log, self.base = log, f"{scheme}://127.0.0.1:{port}{prefix}"
        command = [sys.executable, "-m", "atelier_command", "dashboard", "--port", str(port), *options]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | {"PYTHONPATH": os.getcwd()}
            )

    def wait(self, context=None):
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"{self.base}/healthz", timeout=5, context=context).close()
                return self
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.2)

    @property
    def links(self):
        return re.findall(r"dashboard: (\S+)", self.log.read_text())

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()


@pytest.fixture
def start(tmp_path, engine):
    """Starts `atelier dashboard` on the test's database."""
    processes = []

    def begin(*options, context=None, **more):
        process = Process(tmp_path / f"dashboard-{len(processes)}.log", free_port(), options, **more)
        processes.append(process)
        return process.wait(context)

    yield begin
    for process in processes:
        process.stop()


@contextmanager
def browsing(chromium, **options):
    """A page whose script must not fail."""
    options = {"viewport": {"width": 1440, "height": 900}, "ignore_https_errors": True} | options
    context = chromium.new_context(**options)
    context.set_default_timeout(1000 * PATIENCE)
    with opened(context) as page:
        yield page
    context.close()


@contextmanager
def opened(context):
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert errors == []


@pytest.fixture
def page(chromium):
    with browsing(chromium) as page:
        yield page


class Site(NamedTuple):
    """A dashboard that the tests of a module share."""

    base: str
    engine: sa.Engine
    home: Path
    cookies: dict  # of a viewer


@pytest.fixture(scope="module")
def site(chromium, server, template, tmp_path_factory):
    home = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_HOME", str(home))
        patch.setenv("ATELIER_DATABASE_URL", copied_database(server, "site", template))
        engine = database.connect()
        thread = Thread(give_accounts(home, patch))
        with browsing(chromium) as page:
            log_in(page, thread, "vera")
            page.wait_for_url(f"{thread.base}/atelier/")
            cookies = page.context.storage_state()
        yield Site(thread.base, engine, home, cookies)
        thread.stop()
        engine.dispose()


@pytest.fixture(scope="module")
def browser_of_site(chromium, site):
    """A viewer's browser, which keeps what it has loaded: the script that draws is large."""
    with browsing(chromium, storage_state=site.cookies) as page:
        yield page.context


@pytest.fixture
def seen(browser_of_site):
    """A viewer's page of the shared dashboard."""
    with opened(browser_of_site) as page:
        yield page


def log_in(page, server, name, password=PASSWORD):
    page.goto(f"{server.base}/login")
    page.fill("input[name=name]", name)
    page.fill("input[name=password]", password)
    page.click("button")


def wait_until(condition):
    # Not Playwright's wait_for_function, whose eval our pages' policy forbids.
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def drawn(page):
    """Wait until every plot of the page is drawn; returns how many there are."""
    every = "[...document.querySelectorAll('.plot')].every((place) => place.querySelector('.main-svg'))"
    wait_until(lambda: page.evaluate(every))
    return page.locator(".plot").count()


def ask_again(page):
    """What a page does every few seconds, at once."""
    wait_until(lambda: page.evaluate("!busy"))
    page.evaluate("follow()")

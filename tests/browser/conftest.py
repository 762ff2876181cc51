"""Real Chromium before a real `atelier dashboard`. Screenshots go to screenshots/, which git ignores."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import PASSWORD, free_port

SCREENSHOTS = Path(__file__).parents[2] / "screenshots"


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


class Server:
    """A running `atelier dashboard`."""

    def __init__(self, log, port, options, scheme="http", prefix=""):
        self.log, self.base = log, f"{scheme}://127.0.0.1:{port}{prefix}"
        command = [sys.executable, "-m", "search", "dashboard", "--port", str(port), *options]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | {"PYTHONPATH": os.getcwd()}
            )

    def wait(self, context=None):
        deadline = time.monotonic() + 60
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
        assert self.process.wait(30) == 0, self.log.read_text()


@pytest.fixture
def start(tmp_path, engine):
    """Starts a dashboard on the test's database."""
    servers = []

    def begin(*options, context=None, **more):
        server = Server(tmp_path / f"dashboard-{len(servers)}.log", free_port(), options, **more)
        servers.append(server)
        return server.wait(context)

    yield begin
    for server in servers:
        server.stop()


@pytest.fixture
def page(chromium):
    """A page whose script must not fail."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900}, ignore_https_errors=True)
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


def log_in(page, server, name, password=PASSWORD):
    page.goto(f"{server.base}/login")
    page.fill("input[name=name]", name)
    page.fill("input[name=password]", password)
    page.click("button")

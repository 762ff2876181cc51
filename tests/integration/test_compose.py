"""docker-compose.yml against the specification's schema, and each service against the real programs.

There is no Docker here: what a container would run is run as it stands, on the embedded PostgreSQL.
"""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
import yaml
from sqlalchemy.engine import make_url
from typer.testing import CliRunner

from dashboards.web.accounts import Accounts
from search.cli import app
from storage import backup, database
from tests.conftest import PASSWORD, empty_database, free_port
from tests.studies import fill

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]


def test_the_specifications_schema_accepts_it_and_refuses_a_mistake(tmp_path):
    def check(path):
        command = [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.compose-spec",
            path,
        ]
        return subprocess.run(command, capture_output=True, text=True)

    result = check(COMPOSE)
    assert result.returncode == 0, result.stdout
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(COMPOSE.read_text().replace("healthcheck:", "helthcheck:", 1))
    assert check(broken).returncode != 0


def test_no_password_stands_in_it_and_no_port_is_open_to_others():
    assert set(SERVICES) == {"postgres", "dashboard", "backup"}
    for service in SERVICES.values():
        for name, value in service["environment"].items():
            if "PASS" in name:
                assert name.endswith("FILE")
                assert value.startswith("/run/secrets/")
            assert not re.search(r"//[^@/]*:[^@/]*@", value)  # user:password@
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert "image" not in service or re.search(r":\d+\.\d+$", service["image"])  # pinned


def test_what_the_image_copies_is_enough_to_install_and_start(tmp_path):
    lines = SERVICES["dashboard"]["build"]["dockerfile_inline"].splitlines()
    image = tmp_path / "image"
    image.mkdir()
    for line in lines:
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            assert "secrets" not in sources
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, image / target)
                else:
                    shutil.copy(ROOT / source, image / target)
    packages, project = [line.split()[1:] for line in lines if line.startswith("RUN pip ")]
    assert (image / packages[packages.index("--requirement") + 1]).is_file()
    # This Python has the packages that the first of them installs.
    where = ["--target", tmp_path / "installed", "--no-index", "--quiet"]
    subprocess.run([sys.executable, "-m", *project, *where], cwd=image, check=True)
    [entry] = [line.split(maxsplit=1)[1] for line in lines if line.startswith("ENTRYPOINT")]
    [program] = json.loads(entry)
    variables = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    for words in (
        ["--version"],
        [*SERVICES["dashboard"]["command"], "--help"],
        ["db", "backup", "--help"],
    ):
        command = [tmp_path / "installed/bin" / program, *words]
        started = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert started.returncode == 0, started


@pytest.fixture
def environment(tmp_path, engine):
    """A service's environment, with this test's places for the container's."""

    def make(service):
        here = {
            "ATELIER_DATABASE_URL": engine.url.set(drivername="postgresql").render_as_string(),
            "ATELIER_HOME": str(tmp_path / "home"),
            "PGPASSFILE": str(tmp_path / "pgpass"),
            "FOLDER": str(tmp_path / "backup"),
        }
        kept = {name: here.get(name, value) for name, value in SERVICES[service]["environment"].items()}
        return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | kept

    return make


def test_the_dashboard_starts_as_the_service_starts_it(environment, engine, tmp_path, monkeypatch):
    fill(engine, ["complete"])
    service, port = SERVICES["dashboard"], free_port()
    variables = environment("dashboard")
    words = [str(port) if word == "8080" else word for word in service["command"]]
    command = [sys.executable, "-m", "atelier_command", *words]
    # Without a user it must not start: the file's head says to add one first.
    refused = CliRunner(env=variables).invoke(app, words)
    assert refused.exit_code == 2
    assert "atelier user add" in refused.output
    monkeypatch.setenv("ATELIER_HOME", variables["ATELIER_HOME"])
    Accounts().put("ed", "editor", PASSWORD)
    log = tmp_path / "log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=variables, stdout=output, stderr=output)
    health = [word.replace("8080", str(port)) for word in service["healthcheck"]["test"]]
    assert health[:2] == ["CMD", "python"]
    deadline = time.monotonic() + 60
    try:
        while subprocess.run([sys.executable, *health[2:]], capture_output=True).returncode != 0:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline
    finally:
        server.terminate()
    assert server.wait(30) == 0


def test_the_backup_service_writes_what_can_be_restored(
    environment, engine, tmp_path, server, monkeypatch
):
    study = fill(engine, ["complete", "pruned"], epochs=5)
    variables = environment("backup")
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    folder = Path(variables["FOLDER"])
    folder.mkdir()
    old = folder / "atelier-20200101-000000.tar"
    old.touch()
    os.utime(old, (0, 0))
    words = [word.replace("$$", "$") for word in SERVICES["backup"]["entrypoint"]]
    process = subprocess.Popen(
        words, env=variables, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    said = process.stdout.readline()
    while old.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # bash, and the sleep that it waits for
    process.wait()
    process.stdout.close()
    [archive] = folder.iterdir()  # nothing half-written is there
    assert said.startswith(f"{archive}: ")
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "other"))
    other = database.connect(make_url(empty_database(server, "from_compose")))
    backup.restore(other, archive)
    with other.connect() as connection:
        query = sa.text("SELECT count(*) FROM atelier.epoch WHERE study_id = :i")
        assert connection.scalar(query, {"i": study}) == 6
    other.dispose()


def test_the_commands_in_its_head_work(environment, tmp_path):
    head = COMPOSE.read_text().split("x-atelier:")[0]
    [line] = [line for line in head.splitlines() if "user add" in line]
    words = shlex.split(line.split("dashboard", 1)[1], comments=True)
    assert words[:2] == ["user", "add"]
    (tmp_path / "password").write_text("correct horse battery\n")
    words += ["--password-file", str(tmp_path / "password")]
    result = CliRunner(env=environment("dashboard")).invoke(app, words)
    assert (result.exit_code, result.output) == (0, "NAME may log in as editor\n")
    secrets = [line.strip("# ") for line in head.splitlines() if "secrets/" in line]
    subprocess.run(["bash", "-euc", "\n".join(secrets)], cwd=tmp_path, check=True)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "secrets").iterdir()} == {0o600}
    entry = (tmp_path / "secrets" / "pgpass").read_text()
    assert re.fullmatch(r"postgres:5432:atelier:atelier:[0-9a-f]{48}\n", entry)

"""A home that was moved, copied or restored elsewhere: what is in it is found where it is now."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from typer.testing import CliRunner

from dashboards.web.pages import log_tail
from search.cli import app
from storage import database
from storage.embedded import EmbeddedPostgres
from storage.network import Network
from storage.paths import RunFolder, path_from_record, path_to_record
from storage.status import read_status
from storage.studies import study_entry
from storage.tables import WORKERS
from storage.workers import read_attempts
from tests.conftest import free_port
from tests.studies import fill

RUN = "runs/tiny-20260101-120000/logs/worker-1.log"


@pytest.mark.parametrize(
    "path", [RUN, "slurm/12_3.log", "slurm/a/b.log", "cache/x", "artifacts/y", "data", "runs/ü & %/z"]
)
def test_what_is_below_the_home_moves_along(path, home, tmp_path, monkeypatch):
    text = path_to_record(home / path)
    assert text == f"./{path}"
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "elsewhere"))
    assert path_from_record(text) == tmp_path / "elsewhere" / path


def test_a_home_of_two_names_is_one(home, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "link"))
    assert path_to_record(home / RUN) == path_to_record(tmp_path / "link" / RUN) == f"./{RUN}"


@pytest.mark.parametrize("path", ["/data/Fashion", "/home/me/x.log", "timm", "none", "nowhere/a"])
def test_what_is_elsewhere_stays_as_it_is(path, home):
    assert path_from_record(path) == Path(path)
    assert str(path_from_record(path_to_record(Path(path)))) == path


@pytest.mark.parametrize(
    ("recorded", "found"),
    [
        (f"/former/.atelier/{RUN}", RUN),
        (f"/a/runs/b-20250101-000000/logs/{RUN}", RUN),
        ("/shared/me/.atelier/slurm/12_3.log", "slurm/12_3.log"),
        ("/former/slurm/train-7.log", "slurm/train-7.log"),
        ("/former/.atelier/runs/a%20b-20260101-120000/logs/worker-12.log", None),
    ],
)
def test_what_earlier_versions_recorded_is_found(recorded, found, home):
    path = home / (found or Path(*Path(recorded).parts[3:]))
    assert path_from_record(recorded) == Path(recorded)  # it is not here
    path.parent.mkdir(parents=True)
    path.touch()
    assert path_from_record(recorded) == path


def test_searches_have_logs_of_their_own_and_show_them_wherever_they_are(
    atelier, engine, home, tmp_path, monkeypatch
):
    for number in (1, 2):
        atelier("search", "study.toml", "--workers", "1", "--set", f"study.max_trials={number}")
    entry = study_entry(engine, "tiny")
    with engine.connect() as connection:
        recorded = connection.scalars(sa.select(WORKERS.c.log).order_by(WORKERS.c.log)).all()
    logs = RunFolder(entry.name, entry.created).logs
    names = [f"./{path.relative_to(home)}" for path in sorted(logs.iterdir())]
    assert len(names) == 2
    assert recorded == names

    def check(where):
        monkeypatch.setenv("ATELIER_HOME", str(where))
        attempts = read_attempts(engine, entry.study_id)
        assert [one.log for one in attempts] == [str(where / name) for name in names]
        for one in attempts:
            log = log_tail(one.log)  # as the page of a trial has it
            assert f"trial {one.trial}: attempt 1" in log
            assert log.count(": attempt") == 1
        said = atelier("logs", "tiny", "--trial", "0").output.replace("\n", "")
        assert f"{where / names[0]}:" in said
        assert f"{where / names[1]}" not in said

    check(home)
    shutil.copytree(home, tmp_path / "copied home")
    check(tmp_path / "copied home")
    moved = home.rename(tmp_path / "moved home")
    check(moved)
    with engine.begin() as connection:  # as earlier versions did
        connection.execute(
            sa.update(WORKERS).values(log=sa.func.replace(WORKERS.c.log, "./", f"{home}/"))
        )
    check(moved)


def test_a_log_that_is_not_here_is_said(engine, home):
    fill(engine, ["complete"], name="s", log=f"/former/{RUN}")
    result = CliRunner().invoke(app, ["logs", "s"])
    assert f"/former/{RUN} is not here" in " ".join(result.output.split())


def test_a_worker_that_is_at_work_shows_where_its_log_is_now(engine, home):
    study_id = fill(engine, ["running"], name="s", log=f"./{RUN}")
    [worker] = read_status(engine, study_id, "s").workers
    assert worker.log == str(home / RUN)
    shown = json.loads(CliRunner().invoke(app, ["status", "s", "--json"]).output)
    assert shown["workers"][0]["log"] == str(home / RUN)


def test_data_and_weights_below_the_home_move_along(
    atelier, engine, home, demo, study_text, tmp_path, monkeypatch
):
    shutil.copytree(demo, home / "data")
    atelier(
        "search", "study.toml", "--workers", "1", "--set", "study.max_trials=1", "--data", home / "data"
    )
    assert study_entry(engine, "tiny").settings["places"] == {"data": "./data", "weights": "none"}
    home.rename(tmp_path / "new")
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "new"))
    atelier("export", "tiny", "-o", "moved.toml")
    assert f'data = "{tmp_path}/new/data"' in (tmp_path / "moved.toml").read_text()
    atelier("replay", "tiny", "--trial", "0")


@pytest.mark.parametrize("earlier", [False, True])
def test_a_server_that_listens_is_found_from_a_home_that_has_moved(
    earlier, home, give_data, tmp_path, monkeypatch
):
    port = free_port()
    EmbeddedPostgres(give_data(home)).listen("127.0.0.1", port, tls=False)
    EmbeddedPostgres(home).stop()
    written = (home / "database.url").read_text()
    assert "passfile=database.pass" in written
    if earlier:
        own = make_url(written.strip()).update_query_dict({"passfile": str(home / "database.pass")})
        (home / "database.url").write_text(own.render_as_string())
    new = home.rename(tmp_path / "new")
    server = EmbeddedPostgres(new)
    assert server.network.url.query["passfile"] == str(new / "database.pass")
    server.start()
    monkeypatch.setenv("ATELIER_HOME", str(new))
    database.connect().dispose()
    server.stop()


def test_the_certificate_of_a_home_that_has_moved(tmp_path):
    network = Network(tmp_path)
    network.set_up("127.0.0.1", 5432, tls=True)
    assert "sslrootcert=database.crt" in (tmp_path / "database.url").read_text()
    assert network.url.query["sslrootcert"] == str(tmp_path / "database.crt")
    assert network.url.query["sslmode"] == "verify-full"


# Two commands at once.


def test_no_log_has_the_name_of_another_in_any_home(home, tmp_path, monkeypatch):
    runs = RunFolder("s", datetime(2026, 1, 1, tzinfo=UTC))
    logs = [runs.new_log() for _ in range(4)]
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "restored"))
    logs += [RunFolder("s", datetime(2026, 1, 1, tzinfo=UTC)).new_log() for _ in range(4)]
    assert len({path.name for path in logs}) == 8
    assert all(path_from_record(path_to_record(path)) == path for path in logs[4:])

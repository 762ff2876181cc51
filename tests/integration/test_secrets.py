"""A password in the database's URL is shown by no command, whether it works or fails."""

import pytest
from typer.testing import CliRunner

from search.cli import app
from storage import database
from tests.conftest import all_verbs

CANARY = "canary-7f3a9c"
runner = CliRunner()
SETTINGS = ("study.max_trials=1", "study.first=[]", "study.rungs=[1]", "train.epochs=2")
SHORT = [word for setting in (*SETTINGS, "space.batch_size=[4]") for word in ("--set", setting)]

# Every verb, as a user would type it beside study.toml and with a study `tiny` on record.
VERBS = {
    "init": ["study.toml", "--local", "-o", "other.toml"],
    "example": ["fashion.toml"],
    "search": ["study.toml", "--workers", "1"],
    "worker": ["study.toml"],
    "confirm": ["tiny", "--show"],
    "submit": ["study.toml", "--dry-run"],
    "stop": ["tiny"],
    "logs": ["tiny"],
    "status": ["tiny", "--json"],
    "trials": ["tiny", "--csv", "trials.csv"],
    "efficiency": ["tiny"],
    "verify": ["tiny"],
    "doctor": ["study.toml"],
    "plot": ["tiny", "-o", "history.html"],
    "report": ["tiny", "-o", "pages"],
    "dashboard": ["--host", "0.0.0.0"],
    "export": ["tiny", "-o", "best.toml"],
    "train": ["best.toml", "--epochs", "1", "--stretch-warmup"],
    "replay": ["tiny", "--trial", "0"],
    "predict": ["best-run", "-o", "prediction.zip"],
    "export-model": ["best-run", "-o", "exported"],
    "model": ["study.toml"],
    "data check": ["nowhere"],
    "data demo": ["demo", "--train", "12", "--val", "6"],
    "demo": ["demo", "--workers", "1", "-o", "demo.toml", *SHORT],
    "db start": [],
    "db stop": [],
    "db status": [],
    "db check": [],
    "db upgrade": [],
    "db prune": ["tiny"],
    "db backup": ["atelier.tar"],
    "db restore": ["atelier.tar"],
    "user add": ["vera", "--password-file", "password.txt"],
    "user list": [],
    "user remove": ["vera"],
}
BROKEN = [
    f"postgresql://atelier:{CANARY}@127.0.0.1:9/atelier",
    f"postgresql://atelier@127.0.0.1:9/atelier?password={CANARY}",
    f"postgresql://atelier:{CANARY}@127.0.0.1:port/atelier",
    f"postgresql://atelier:{CANARY}@127.0.0.1/atelier?sslmode=verify-full&sslrootcert=/nowhere",
    f"postgresql://atelier:{CANARY}@/atelier?no_such_option=1",
    f"mysql://atelier:{CANARY}@127.0.0.1/atelier",
    f"atelier:{CANARY}",
]


def run_all(caplog):
    """Returns how each verb ended. No word that it says may hold the canary."""
    codes = {}
    for verb, words in VERBS.items():
        result = runner.invoke(app, [*verb.split(), *words])
        assert CANARY not in result.output, verb
        assert CANARY not in repr(result.exception), verb
        codes[verb] = result.exit_code
    assert CANARY not in caplog.text
    return codes


@pytest.fixture
def study(study_text, tmp_path, home, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(database, "PATIENCE", 0)
    profile = "\n[slurm.tuning]\nmemory = '1G'\n"
    (tmp_path / "study.toml").write_text(study_text.replace("epochs = 3", "epochs = 2") + profile)
    (tmp_path / "password.txt").write_text(CANARY)


def test_no_verb_is_left_out():
    assert all_verbs() == set(VERBS)


def test_nothing_that_works_shows_the_password(study, engine, tmp_path, caplog, monkeypatch):
    url = engine.url.set(password=CANARY).render_as_string(hide_password=False)
    assert CANARY in url
    monkeypatch.setenv("ATELIER_DATABASE_URL", url)
    codes = run_all(caplog)
    # An external server is not started or stopped from here, and no array reaches a socket; a home in
    # main memory is wrong; there is no confirmation, no dataset `nowhere`, no account for a public
    # address, and no empty database.
    failed = {
        "db restore",
        "confirm",
        "dashboard",
        "doctor",
        "predict",
        "export-model",
        "data check",
        "db start",
        "db stop",
        "submit",
    }
    assert {verb for verb, code in codes.items() if code != 0} <= failed
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "password.txt":
            assert CANARY.encode() not in path.read_bytes(), path


def test_no_jobs_script_is_made_that_would_hold_the_password(study, monkeypatch):
    for credentials, code in ((f"atelier:{CANARY}", 2), ("atelier", 0)):
        url = f"postgresql://{credentials}@db.example.org/atelier?sslmode=verify-full"
        monkeypatch.setenv("ATELIER_DATABASE_URL", url)
        result = runner.invoke(app, ["submit", "study.toml", "--dry-run"])
        assert result.exit_code == code
        assert CANARY not in result.output


@pytest.mark.parametrize("url", BROKEN)
def test_nothing_that_fails_shows_the_password(study, url, caplog, monkeypatch):
    monkeypatch.setenv("ATELIER_DATABASE_URL", url)
    codes = run_all(caplog)
    assert codes["status"] == codes["search"] == codes["worker"] == codes["db check"] == 2

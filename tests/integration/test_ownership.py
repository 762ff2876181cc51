"""What lies in a home is its owner's alone: whoever has looked into it, and whatever the umask was."""

import multiprocessing
import os
import pwd
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dashboards.web.accounts import session_key
from search.cli import app
from storage import database
from storage.embedded import EmbeddedPostgres
from storage.ownership import as_owner, let_pass
from storage.paths import artifacts, make_private
from tests.conftest import PASSWORD
from tests.studies import fill

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")
USER, OTHER = "daemon", "games"  # on every Debian


def give(folder, user):
    entry = pwd.getpwnam(user)
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)
    let_pass(folder)


def owners(folder):
    return {pwd.getpwuid(path.lstat().st_uid).pw_name for path in [folder, *folder.rglob("*")]}


def open_to_others(folder):
    """What others may read, write or enter, of a home that they may pass through if it is root's."""
    paths = {path: stat.S_IMODE(path.lstat().st_mode) for path in folder.rglob("*")}
    return {path: f"{mode:o}" for path, mode in paths.items() if mode & 0o077}


def act(user, words, answers):
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    result = CliRunner().invoke(app, words)
    with_error = result.exception if not isinstance(result.exception, SystemExit) else None
    answers.put((result.exit_code, f"{result.output}{with_error or ''}"))


def run_as(user, *words):
    """What a verb says to another user, and its exit code."""
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    process = fork.Process(target=act, args=(user, words, answers))
    process.start()
    answer = answers.get(timeout=60)
    process.join()
    return answer


@pytest.fixture
def users_home(home, give_data, tmp_path, monkeypatch, study_text):
    """A home of USER's with a study `s` in its server, which does not run; root's folder is another."""
    monkeypatch.delenv("ATELIER_DATABASE_URL", raising=False)
    work = tmp_path / "roots"
    work.mkdir()
    (work / "study.toml").write_text(study_text)
    (work / "password.txt").write_text(PASSWORD)
    monkeypatch.chdir(work)
    give_data(home)
    home.chmod(0o700)
    server = EmbeddedPostgres(home)
    server.acquire()
    fill(engine := database.connect(), ["complete", "pruned", "failed"], name="s")
    engine.dispose()
    server.release()
    assert not server.is_running()
    give(home, USER)
    yield home
    server.stop()


LOOKING = [
    ["status", "s"],
    ["trials", "s"],
    ["logs", "s"],
    ["plot", "s", "-o", "history.html", "--kind", "history"],
    ["db", "status"],
    ["db", "check"],
    ["db", "backup", "atelier.tar"],
    ["db", "prune", "s", "--dry-run"],
    ["db", "start"],
    ["user", "add", "vera", "--password-file", "password.txt"],
    ["user", "list"],
    ["user", "remove", "vera"],
    ["db", "stop", "--force"],
    ["stop", "s"],
]


@AS_ROOT
def test_a_home_that_root_has_looked_into_is_as_it_was_for_its_owner(users_home):
    for words in LOOKING:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.output)
        assert owners(users_home) == {USER}, words
        assert not open_to_others(users_home), words
    assert session_key(users_home)
    with as_owner(users_home):
        make_private(artifacts())
    assert owners(users_home) == {USER}
    assert {path.owner() for path in Path.cwd().iterdir()} == {"root"}  # what was asked for is root's
    assert os.geteuid() == 0
    for words in (["status", "s"], ["db", "check"], ["user", "list"]):
        assert run_as(USER, *words)[0] == 0
    assert owners(users_home) == {USER}


@AS_ROOT
def test_root_leaves_a_server_to_its_owner_who_uses_it(users_home):
    assert run_as(USER, "db", "start")[0] == 0
    assert CliRunner().invoke(app, ["status", "s"]).exit_code == 0
    assert EmbeddedPostgres(users_home).is_running()
    assert run_as(USER, "status", "s")[0] == 0
    # This process, which is root's command, has not ended yet.
    assert run_as(USER, "db", "stop", "--force") == (0, "stopped\n")
    assert owners(users_home) == {USER}


@AS_ROOT
@pytest.mark.parametrize(
    "words",
    [
        ["search", "study.toml"],
        ["worker", "study.toml"],
        ["replay", "s", "--trial", "0"],
        ["db", "restore", "atelier.tar"],
    ],
)
def test_root_does_no_work_in_anothers_home(words, users_home):
    assert CliRunner().invoke(app, ["db", "backup", "atelier.tar"]).exit_code == 0
    before = sorted(users_home.rglob("*"))
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    line = result.output.splitlines()[-1]
    assert f"{users_home} is the home of the user {USER}" in line
    assert f"sudo -u {USER}" in line
    assert sorted(users_home.rglob("*")) == before
    assert owners(users_home) == {USER}


@AS_ROOT
def test_data_in_a_folder_of_roots_are_their_owners(users_home):
    """As where a container or an administrator has made the folder."""
    os.chown(users_home, 0, 0)
    users_home.chmod(0o777)
    assert CliRunner().invoke(app, ["status", "s"]).exit_code == 0
    assert owners(users_home / "postgres") == {USER}
    assert run_as(USER, "status", "s")[0] == 0


@AS_ROOT
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o777])
def test_a_third_user_is_told_whose_it_is_and_makes_nothing(users_home, mode):
    users_home.chmod(mode)
    before = sorted(users_home.rglob("*"))
    for words in (["status", "s"], ["db", "start"], ["db", "status"], ["user", "add", "vera"]):
        code, said = run_as(OTHER, *words)
        assert code != 0, said
        if words[0] != "user":  # which asks for a password first
            assert len(said.splitlines()) == 1
            assert f"is the home of the user {USER}" in said
        assert sorted(users_home.rglob("*")) == before
    assert owners(users_home) == {USER}


@AS_ROOT
def test_who_may_not_come_near_a_home_is_told_in_one_line(users_home):
    users_home.parent.chmod(0o700)
    try:
        for words in (["status", "s"], ["db", "start"], ["db", "status"], ["logs", "s"]):
            code, said = run_as(OTHER, *words)
            assert (code, len(said.splitlines())) == (2, 1), said
            assert "Permission denied" in said
    finally:
        users_home.parent.chmod(0o755)


@AS_ROOT
def test_what_the_owners_files_name_is_run_with_the_owners_rights_alone(users_home):
    """A home may name programs of its owner's; root must not lend them more than that user has."""
    programs = users_home.parent / "programs"
    programs.mkdir()
    said = users_home / "said"
    for name in ("initdb", "pg_ctl", "postgres"):
        (programs / name).write_text(f"#!/bin/sh\nid -u >> {said}; id -G >> {said}; exit 1\n")
        (programs / name).chmod(0o755)
    (users_home / "postgres.programs").write_text(f"{programs}\n")
    give(users_home, USER)
    let_pass(programs / "initdb")
    groups = os.getgroups()
    assert CliRunner().invoke(app, ["status", "s"]).exit_code == 2
    entry = pwd.getpwnam(USER)
    assert said.read_text().split() == [str(entry.pw_uid), str(entry.pw_gid)]
    assert os.getgroups() == groups


def test_a_search_under_any_umask_opens_nothing_to_others(study_text, tmp_path, monkeypatch):
    monkeypatch.delenv("ATELIER_DATABASE_URL", raising=False)
    new = tmp_path / "new" / "home"
    monkeypatch.setenv("ATELIER_HOME", str(new))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.toml").write_text(study_text)
    before = os.umask(0)
    try:
        for words in (
            ["search", "study.toml", "--workers", "1", "--set", "study.max_trials=1"],
            ["user", "list"],
            ["plot", "tiny", "-o", "x.html", "--kind", "history"],
            ["trials", "tiny", "--csv", "x.csv"],
            ["db", "backup", "x.tar"],
        ):
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, result.output
        assert session_key()
        assert list(new.glob("runs/*/logs/worker-*.log"))
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert not open_to_others(new)
    assert stat.S_IMODE(new.stat().st_mode) & 0o066 == 0  # to be passed through by root's server
    # What is for people is as open as they say.
    for name in ("best.toml", "x.html", "x.csv"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666, name
    assert stat.S_IMODE((tmp_path / "x.tar").stat().st_mode) == 0o600  # it holds all there is

"""Faults that are planted one by one: `atelier doctor` names each of them, and what to do."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil
import pynvml
import pytest
import sqlalchemy as sa
import time_machine
import tomli_w
from typer.testing import CliRunner

from search.cli import app
from search.doctor import files
from search.doctor import node as doctors_node
from search.doctor.check import State, ask
from search.doctor.look import about_jobs
from search.slurm.granted import take_granted
from search.study import open_study
from search.toml_file import load_study_file
from storage import database
from storage.network import VIEWER
from storage.optuna_storage import optuna_storage
from storage.tables import STUDIES
from tests.chaos.harness import small_disk
from tests.conftest import as_superuser
from tests.integration.test_database import IGNORED, on_server, pooler  # noqa: F401  # fixtures
from tests.integration.test_embedded import NO_LOCKS
from tests.studies import fill
from trainer.dataset import read_dataset

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a disk or to give files away")
PROFILE = {"tuning": {"gpus": 0, "memory": "1G", "time": 30}}

# As SLURM 22.05 printed it, without most of its lines.
CONFIGURATION = """\
Configuration data as of 2026-11-28T09:30:00
AccountingStorageType   = accounting_storage/none
ClusterName             = atelier
JobRequeue              = 1
KillWait                = 30 sec
MaxArraySize            = 1001
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at vm is UP
"""
SILENT = "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)"
SLURM = ("sbatch", "squeue", "scontrol", "sinfo")
QUOTA = """\
Disk quotas for user me (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
     /dev/vdb  {used}  100000  110000  {grace}   10       0       0
"""


@pytest.fixture
def put(tmp_path):
    """Puts a command where `doctor` finds it, and no others: neither SLURM's, nor `quota`."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(name, lines):
        (folder / name).write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\n{lines}\n")
        (folder / name).chmod(0o755)

    return write


@pytest.fixture
def slurm(put, tmp_path):
    """Puts SLURM's commands into PATH, of a cluster with these settings."""

    def answer(before="", after=""):
        (tmp_path / "configuration").write_text(CONFIGURATION.replace(before, after))
        put("scontrol", f"cat {tmp_path}/configuration")
        for name in ("sbatch", "squeue", "sinfo"):
            put(name, "exit 0")

    return answer


@pytest.fixture
def doctor(tmp_path, study_text, prepared_url, home, put, monkeypatch):
    """Runs `atelier doctor` beside a study.toml; returns its checks by name."""
    (tmp_path / "study.toml").write_text(study_text + "\n" + tomli_w.dumps({"slurm": PROFILE}))
    monkeypatch.chdir(tmp_path)

    def checks(*words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(tmp_path / "bin"))
            result = CliRunner().invoke(app, ["doctor", *words, "--json"], catch_exceptions=False)
        answer = json.loads(result.stdout)
        assert answer["version"] == 1
        rows = answer["checks"]
        assert result.exit_code == any(row["state"] == "wrong" for row in rows)
        for row in rows:
            assert {"where", "name", "state", "found", "next"} <= row.keys()
            assert row["state"] in {*State}
            assert row["state"] != "wrong" or row["next"], row
        return {row["name"]: row for row in rows}

    return checks


def assert_says(check, state, *words):
    said = f"{check['found']} next: {check['next']}"
    assert check["state"] == state, said
    for word in words:
        assert word in said


@pytest.fixture
def on_disk(monkeypatch):
    """A home on a disk: other tests have theirs in main memory."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        monkeypatch.setenv("ATELIER_HOME", folder)
        yield Path(folder)


def test_nothing_is_wrong_where_all_is_well(doctor, on_disk):
    checks = doctor("study.toml")
    assert {row["state"] for row in checks.values()} <= {"ok", "note", "not asked"}
    for name in ("python", "packages", "ulimit", "home", "write", "locks", "database", "clock"):
        assert checks[name]["state"] == "ok"
    for name in ("weights", "dataset", "db schema", "db roles", "db sessions", "db way"):
        assert checks[name]["state"] == "ok"
    assert_says(checks["slurm"], "not asked", "no SLURM here")
    assert_says(checks["quota"], "not asked", "no command `quota`")
    assert_says(checks["record"], "not asked", "no study 'tiny' yet")
    assert abs(checks["clock"]["seconds"]) < 5
    assert not any(on_disk.iterdir())
    shown = CliRunner().invoke(app, ["doctor", "study.toml"])
    assert shown.exit_code == 0
    assert len(shown.stdout.splitlines()) >= len(checks)


def test_a_study_is_asked_about_by_its_name_too(doctor, engine, tmp_path):
    file = load_study_file(tmp_path / "study.toml", ["study.max_trials=7"])
    open_study(file, engine, optuna_storage(engine), read_dataset(file.shared.data))
    (tmp_path / "study.toml").write_text("of another study")
    (tmp_path / "tiny").write_text("a file of that name is not meant")
    checks = doctor("tiny")
    assert_says(checks["study"], "ok", "tiny on record")
    for name in ("weights", "dataset", "record"):
        assert checks[name]["state"] == "ok"
    assert_says(doctor("tiny", "--data", "nowhere")["dataset"], "wrong", "no dataset at nowhere")
    for words, found, remedy in (
        (["tini"], "no study 'tini' in the database, which has: tiny", "name one of these"),
        (["tiny", "--set", "train.epochs=2"], "--set goes with a study file", "has its settings"),
        (["none.toml"], "none.toml: no such file", ""),
    ):
        assert_says(doctor(*words)["study"], "wrong", found, remedy)


# The database.


def test_a_port_that_is_closed(doctor, monkeypatch):
    monkeypatch.setenv("ATELIER_DATABASE_URL", "postgresql://atelier:secret@127.0.0.1:9/atelier")
    check = doctor()["database"]
    assert_says(check, "wrong", "cannot reach", "Connection refused", "is ATELIER_DATABASE_URL right?")


@pytest.mark.parametrize(
    ("statement", "name", "state", "words"),
    [
        (
            "ALTER DATABASE {name} SET default_transaction_read_only = on",
            "db writes",
            "wrong",
            ["takes no writes", "give the primary"],
        ),
        (
            "UPDATE atelier.alembic_version SET version_num = '0007'",
            "db schema",
            "wrong",
            ["schema 0007", "atelier db upgrade"],
        ),
        (
            "UPDATE atelier.alembic_version SET version_num = '9999'",
            "db schema",
            "wrong",
            ["does not know", "newer Atelier"],
        ),
        ("DROP TABLE atelier.epoch CASCADE", "db tables", "wrong", ["atelier.epoch", "db restore"]),
        (
            "REVOKE UPDATE ON trials FROM atelier_worker",
            "db tables",
            "wrong",
            ["no UPDATE on public.trials", "atelier db upgrade"],
        ),
    ],
)
def test_a_database_that_is_not_as_it_should_be(
    doctor, engine, database_name, server, statement, name, state, words
):
    with engine.begin() as connection:
        connection.exec_driver_sql(statement.format(name=database_name))
    assert_says(doctor("study.toml")[name], state, *words)


def test_a_role_that_this_user_may_not_take(doctor, on_server):  # noqa: F811
    on_server(f"REVOKE {VIEWER} FROM atelier", undo=[f"GRANT {VIEWER} TO atelier"])
    assert_says(doctor()["db roles"], "note", "all rights", f"GRANT {VIEWER} TO atelier")


def test_an_encoding_that_cannot_hold_every_name(doctor, server, database_name):
    as_superuser(
        server,
        f"DROP DATABASE {database_name}",
        f"CREATE DATABASE {database_name} OWNER atelier TEMPLATE template0 ENCODING 'SQL_ASCII' "
        "LOCALE 'C'",
    )
    checks = doctor()
    assert_says(checks["db encoding"], "wrong", "SQL_ASCII", "ENCODING 'UTF8'")
    assert_says(checks["db schema"], "note", "none yet", "makes the tables")


def test_a_pooler_that_drops_settings(doctor, engine, pooler):  # noqa: F811
    pooler(IGNORED, "pool_mode = transaction")
    checks = doctor()
    assert_says(checks["db way"], "wrong", "through a pooler", "connect to PostgreSQL itself")
    assert_says(checks["db statement_timeout"], "wrong", "'0' instead of '1min'")
    assert "db sessions" not in checks


def test_a_pooler_whose_server_gives_the_settings(
    doctor,
    engine,
    pooler,  # noqa: F811
    on_server,  # noqa: F811
    database_name,
):
    settings = database.WORK.settings.items()
    on_server(*(f"ALTER DATABASE {database_name} SET {name} = '{value}'" for name, value in settings))
    pooler(IGNORED, "pool_mode = transaction")
    checks = doctor()
    assert checks["db sessions"]["state"] == "ok"
    assert_says(checks["db way"], "wrong", "through a pooler", "connect to PostgreSQL itself")


def test_a_pooler_that_refuses_us(doctor, engine, pooler):  # noqa: F811
    pooler()
    check = doctor()["database"]
    assert_says(check, "wrong", "unsupported startup parameter", "not through a pooler")


@pytest.mark.parametrize(("seconds", "words"), [(90, "ahead of"), (-90, "behind")])
def test_a_clock_that_is_off(doctor, seconds, words):
    with time_machine.travel(time.time() + seconds):
        check = doctor()["clock"]
    assert_says(check, "wrong", words, "NTP")
    assert abs(check["seconds"] - seconds) < 5


@pytest.mark.parametrize(
    ("values", "state", "words"),
    [
        ({"optuna_version": "5.0.99"}, "wrong", ["Optuna 5.0.99", "the same version on every machine"]),
        ({"trunks": {"cpu of a, torch 2.9.0+cu126": "1"}}, "note", ["torch 2.9.0", "the same version"]),
        (
            {"settings": sa.text('settings || \'{"images": {"reader": 999}}\'')},
            "wrong",
            ["version 999 of the reader of images", "go on with the Atelier that made it"],
        ),
    ],
)
def test_versions_that_are_not_those_of_the_workers(doctor, engine, values, state, words):
    fill(engine, ["complete"], name="tiny")
    assert doctor("study.toml")["record"]["state"] == "ok"
    with engine.begin() as connection:
        connection.execute(sa.update(STUDIES).values(values))
    assert_says(doctor("study.toml")["record"], state, *words)


# The folders.


@ROOT
def test_a_disk_that_is_full(doctor, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", "1M") as disk:
        monkeypatch.setenv("ATELIER_HOME", str(disk))
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        (disk / "large").write_bytes(bytes(900_000))
        checks = doctor()
    assert_says(checks["write"], "wrong", "No space left on device", "set ATELIER_HOME")
    assert_says(checks["room"], "wrong", "0.0 GB free", "free some")
    assert_says(checks["disk"], "wrong", "in main memory (tmpfs)", "set ATELIER_HOME")
    assert_says(checks["tmpdir"], "wrong", "0.0 GB free", "set TMPDIR")


@ROOT
def test_a_home_that_cannot_be_written(doctor, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", "1M") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        monkeypatch.setenv("ATELIER_HOME", str(disk))
        checks = doctor()
    assert_says(checks["write"], "wrong", "Read-only file system", "set ATELIER_HOME")


@ROOT
def test_a_home_of_another_user(doctor, home):
    os.chown(home, 12345, 12345)
    assert_says(doctor()["home"], "wrong", "the home of the user #12345", "set ATELIER_HOME")


def test_a_home_that_others_may_write(doctor, home):
    home.chmod(0o777)
    assert_says(doctor()["home"], "note", "mode 777", f"chmod go-w {home}")


def test_a_home_that_is_a_file(doctor, home, monkeypatch):
    (home / "file").touch()
    monkeypatch.setenv("ATELIER_HOME", str(home / "file"))
    assert_says(doctor()["home"], "wrong", "is a file", "set ATELIER_HOME")


def test_a_file_system_without_locks_and_without_syncs(doctor, home):
    before, _, start = NO_LOCKS.partition("from search.cli")
    without_sync = before.replace('"x86_64": 73, "aarch64": 32', '"x86_64": 74, "aarch64": 82')
    assert without_sync != before
    result = subprocess.run(
        [sys.executable, "-c", f"{before}{without_sync}from search.cli{start}", "doctor", "--json"],
        capture_output=True,
        text=True,
    )
    checks = {row["name"]: row for row in json.loads(result.stdout)["checks"]}
    assert_says(checks["locks"], "wrong", f"of {home} has no locks (flock: ", "set ATELIER_HOME")
    assert_says(checks["write"], "wrong", "cannot be written and synced", "set ATELIER_HOME")


@pytest.mark.parametrize(
    ("used", "grace", "code", "state", "words"),
    [
        ("105000*", "6days", 1, "wrong", ["exceeded on /dev/vdb", "delete files"]),
        ("5000", "", 0, "ok", ["kept on /dev/vdb"]),
    ],
)
def test_a_quota(doctor, put, used, grace, code, state, words):
    put("quota", f"echo '{QUOTA.format(used=used, grace=grace)}'; exit {code}")
    assert_says(doctor()["quota"], state, *words)


def test_a_quota_that_cannot_be_asked(doctor, put):
    put("quota", "echo 'quota: error while getting quota from server' >&2; exit 1")
    assert_says(doctor()["quota"], "not asked", "error while getting quota")


# The machine.


@pytest.mark.parametrize(
    ("limit", "least", "words"),
    [
        (resource.RLIMIT_NOFILE, 600, ["600 open files (ulimit -n)", "ulimit -n 1024"]),
        (resource.RLIMIT_FSIZE, 10**8, ["files of 100.0 MB (ulimit -f)", "ulimit -f unlimited"]),
    ],
)
def test_a_low_limit(doctor, limit, least, words):
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (least, before[1]))
    try:
        assert_says(doctor()["ulimit"], "wrong", *words)
        [line] = [line for line in about_jobs() if "ulimit" in line]
    finally:
        resource.setrlimit(limit, before)
    assert line.startswith("warning: ulimit: this shell allows")


def test_little_memory(doctor, monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1000")
    check = doctor()["memory"]
    monkeypatch.undo()
    take_granted()
    assert_says(check, "note", "1.0 granted by SLURM", "ask for more")


def test_a_torchvision_of_another_torch(doctor, tmp_path, monkeypatch):
    folder = tmp_path / "site" / "torchvision-0.1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Name: torchvision\nVersion: 0.1\nRequires-Dist: torch==1.0.0\n")
    monkeypatch.syspath_prepend(folder.parent)
    assert_says(doctor()["packages"], "wrong", "torchvision is for torch 1.0.0", "make venv")


def test_a_driver_that_is_too_old_and_a_gpu_that_torch_cannot_use(doctor, monkeypatch):
    """The GPU is NVML's word only; torch really tries it."""
    for name, answer in {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "gpu",
        "nvmlDeviceGetName": "NVIDIA A100",
        "nvmlDeviceGetMemoryInfo": pynvml.c_nvmlMemory_t(total=40 * 10**9),
        "nvmlSystemGetDriverVersion": "470.57.02",
    }.items():
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)
    monkeypatch.setenv("ATELIER_DEVICE", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    checks = doctor()
    assert_says(
        checks["driver"], "wrong", "470.57.02", "needs driver 5", "install driver 5", "older CUDA"
    )
    assert_says(checks["gpus"], "wrong", "NVIDIA A100 (40 GB)", "has no GPU that torch can use")


# SLURM.


def test_some_commands_are_absent(doctor, slurm, tmp_path):
    slurm()
    (tmp_path / "bin" / "squeue").unlink()
    assert_says(doctor()["slurm"], "wrong", "no squeue on this machine", "use a login node")


@pytest.mark.parametrize(
    ("said", "state", "words"),
    [
        (SILENT, "wrong", ["Unable to contact slurm controller", "whether slurmctld is up"]),
        (
            "scontrol: fatal: Could not establish a configuration source",
            "not asked",
            ["no cluster", "SLURM_CONF"],
        ),
        ("Invalid credential", "wrong", ["Invalid credential", "report"]),
    ],
)
def test_a_slurm_that_does_not_answer(doctor, slurm, put, said, state, words):
    slurm()
    put("scontrol", f"echo '{said}' >&2; exit 1")
    assert_says(doctor("study.toml")["slurm"], state, *words)


@pytest.mark.parametrize(
    ("before", "after", "name", "state", "words"),
    [
        ("= 1001", "= 5", "arrays", "wrong", ["up to 4", "--array 0-4"]),
        ("= 1001", "= 1", "arrays", "wrong", ["no arrays here", "ask the site"]),
        ("= 1001", "= many", "arrays", "not asked", ["'many' is not understood"]),
        ("JobRequeue              = 1", "JobRequeue = 0", "requeue", "note", ["same submit again"]),
        ("JobRequeue              = 1", "", "requeue", "not asked", ["not understood"]),
        ("KillWait                = 30", "KillWait = 5", "signals", "note", ["5 s", "longer `warning`"]),
        ("SLURM_VERSION", "VERSION", "slurm", "wrong", ["not understood"]),
        ("ClusterName             = atelier", "ClusterName = x", "slurm", "ok", ["22.05.8, cluster x"]),
        ("accounting_storage/none", "(null)", "accounting", "ok", ["none is needed"]),
    ],
)
def test_what_a_cluster_allows(doctor, slurm, before, after, name, state, words):
    slurm(before, after)
    assert_says(doctor()[name], state, *words)


def test_a_job_that_sbatch_would_refuse(doctor, slurm, put, monkeypatch):
    slurm()
    remote = "postgresql://atelier@db.example.org/atelier?sslmode=verify-full"
    assert_says(doctor("study.toml")["job"], "wrong", "on a compute node is another machine", "reach")
    monkeypatch.setenv("ATELIER_DATABASE_URL", remote)
    checks = doctor("study.toml", "--profile", "other")
    assert_says(checks["job"], "wrong", "the file has tuning", "add [slurm.other]")


@pytest.fixture
def node(doctor, slurm, put, home, tmp_path, monkeypatch):
    """Runs `atelier doctor --on-node` where its job is in this state, and has written this log."""
    monkeypatch.setattr(doctors_node, "POLL_SECONDS", 0)
    monkeypatch.setattr(doctors_node, "LOG_SECONDS", 0)
    slurm()

    def ask_on_node(state, log=None):
        (tmp_path / "log").write_text(log or "")
        write = f"cp {tmp_path}/log {home}/slurm/doctor-7.log" if log else "true"
        put("sbatch", f'cat > {tmp_path}/script; [ "$1" = --test-only ] || {{ {write}; echo 7; }}')
        put("squeue", f"echo '7|{state}|0:0|0|1|7|N/A|'")
        put("sinfo", "hostname -s")  # the cluster is this machine, so its nodes reach this database
        return doctor("study.toml", "--on-node")

    return ask_on_node


def test_a_node_that_is_not_as_this_machine(doctor, node, tmp_path, monkeypatch):
    rows = [*doctor("study.toml").values()]
    for row in rows:
        row["where"] = "node1"
        if row["name"] == "packages":
            row["found"] = row["found"].replace("torch 2", "torch 1")
        if row["name"] == "clock":
            row["seconds"] += 100
        if row["name"] == "database":
            row |= {"state": "wrong", "found": "cannot reach it from here", "next": "open port 5432"}
    log = f"module: loaded\n{json.dumps({'version': 1, 'checks': rows})}\n"
    checks = node("RUNNING", log)
    assert checks["database"]["where"] == "on node1 (job 7)"
    assert_says(checks["database"], "wrong", "cannot reach it from here", "open port 5432")
    assert_says(checks["same packages"], "wrong", "the node has atelier", "torch 1", "the same .venv")
    assert_says(checks["same clock"], "wrong", "100.0 s ahead", "NTP")
    assert checks["same python"]["state"] == checks["same folder"]["state"] == "ok"
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    shown = CliRunner().invoke(app, ["doctor", "study.toml", "--on-node"]).stdout
    assert "on node1 (job 7): as here in " in shown
    assert shown.count("db schema") == 1
    script = (tmp_path / "script").read_text()
    assert "#SBATCH --time=3\n" in script
    assert " doctor --json " in script
    assert "hush" not in script


@pytest.mark.parametrize(
    ("state", "log", "name", "expected", "words"),
    [
        ("COMPLETED", None, "same folder", "wrong", ["its log is not here", "that the nodes share"]),
        ("FAILED", "bash: no python\n", "node", "wrong", ["(FAILED)", "no python", "read /"]),
        ("TIMEOUT", '{"version": 1, "che', "node", "wrong", ["(TIMEOUT)"]),
        ("COMPLETED", '{"version": 2, "checks": []}', "node", "wrong", ['"version": 2']),
        ("PENDING", None, "node", "not asked", ["has not answered", "scancel 7"]),
    ],
)
def test_a_node_that_does_not_answer(node, monkeypatch, state, log, name, expected, words):
    monkeypatch.setattr(doctors_node, "PATIENCE", 0.2)
    assert_says(node(state, log)[name], expected, *words)


def test_a_node_that_cannot_reach_the_database(doctor, slurm):
    slurm()
    check = doctor("study.toml", "--on-node")["node"]
    assert_says(check, "wrong", "on a compute node is another machine", "the nodes reach")


def test_a_node_needs_a_profile(doctor):
    ended = CliRunner().invoke(app, ["doctor", "--on-node"])
    assert ended.exit_code == 2
    assert "--on-node needs a study, whose profile" in ended.output


# The study's files.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no such file", "give a file's path with --weights"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["a Git LFS pointer (run: git lfs pull)"]),
        (b"<!doctype html>", ["an HTML page (of a download that failed?)"]),
    ],
)
def test_weights_that_are_none(doctor, tmp_path, content, words):
    if content is not None:
        (tmp_path / "w.pth").write_bytes(content)
    assert_says(doctor("study.toml", "--weights", "w.pth")["weights"], "wrong", *words)


def test_weights_that_are_not_in_the_cache(doctor, slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    words = ("study.toml", "--weights", "timm", "--set", "train.backbone='resnet10t.c3_in1k'")
    assert_says(doctor(*words)["weights"], "note", "hf download timm/resnet10t.c3_in1k")
    slurm()  # whose nodes may have no internet
    assert_says(doctor(*words)["weights"], "wrong", "hf download timm/resnet10t.c3_in1k")


def test_a_dataset_that_is_not_there(doctor):
    check = doctor("study.toml", "--data", "nowhere")["dataset"]
    assert_says(check, "wrong", "no dataset at nowhere", "--data")


@ROOT
def test_an_image_that_may_not_be_read(doctor, demo, tmp_path, on_disk):
    data = shutil.copytree(demo, on_disk / "data")
    on_disk.chmod(0o755)
    image = data / read_dataset(data).split("val").paths[0]
    image.chmod(0)
    file = load_study_file(tmp_path / "study.toml").with_paths(str(data), None)
    os.seteuid(65534)
    try:
        [check] = ask("dataset", partial(files.dataset, file))
    finally:
        os.seteuid(0)
    assert_says(asdict(check), "wrong", f"cannot use {image}: Permission denied", "another")


def test_a_study_file_that_is_none(doctor, tmp_path):
    (tmp_path / "study.toml").write_text("[study]\n")
    checks = doctor("study.toml")
    assert_says(checks["study"], "wrong", "study.toml")
    assert checks["db schema"]["state"] == "ok"


# What holds of every check.


def test_a_check_that_raises_ends_no_other(doctor, monkeypatch):
    def boom(**_):
        raise RuntimeError("boom at postgresql://me:hush@host")

    monkeypatch.setattr(psutil, "disk_partitions", boom)
    checks = doctor()
    assert_says(checks["home"], "not asked", "RuntimeError: boom at", "me:***@host", "report")
    assert checks["tmpdir"]["state"] == "ok"
    assert checks["db schema"]["state"] == "ok"


def test_passwords_are_taken_out_of_what_other_programs_say():
    said = (
        "postgresql://me:hush@h/d?password=hush&x=1 and host=h password=hush PASSWORD = 'hush hush' "
        "postgresql://me:hush/@hush@h?passwd=hush at 12:30@node1"
    )
    [check] = ask("x", lambda: (_ for _ in ()).throw(KeyError(said)))
    assert "hush" not in f"{check.found}{check.next}"
    for kept in ("x=1", "postgresql://me:***@h", "12:30@node1"):
        assert kept in check.found

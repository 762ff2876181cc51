"""The rendered job script: what it asks for, and that no name can break out of it."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from search.cli import app
from search.errors import InputError
from search.profile import SlurmProfile
from search.slurm.script import render_script

GOLDEN = """\
#!/bin/bash
#SBATCH --job-name=atelier
#SBATCH --array=0-7%4
#SBATCH --output=/home/%A_%a.log
#SBATCH --qos=q_amsai
#SBATCH --cpus-per-task=7
#SBATCH --gres=gpu:1
#SBATCH --mem=12G
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
trap '' USR2  # SLURM's warning must not end a worker that has just started
export A=b
cd /work || exit 1
exec atelier worker study.toml
"""
PROFILE = SlurmProfile(qos="q_amsai", cpus=7, gpus=1)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("08:00:00", 28800),
        ("1-0", 86400),
        ("1-02:30", 95400),
        ("1-00:00:05", 86405),
        ("UNLIMITED", None),
    ],
)
def test_a_warning_has_to_come_before_the_end(time, seconds):
    if seconds is None:
        SlurmProfile(time=time)
        return
    SlurmProfile(time=time, warning=seconds - 1)
    with pytest.raises(ValueError, match="leaves nothing of time"):
        SlurmProfile(time=time, warning=seconds)


def test_the_script_of_the_reports_profile():
    command = ["atelier", "worker", "study.toml"]
    script = render_script(PROFILE, "0-7%4", command, Path("/work"), {"A": "b"}, "/home/%A_%a.log")
    assert script == GOLDEN


def test_a_profile_can_say_how_to_set_up_and_what_else_to_ask_for():
    profile = SlurmProfile(
        partition="gpu",
        account="lab",
        gpus=0,
        memory="2G",
        time="1-00",
        warning=60,
        setup=["module load cuda", "source env/bin/activate"],
        options=["--constraint=a100", "--nice=100"],
    )
    script = render_script(profile, "3", ["run"], Path("/w"), {}, "log")
    assert script.splitlines()[1:] == [
        "#SBATCH --job-name=atelier",
        "#SBATCH --array=3",
        "#SBATCH --output=log",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --cpus-per-task=1",
        "#SBATCH --mem=2G",
        "#SBATCH --time=1-00",
        "#SBATCH --signal=B:USR2@60",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --constraint=a100",
        "#SBATCH --nice=100",
        "trap '' USR2  # SLURM's warning must not end a worker that has just started",
        "module load cuda",
        "source env/bin/activate",
        "cd /w || exit 1",
        "exec run",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "a'b",
        'a"b',
        "$(touch x)",
        "`touch x`",
        "a;touch x",
        "-rf",
        "é\u2603",
        "a\\b",
        "*",
        "$HOME",
    ],
)
def test_any_name_reaches_the_worker_as_it_is(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    show = [
        sys.executable,
        "-c",
        "import os, sys; print([os.getcwd(), os.environ['A'], sys.argv[1]])",
        name,
    ]
    script = render_script(PROFILE, "0", show, folder, {"A": name}, "log")
    result = subprocess.run(
        ["bash"], input=script, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert result.stdout.strip() == repr([str(folder), name, name])
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("array", ["", "x", "0-7 --wrap=x", "0-7%", "0-7%4\n#SBATCH --x"])
def test_a_wrong_array_is_refused(array):
    with pytest.raises(InputError, match="allowed is SLURM's form"):
        render_script(PROFILE, array, [], Path(), {}, "log")


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        (None, [], "reachable on this machine only"),
        ("postgresql://u:secret@h/d?sslmode=disable", [], "holds a password"),
        ("postgresql://u@h/d?password=secret&sslmode=disable", [], "holds a password"),
        ("postgresql://u@h/d", [], "may be unencrypted"),
        ("postgresql://u@localhost/d", [], "on a compute node is another machine"),
        ("postgresql://u@127.0.0.1/d", [], "on a compute node is another machine"),
        ("postgresql://u@/d?host=/tmp/socket", [], "on a compute node is another machine"),
        ("postgresql:///d", [], "a local socket"),
        ("postgresql://u@h/d?sslmode=disable", ["--profile", "other"], "has tuning, final"),
    ],
)
def test_what_a_node_could_not_use_is_refused(url, options, expected, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # not on the node of a one-machine cluster
    monkeypatch.delenv("ATELIER_DATABASE_URL", raising=False)
    if url:
        monkeypatch.setenv("ATELIER_DATABASE_URL", url)
    study = Path(__file__).parents[2] / "studies" / "fashion.toml"
    result = CliRunner().invoke(app, ["submit", str(study), "--dry-run", *options])
    assert result.exit_code == 2
    assert expected in result.output
    assert "secret" not in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_dry_run_prints_a_script_that_bash_accepts(monkeypatch):
    monkeypatch.setenv("ATELIER_DATABASE_URL", "postgresql://u@h/d?sslmode=disable")
    study = Path(__file__).parents[2] / "studies" / "fashion.toml"
    result = CliRunner().invoke(app, ["submit", str(study), "--dry-run", "--profile", "final"])
    assert result.exit_code == 0
    assert "--qos=q_dmsai" in result.output
    subprocess.run(["bash", "-n"], input=result.output, text=True, check=True)


@pytest.mark.parametrize(
    ("option", "found"),
    [
        ("--array=0-3", "--array"),
        ("-a0-3", "-a0-3"),
        ("--signal=B:USR1@10", "--signal"),
        ("--time=1:00", "--time"),
        ("-N1 -t 5", "-t"),
        ("--parti=other", "--parti"),
        ("--gres=gpu:2", "--gres"),
        ("--open-mode=truncate", "--open-mode"),
        ("--output=x.log", "--output"),
        ("--wait", "--wait"),
        ("--test-only", "--test-only"),
        ("--wrap=ls", "--wrap"),
    ],
)
def test_an_option_that_clashes_with_the_script_is_refused(option, found):
    profile = SlurmProfile(partition="gpu", options=["--nice=100", option])
    with pytest.raises(InputError, match=f"^options has {found}, .*leave it out"):
        render_script(profile, "0", [], Path(), {}, "log")


@pytest.mark.parametrize(
    "option",
    ["--constraint=a100", "--exclude=node7", "--no-requeue", "--job-name=x", "--export=NONE", "-N1"],
)
def test_an_option_that_the_script_leaves_open_is_taken(option):
    script = render_script(SlurmProfile(options=[option]), "0", [], Path(), {}, "log")
    assert f"#SBATCH {option}\n" in script


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda"), ("a100:2", "cuda")])
def test_the_profile_says_what_to_train_on(gpus, device, monkeypatch):
    monkeypatch.setenv("ATELIER_DATABASE_URL", "postgresql://u@h/d?sslmode=disable")
    monkeypatch.setenv("ATELIER_DEVICE", "cpu")  # of the shell from which it is submitted
    study = Path(__file__).parents[2] / "studies" / "fashion.toml"
    words = ["submit", str(study), "--dry-run", "--set", f"slurm.tuning.gpus={gpus!r}"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    assert f"\nexport ATELIER_DEVICE={device}\n" in result.output

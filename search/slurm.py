"""SLURM: the array job that starts the workers. The only module that calls SLURM's commands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from search.study import InputError, SlurmProfile

# A warning before the wall time, in seconds; the worker finishes its epoch and releases its trial.
WARNING_SECONDS = 300
ARRAY = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*(%\d+)?")


def render_array_script(
    profile: SlurmProfile, array: str, worker: list[str], folder: Path, environment: dict[str, str]
) -> str:
    """The batch script as text; nothing is run or written. Raises InputError for a bad `array`.

    `worker` is the command of one array task, run in `folder`. It replaces the shell, so that it is
    the process that SLURM signals.
    """
    if not ARRAY.fullmatch(array):
        raise InputError(f"--array {array!r}: allowed is SLURM's form, as in 0-7%4")
    options = {
        "job-name": "atelier",
        "array": array,
        "qos": profile.qos,
        "partition": profile.partition,
        "account": profile.account,
        "cpus-per-task": profile.cpus,
        "gres": f"gpu:{profile.gpus}" if profile.gpus else None,
        "mem": profile.memory,
        "time": profile.time,
        "signal": f"B:USR2@{WARNING_SECONDS}",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    exports = [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            "#SBATCH --open-mode=append",
            *exports,
            f"cd {shlex.quote(str(folder))} || exit 1",
            f"exec {shlex.join(worker)}",
            "",
        ]
    )


def worker_command(study: Path, options: list[str]) -> list[str]:
    """What an array task runs: this Python, by its full path."""
    return [sys.executable, "-m", "search", "worker", str(study.absolute()), *options]


def job_environment(home: Path) -> dict[str, str]:
    """What the job needs to find the same study. Raises InputError if a node could not use it."""
    url = os.environ.get("ATELIER_DATABASE_URL")
    if not url:
        raise InputError(
            "the embedded database is reachable on this machine only; set ATELIER_DATABASE_URL to a "
            "PostgreSQL that the compute nodes reach"
        )
    if re.match(r"\w+(\+\w+)?://[^/@]*:[^/@]*@", url):
        raise InputError(
            "ATELIER_DATABASE_URL holds a password, which the job's script would show; "
            "put it into ~/.pgpass and leave it out of the URL"
        )
    return {"ATELIER_DATABASE_URL": url, "ATELIER_HOME": str(home)}


def submit_array(script: str, logs: Path) -> str:
    """Submit the script. Returns the job id. Raises InputError without SLURM or if it refuses."""
    logs.mkdir(parents=True, exist_ok=True)
    try:
        result = subprocess.run(
            ["sbatch", "--parsable", f"--output={logs}/%A_%a.log"],
            input=script,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except FileNotFoundError:
        raise InputError("no sbatch on this machine; run this on a login node of the cluster") from None
    if result.returncode != 0:
        raise InputError(f"sbatch refused the job: {result.stderr.strip()}")
    return result.stdout.strip().split(";")[0]

"""SLURM: the array job that starts the workers, and what SLURM knows of it.

The only module that calls SLURM's commands. Where SLURM does not answer, it is as if there were none.
"""

import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from dashboards.status import read_status
from search.exit_codes import ExitCode
from search.export import Bundle, check_origin
from search.study import InputError, SlurmProfile, StudyFile, open_study
from storage.database import configured_url, connect, database_url, home, is_local, prepare, server_host
from storage.ledger import Holder, enter_array_job, gone_here, is_slurm_job
from storage.runs import make_private
from trainer.config import TrainConfig
from trainer.dataset import read_dataset

ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%0*[1-9]\d*)?")
PATIENCE = 20  # seconds that SLURM's commands may take
# A job in one of these states has its processes; one that is COMPLETING may have them.
ALIVE = {"RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"}
# For SLURM a job has failed if its exit code is not 0. These workers have given back their trial.
RELEASED = {ExitCode.STOPPED, ExitCode.WALL_TIME}
TASK_LOG = "%A_%a.log"  # array and task


def render_script(
    profile: SlurmProfile,
    array: str | None,
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    log: str,
) -> str:
    """The batch script as text; nothing is run or written. Raises InputError for a bad `array`.

    `command` is what one array task, or the one job, runs in `folder`. It replaces the shell, so that it
    is the process that SLURM signals. `log` is the path of the log, with SLURM's %A and %a, or %j.
    """
    if array is not None and not ARRAY.fullmatch(array):
        raise InputError(f"--array {array!r}: allowed is SLURM's form, as in 0-7%4")
    options = {
        "job-name": "atelier",
        "array": array,
        "output": log,
        "qos": profile.qos,
        "partition": profile.partition,
        "account": profile.account,
        "cpus-per-task": profile.cpus,
        "gres": f"gpu:{profile.gpus}" if profile.gpus else None,
        "mem": profile.memory,
        "time": profile.time,
        "signal": f"B:USR2@{profile.warning}",
    }
    lines = [f"#SBATCH --{key}={_word(value)}" for key, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
    lines += [f"#SBATCH {option}" for option in profile.options]
    exports = [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "trap '' USR2  # SLURM's warning must not end a worker that has just started",
            *exports,
            *profile.setup,
            f"cd {shlex.quote(str(folder))} || exit 1",
            f"exec {shlex.join(command)}",
            "",
        ]
    )


def _word(value: object) -> str:
    """A value for an #SBATCH line, which sbatch splits as a shell would: by blanks and quotes."""
    text = str(value)
    if "\n" in text:
        raise InputError(f"{text!r} has a line break, which no #SBATCH line can hold; rename it")
    if re.fullmatch(r"[\w@%+=:,./-]*", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def array_script(file: StudyFile, profile: str, array: str, options: list[str]) -> str:
    """The batch script of workers for a study file, as this user would submit it from here.

    `options` are the worker's arguments, the study's path or name among them. Raises InputError.
    """
    chosen = _profile(file.slurm, profile)
    environment = {"ATELIER_DATABASE_URL": _node_url()} | _environment(file.shared)
    return _script(chosen, array, ["worker", *options], environment, TASK_LOG)


def run_script(
    config: TrainConfig, slurm: Mapping[str, SlurmProfile], profile: str, options: list[str]
) -> str:
    """The batch script of `atelier train` with these arguments. Raises InputError."""
    chosen = _profile(slurm, profile)
    return _script(chosen, None, ["train", *options], _environment(config), "train-%j.log")


def _profile(slurm: Mapping[str, SlurmProfile], name: str) -> SlurmProfile:
    if name not in slurm:
        known = ", ".join(slurm) or "none"
        raise InputError(f"--profile {name!r}: the file has {known}; add [slurm.{name}]")
    return slurm[name]


def _script(
    profile: SlurmProfile,
    array: str | None,
    arguments: list[str],
    environment: dict[str, str],
    log: str,
) -> str:
    # -P: a folder named search, where the user stands, is not this package.
    command = [sys.executable, "-P", "-m", "search", *arguments]
    path = log_pattern(log_folder(), log)
    return render_script(profile, array, command, Path.cwd(), environment, path)


def log_pattern(folder: Path, name: str) -> str:
    """The path of a log in this folder, its name with SLURM's %A and the like. Raises InputError."""
    if "\\" in str(folder):
        raise InputError(f"{folder}: SLURM writes no log to a path with a backslash; set ATELIER_HOME")
    return f"{str(folder).replace('%', '%%')}/{name}"


def log_folder() -> Path:
    """Where array tasks write their logs."""
    return home() / "slurm"


def _environment(config: TrainConfig) -> dict[str, str]:
    """What a job needs to find the same files: with no secret, for anybody may read the script."""
    given = {"ATELIER_HOME": str(home())}
    for name in ("PGPASSFILE", "HF_HOME", "HF_HUB_CACHE"):
        if value := os.environ.get(name):
            given[name] = value
    if config.weights == "timm":
        given["HF_HUB_OFFLINE"] = "1"  # they are in the cache: see `submit_study`
    return given


def _node_url() -> str:
    """The database's URL, if a compute node can use it and anybody may see it. Raises InputError."""
    text = configured_url()
    if text is None:
        raise InputError(
            "the embedded database is reachable on this machine only; let it listen with "
            "atelier db start --listen ADDRESS, or set ATELIER_DATABASE_URL (docs/cluster.md)"
        )
    url = database_url()
    if url.password is not None or "password" in url.query:
        raise InputError(
            "the database URL holds a password, which the job's script would show; "
            "put it into ~/.pgpass and leave it out of the URL"
        )
    host = server_host(url)
    if is_local(host) and not _cluster_is_this_machine():
        raise InputError(
            f"the database URL names {host or 'a local socket'}, which on a compute node is "
            "another machine; write the address that the nodes reach"
        )
    return text


def _cluster_is_this_machine() -> bool:
    nodes = _ask("sinfo", "--noheader", "--Node", "--format=%N")
    return nodes is not None and set(nodes.split()) == {socket.gethostname().split(".")[0]}


def submit_study(file: StudyFile, profile: str, array: str, options: list[str]) -> str:
    """Check what would fail in the queue, create the study if need be, submit. Returns the job id.

    Raises InputError, DatasetError, DatabaseError; then nothing was submitted.
    """
    script = array_script(file, profile, array, options)
    file.identity()  # reads the weights file
    _check_weights(file.shared)
    dataset = read_dataset(file.shared.data)
    engine = connect()
    _make_log_folder()
    submit_script(script, test_only=True)
    _, entry = open_study(file, engine, prepare(engine), dataset, lead=True)
    status = read_status(engine, entry.study_id, entry.name)
    if status.finished >= status.max_trials:
        raise InputError(
            f"study {entry.name!r} has its {status.finished} trials; raise study.max_trials (of a "
            f"confirmation, --seeds), or see: atelier status {shlex.quote(entry.name)}"
        )
    job = submit_script(script)
    enter_array_job(engine, entry.study_id, job, array)
    return job


def submit_run(bundle: Bundle, config: TrainConfig, profile: str, options: list[str]) -> str:
    """Check what would fail in the queue and submit `atelier train`. Returns the job id.

    Raises InputError, DatasetError; then nothing was submitted.
    """
    script = run_script(config, bundle.slurm, profile, options)
    _check_weights(config)
    check_origin(bundle, config, read_dataset(config.data).fingerprint)
    _make_log_folder()
    submit_script(script, test_only=True)
    return submit_script(script)


def _make_log_folder() -> None:
    try:
        make_private(log_folder())
        tempfile.TemporaryFile(dir=log_folder()).close()
    except OSError as error:
        raise InputError(
            f"cannot write to {log_folder()} ({error.strerror}); set ATELIER_HOME"
        ) from None


def _check_weights(config: TrainConfig) -> None:
    """Raises InputError unless the nodes will find the weights without the internet."""
    if config.weights != "timm":
        return  # a file, or none
    name = config.backbone
    if "." not in name:
        raise InputError(f"backbone = {name!r}: name the weights' tag too, as in {name}.TAG")
    cached = huggingface_hub.try_to_load_from_cache(f"timm/{name}", "model.safetensors")
    if not isinstance(cached, str):
        raise InputError(
            f"weights = 'timm': {name} is not in the cache, and compute nodes may have no internet; "
            f"get it with: hf download timm/{name} config.json model.safetensors, or give a file "
            "with --weights"
        )


def submit_script(script: str, test_only: bool = False) -> str:
    """Submit the script. Returns the job id. Raises InputError without SLURM or if it refuses."""
    command = ["sbatch", "--parsable", *(["--test-only"] if test_only else [])]
    try:
        result = subprocess.run(command, input=script, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        raise InputError("no sbatch on this machine; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise InputError(
            f"sbatch did not answer in {PATIENCE} s; look with squeue --me whether the job is there "
            "before you try again"
        ) from None
    if result.returncode != 0:
        raise InputError(f"sbatch refused the job: {result.stderr.strip()}")
    return result.stdout.strip().split(";")[0]


@dataclass(frozen=True)
class Job:
    """One job, or one task of an array, as squeue shows it."""

    number: str  # tasks that never started share their array's
    state: str
    status: int  # as of wait(2): the exit code times 256
    restarts: int
    end: float | None  # seconds since 1970; None without a time limit


def jobs(ids: Iterable[str]) -> list[Job] | None:
    """Look jobs up by id, all tasks of an array each; those that SLURM has forgotten are absent.

    None if SLURM does not answer.
    """
    listed = _ask(
        *("squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(sorted(ids))}"),
        "--Format=JobID:|,State:|,exit_code:|,RestartCnt:|,EndTime:|",
    )
    if listed is None:
        return None
    rows = [line.split("|") for line in listed.splitlines()]
    if not all(len(row) == 6 and row[2].isdecimal() and row[3].isdecimal() for row in rows):
        return None
    return [
        Job(
            number,
            state,
            int(status),
            int(restarts),
            float(end) if end.isdecimal() else None,
        )
        for number, state, status, restarts, end, _ in rows
    ]


def _ask(*command: str) -> str | None:
    # A user's SQUEUE_PARTITION and the like would hide jobs.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SINFO_"))}
    environment["SLURM_TIME_FORMAT"] = "%s"
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if "Invalid job id" in result.stderr:
        return ""  # it answers: none of them is known any more
    return result.stdout if result.returncode == 0 else None


def judge(holders: list[Holder]) -> dict[str, bool]:
    """Which holders are alive (True) and which are gone (False), by worker id: see `Ledger`.

    SLURM is asked once, and only about jobs of the cluster that this process runs on.
    """
    verdicts = gone_here(holders)
    cluster, own = os.environ.get("SLURM_CLUSTER_NAME"), os.environ.get("SLURM_JOB_ID")
    asked = [
        holder
        for holder in holders
        if cluster and holder.slurm_cluster == cluster and holder.worker_id not in verdicts
    ]
    if not own or not asked:
        return verdicts
    found = {job.number: job for job in jobs({own, *(str(h.slurm_job) for h in asked)}) or []}
    if own not in found:
        return verdicts  # no answer, or one that hides jobs
    for holder in asked:
        job = found.get(str(holder.slurm_job))
        if job is not None and job.state == "COMPLETING":
            continue  # it may be saving its work; a requeued job's count has gone up by now
        if job is None or job.restarts != holder.slurm_restarts:
            verdicts[holder.worker_id] = False  # forgotten, or its id has begun anew
        else:
            verdicts[holder.worker_id] = job.state in ALIVE
    return verdicts


def task_states(array_jobs: Iterable[str]) -> dict[str, int] | None:
    """How many tasks of these arrays are in which state; None if SLURM does not answer.

    The states are SLURM's, and RELEASED of workers that were stopped and have given back their trial.
    """
    ids = list(array_jobs)
    found = jobs(ids) if ids else []
    if found is None:
        return None
    return dict(
        Counter(
            "RELEASED" if job.state == "FAILED" and job.status >> 8 in RELEASED else job.state
            for job in found
        )
    )


def newest_log(array_jobs: Iterable[str]) -> Path | None:
    """The log that a task of these arrays wrote to last."""
    found = [path for job in array_jobs for path in log_folder().glob(f"{job}_*.log")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def wall_end() -> float | None:
    """When this job's time is over, in seconds since 1970; None outside SLURM or without a limit."""
    own = os.environ.get("SLURM_JOB_ID")
    for _ in range(3 if own else 0):
        for job in jobs([own or ""]) or []:
            if job.number == own:
                return job.end
        time.sleep(5)  # the controller is busy when an array starts
    end = os.environ.get("SLURM_JOB_END_TIME", "")  # from SLURM 23.11 on
    return float(end) if end.isdecimal() else None


def requeue_own_job() -> bool:
    """Put this job or task back into the queue. Returns whether SLURM accepted; it then ends us."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array is not None:
        # Not SLURM_JOB_ID: one task of an array has the array's own id, which means all of them.
        return _ask("scontrol", "requeue", f"{array}_{task}") is not None
    job = os.environ.get("SLURM_JOB_ID") if is_slurm_job() else None
    return job is not None and _ask("scontrol", "requeue", job) is not None

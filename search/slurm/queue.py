"""What the queue knows of jobs: their state, how often they began, when they end."""

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import NamedTuple

from search.exit_codes import ExitCode
from search.slurm.commands import (
    SilenceError,
    SlurmError,
    call,
    clean_environment,
    not_understood,
    one_line,
)
from storage.liveness import Holder, probe_this_host
from storage.studies import split_job

log = logging.getLogger(__name__)

# A job in one of these states has its processes.
ALIVE = {"RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"}
# In one of these it may have some: it saves its work, while the count of a requeued job has gone up
# already, or it begins.
UNDECIDED = {"COMPLETING", "CONFIGURING", "POWER_UP_NODE", "STAGE_OUT"}
# In one of these it has none.
GONE = {"PENDING", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}
GONE |= {"DEADLINE", "OUT_OF_MEMORY", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
GONE |= {"REVOKED", "RESV_DEL_HOLD", "LAUNCH_FAILED", "RECONFIG_FAIL"}
# For SLURM a job has failed if its exit code is not 0. These workers have given back their trial.
RELEASED = {ExitCode.STOPPED, ExitCode.WALL_TIME}

# Plain fields, each ended by a bar. JSON is a plug-in that a site may lack, and its shape has changed
# more often.
FIELDS = ("JobID", "State", "exit_code", "RestartCnt", "EndTime", "ArrayJobID", "ArrayTaskID")
_ID = re.compile(r"[0-9]+")
_NO_LIMIT = {"N/A", "NONE", "UNLIMITED"}


@dataclass(frozen=True)
class Job:
    """One job, or one task of an array, as squeue shows it. What is None was not understood."""

    number: str  # tasks that never started share their array's
    state: str
    exit_code: int | None
    restarts: int | None
    end: float | None  # seconds since 1970; infinite without a time limit
    array: str | None = None  # the id of the whole array; a job that is none has its own
    task: str | None = None  # empty for a job that is no array


class Listing(NamedTuple):
    """An answer of squeue."""

    jobs: list[Job]
    strange: str | None = None  # lines that are not understood; any job may stand there

    def find(self, number: str) -> Job | None:
        return next((job for job in self.jobs if job.number == number), None)


def jobs(ids: Iterable[str], cluster: str = "") -> Listing:
    """Look jobs up by id, all tasks of an array each; those that SLURM has forgotten are absent.

    `cluster` is needed for another than that of this machine. Raises SlurmError, SilenceError.
    """
    wanted = sorted({one for one in ids if _ID.fullmatch(one)})
    if not wanted:
        return Listing([])
    where = [f"--clusters={cluster}"] if cluster else []
    try:
        output, complaint = call(
            *("squeue", *where, "--noheader", "--array", "--states=all", f"--jobs={','.join(wanted)}"),
            f"--Format={','.join(f'{field}:|' for field in FIELDS)}",
            environment=clean_environment() | {"SLURM_TIME_FORMAT": "%s"},
        )
    except SilenceError:
        raise
    except SlurmError as error:
        if "Invalid job id specified" in str(error):
            return Listing([])  # it answers: none of them is known any more
        raise
    # `CLUSTER: NAME` stands above each cluster's jobs.
    lines = [line for line in map(str.strip, output.splitlines()) if line and line[:8] != "CLUSTER:"]
    rows = [(line, _job(line)) for line in lines]
    found = [job for _, job in rows if job is not None]
    strange = "\n".join(line for line, job in rows if job is None)
    if not found and (strange or complaint):
        raise not_understood("squeue", strange or complaint)
    if complaint:
        say(f"squeue said: {one_line(complaint)}")
    return Listing(found, one_line(strange) or None)


def _job(line: str) -> Job | None:
    number, *values = (value.strip() for value in line.split("|"))
    if not _ID.fullmatch(number) or not values:
        return None
    named = dict.fromkeys(FIELDS, "") | dict(zip(FIELDS[1:], values, strict=False))
    # A flag may follow the state: RUNNING+SIGNALING. One that is COMPLETING has ended for most purposes.
    state, *flags = re.split(r"[+, ]", named["State"].upper())
    array, task = named["ArrayJobID"], named["ArrayTaskID"]
    return Job(
        number,
        "COMPLETING" if "COMPLETING" in flags else state,
        _exit_code(named["exit_code"]),
        int(restarts) if (restarts := named["RestartCnt"]).isdecimal() else None,
        _time(named["EndTime"]),
        array if _ID.fullmatch(array) else None,
        task if _ID.fullmatch(task) else "" if task == "N/A" else None,
    )


def _exit_code(text: str) -> int | None:
    """From `code:signal`, or until SLURM 22.05 from what wait(2) gives: the code times 256."""
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return int(match[1])
    return int(text) >> 8 if text.isdecimal() else None


def _time(text: str) -> float | None:
    if text.upper() in _NO_LIMIT:
        return math.inf
    try:
        return float(text) if text.isdecimal() else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None


def probe_liveness(holders: list[Holder]) -> dict[str, bool]:
    """Which holders are alive (True) and which are gone (False), by worker id: see `Ledger`.

    SLURM is asked once, and only about jobs of the cluster that this process runs on.
    """
    verdicts = probe_this_host(holders)
    cluster, own = os.environ.get("SLURM_CLUSTER_NAME"), os.environ.get("SLURM_JOB_ID")
    asked = [
        holder
        for holder in holders
        if cluster and holder.slurm_cluster == cluster and holder.worker_id not in verdicts
    ]
    if not own or not asked:
        return verdicts
    try:
        listing = jobs({own, *(str(h.slurm_job) for h in asked)})
    except SlurmError as error:
        say(f"SLURM is not asked who is at work, the leases decide: {error}")
        return verdicts
    if listing.strange:
        say(f"squeue printed what is not understood, and is left out: {listing.strange!r}")
    if listing.find(own) is None:
        return verdicts  # an answer that hides jobs
    for holder in asked:
        job = listing.find(str(holder.slurm_job))
        if job is None and listing.strange:
            continue  # it may stand there
        verdict = False if job is None else _is_at_work(job, holder)  # False: forgotten
        if verdict is not None:
            verdicts[holder.worker_id] = verdict
    return verdicts


def _is_at_work(job: Job, holder: Holder) -> bool | None:
    if job.state in UNDECIDED:
        return None
    if job.state in GONE:
        return False
    if job.state not in ALIVE:
        say(
            f"job {job.number} is {job.state or 'in no state'}, which is not understood; "
            "its lease decides"
        )
        return None
    if job.restarts is None:
        say(f"how often job {job.number} began is not understood; its lease decides")
        return None
    return job.restarts == holder.slurm_restarts  # else its id has begun anew


@dataclass(frozen=True)
class Tasks:
    """The tasks of some arrays."""

    states: dict[str, int] | None  # how many are in which state; None if SLURM says nothing of any array
    problem: str | None = None  # why what is counted may not be all


def task_states(array_jobs: Sequence[str]) -> Tasks:
    """How many tasks of these arrays are in which state.

    The states are SLURM's, and RELEASED of workers that were stopped and have given back their trial.
    """
    clusters: dict[str, list[str]] = {}
    problems = []
    for job in array_jobs:
        number, cluster = split_job(job)
        if _ID.fullmatch(number):
            clusters.setdefault(cluster, []).append(number)
        else:
            problems.append(f"{one_line(job)!r} is no id of a job")
    counts: Counter[str] = Counter()
    answered = not array_jobs
    for cluster, ids in clusters.items():
        try:
            listing = jobs(ids, cluster)
        except SlurmError as error:
            problems.append(str(error))
            continue
        answered = True
        if listing.strange:
            problems.append(f"squeue printed {listing.strange!r}")
        for task in listing.jobs:
            released = task.state == "FAILED" and task.exit_code in RELEASED
            counts["RELEASED" if released else task.state or "UNKNOWN"] += 1
    return Tasks(dict(counts) if answered else None, "; ".join(problems) or None)


@cache
def say(text: str) -> None:
    """Log what was not understood, once."""
    log.warning("%s", text)

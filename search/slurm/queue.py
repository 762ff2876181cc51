"""What squeue says of jobs: their state, how often they began, when they end."""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import NamedTuple

from search.exit_codes import ExitCode
from search.slurm.commands import (
    SilenceError,
    SlurmError,
    call,
    not_understood,
    one_line,
)
from search.slurm.environment import UNIX_TIMES, clean_environment, cluster_name, job_id
from storage.liveness import Holder, probe_this_host
from storage.studies import split_job

log = logging.getLogger(__name__)

# A job in one of these states has its processes.
ALIVE = {"RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"}
# In one of these it may have some: it begins, or it still saves its work after it was requeued.
UNDECIDED = {"COMPLETING", "CONFIGURING", "POWER_UP_NODE", "STAGE_OUT"}
# In one of these it has none.
GONE = {"PENDING", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}
GONE |= {"DEADLINE", "OUT_OF_MEMORY", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
GONE |= {"REVOKED", "RESV_DEL_HOLD", "LAUNCH_FAILED", "RECONFIG_FAIL"}
# In one of these it will not begin again.
ENDED = GONE - {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"}
# SLURM says FAILED for each exit code but 0. With these a worker has given back its trial.
RELEASED = {ExitCode.STOPPED, ExitCode.WALL_TIME}

# Plain fields, each ended by a bar. A site may lack the plug-in for JSON, and its shape changes more
# often.
FIELDS = ("JobID", "State", "exit_code", "RestartCnt", "EndTime", "ArrayJobID", "ArrayTaskID", "Reason")
_ID = re.compile(r"[0-9]+")
_NO_LIMIT = {"N/A", "NONE", "UNLIMITED"}


@dataclass(frozen=True)
class Job:
    """One job, or one task of an array, as squeue shows it. None stands for what was not understood."""

    number: str  # tasks that never started share their array's
    state: str
    exit_code: int | None
    restarts: int | None
    end: float | None  # seconds since 1970; infinite without a time limit
    array: str | None = None  # the id of the whole array; of a single job its own
    task: str | None = None  # empty for a single job
    reason: str = ""  # why it is in its state, in SLURM's word


class Listing(NamedTuple):
    """An answer of squeue."""

    jobs: list[Job]
    strange: str | None = None  # lines that were not understood; any job may stand there

    def find(self, number: str) -> Job | None:
        return next((job for job in self.jobs if job.number == number), None)


def jobs(ids: Iterable[str], cluster: str = "") -> Listing:
    """Look jobs up by id, each array with all of its tasks. Those that SLURM has forgotten are absent.

    `cluster` names another cluster than this machine's. Raises SlurmError, SilenceError.
    """
    wanted = sorted({job for job in ids if _ID.fullmatch(job)})
    if not wanted:
        return Listing([])
    where = [f"--clusters={cluster}"] if cluster else []
    try:
        output, complaint = call(
            *("squeue", *where, "--noheader", "--array", "--states=all", f"--jobs={','.join(wanted)}"),
            f"--Format={','.join(f'{field}:|' for field in FIELDS)}",
            environment=clean_environment() | UNIX_TIMES,
        )
    except SilenceError:
        raise
    except SlurmError as error:
        if "Invalid job id specified" in str(error):
            return Listing([])  # an answer: SLURM has forgotten all of them
        raise
    # `CLUSTER: NAME` stands above each cluster's jobs.
    lines = [line for line in map(str.strip, output.splitlines()) if line and line[:8] != "CLUSTER:"]
    rows = [(line, _job(line)) for line in lines]
    understood = [job for _, job in rows if job is not None]
    strange = "\n".join(line for line, job in rows if job is None)
    if not understood and (strange or complaint):
        raise not_understood("squeue", strange or complaint)
    if complaint:
        say(f"squeue said: {one_line(complaint)}")
    return Listing(understood, one_line(strange) or None)


def _job(line: str) -> Job | None:
    number, *values = (value.strip() for value in line.split("|"))
    if not _ID.fullmatch(number) or not values:
        return None
    named = dict.fromkeys(FIELDS, "") | dict(zip(FIELDS[1:], values, strict=False))
    # A flag may follow the state: RUNNING+SIGNALING. COMPLETING as a flag counts as the state.
    state, *flags = re.split(r"[+, ]", named["State"].upper())
    array, task = named["ArrayJobID"], named["ArrayTaskID"]
    return Job(
        number,
        "COMPLETING" if "COMPLETING" in flags else state,
        _exit_code(named["exit_code"]),
        int(restarts) if (restarts := named["RestartCnt"]).isdecimal() else None,
        moment(named["EndTime"]),
        array if _ID.fullmatch(array) else None,
        task if _ID.fullmatch(task) else "" if task == "N/A" else None,
        named["Reason"],
    )


def _exit_code(text: str) -> int | None:
    """Read `code:signal`. Until SLURM 22.05 it is what wait(2) gives: the code times 256."""
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return int(match[1])
    return int(text) >> 8 if text.isdecimal() else None


def moment(text: str) -> float | None:
    """A time in seconds since 1970; infinite for none. None if it is not understood."""
    if text.upper() in _NO_LIMIT:
        return math.inf
    try:
        return float(text) if text.isdecimal() else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None


def probe_liveness(holders: list[Holder]) -> dict[str, bool]:
    """Which holders are alive (True) and which are gone (False), by worker id. See `Ledger`.

    SLURM is asked once, and only about jobs of this process's own cluster.
    """
    liveness = probe_this_host(holders)
    cluster, own_job = cluster_name(), job_id()
    asked = [
        holder
        for holder in holders
        if cluster and holder.slurm_cluster == cluster and holder.worker_id not in liveness
    ]
    if not own_job or not asked:
        return liveness
    try:
        listing = jobs({own_job, *(str(holder.slurm_job) for holder in asked)})
    except SlurmError as error:
        say(f"SLURM cannot be asked who is at work, so the leases decide: {error}")
        return liveness
    if listing.strange:
        say(f"squeue printed what is not understood, and is left out: {listing.strange!r}")
    if listing.find(own_job) is None:
        return liveness  # an answer that hides jobs
    for holder in asked:
        job = listing.find(str(holder.slurm_job))
        if job is None and listing.strange:
            continue  # it may stand in a strange line
        is_alive = False if job is None else _is_at_work(job, holder)  # False: forgotten
        if is_alive is not None:
            liveness[holder.worker_id] = is_alive
    return liveness


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
    return job.restarts == holder.slurm_restarts  # else the job began again, without this holder


@dataclass(frozen=True)
class Tasks:
    """The tasks of some arrays."""

    states: dict[str, int] | None  # how many are in which state; None if SLURM does not answer
    problem: str | None = None  # why these may not be all
    pending: Mapping[str, int] = field(default_factory=dict)  # how many wait for which reason


def task_states(array_jobs: Sequence[str]) -> Tasks:
    """How many tasks of these arrays are in which state.

    The states are SLURM's. RELEASED is ours: a worker that was stopped and has given back its trial.
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
    pending: Counter[str] = Counter()
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
            if task.state == "PENDING" and task.reason not in ("", "None"):
                pending[one_line(task.reason)] += 1
    return Tasks(dict(counts) if answered else None, "; ".join(problems) or None, pending)


@cache
def say(text: str) -> None:
    """Log a warning, each one once."""
    log.warning("%s", text)

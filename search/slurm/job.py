"""The SLURM job that this process runs in: what it is, when it ends, and how it comes back.

SLURM itself is asked. Of the environment only what slurmd sets anew for each job is believed: the rest
may be of another job, from which this one was submitted.
"""

import logging
import math
import os
import time
from dataclasses import dataclass
from typing import Any

from search.slurm.commands import SilenceError, SlurmError, call
from search.slurm.queue import Job, jobs, say

log = logging.getLogger(__name__)

TRIES, PAUSE_SECONDS = 3, 5  # the controller is busy when an array starts
KILL_SECONDS = 30.0  # from SLURM's SIGTERM to its SIGKILL: the default of its KillWait


@dataclass(frozen=True)
class OwnJob:
    """What is known of the job that this process runs in."""

    number: str
    known: Job | None  # None if SLURM did not say

    @property
    def end(self) -> float | None:
        """When its time is over, in seconds since 1970; None without a limit."""
        end = self.known.end if self.known else None
        if end is None:
            text = os.environ.get("SLURM_JOB_END_TIME", "")  # slurmd sets it from SLURM 23.11 on
            if not text.isdecimal():
                say("when this job ends, SLURM does not say: the work goes on until its signal comes")
                return None
            end = float(text)
        return end if math.isfinite(end) else None

    def columns(self) -> dict[str, Any]:
        """What goes on record of a worker. The cluster only if SLURM's word on the job is one on it."""
        values: dict[str, Any] = {"slurm_job": self.number}
        if self.known is not None and self.known.restarts is not None:
            values["slurm_restarts"] = self.known.restarts
            if is_this_process():
                values["slurm_cluster"] = os.environ.get("SLURM_CLUSTER_NAME")
        if self.known is not None and self.known.task:
            values["slurm_array_job"], values["slurm_array_task"] = self.known.array, self.known.task
        return values

    def requeue(self) -> bool:
        """Put it back into the queue. Returns whether SLURM accepted; it then ends us."""
        if not is_this_process():
            return False
        try:
            job = self.known or _ask(self.number)
            if job is None or job.array is None or job.task is None:
                raise SlurmError(f"squeue does not say which task of which array {self.number} is")
            # One task of an array has the array's own id, which means all of them.
            name = f"{job.array}_{job.task}" if job.task else job.number
            complaint = call("scontrol", "requeue", name).complaint
            if complaint:
                raise SlurmError(f"scontrol requeue said: {complaint}")
        except SlurmError as error:
            log.warning("not requeued, submit again: %s", error)
            return False
        return True


def own_job() -> OwnJob | None:
    """The job that this process runs in; None outside SLURM."""
    number = os.environ.get("SLURM_JOB_ID")
    return OwnJob(number, _ask(number)) if number else None


def seconds_to_kill() -> float | None:
    """How long after a SIGTERM this process is killed; None outside SLURM, where nobody does it."""
    return KILL_SECONDS if "SLURM_JOB_ID" in os.environ else None


def is_this_process() -> bool:
    """Whether this process is its SLURM job: not a step of it, and not one of several processes."""
    own = os.environ.get("SLURM_TASK_PID") == str(os.getpid())
    return own and not os.environ.get("SLURM_STEP_ID")


def _ask(number: str) -> Job | None:
    for turn in range(TRIES):
        if turn:
            time.sleep(PAUSE_SECONDS)
        try:
            return jobs([number]).find(number)
        except SilenceError as error:
            reason = str(error)
        except SlurmError as error:
            reason = str(error)
            break
    log.warning("what this job is, SLURM does not say: %s", reason)
    return None

"""The SLURM job that this process runs in: what it is, when it ends, how it is requeued."""

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

from search.slurm import environment
from search.slurm.commands import SilenceError, SlurmError, call
from search.slurm.queue import Job, jobs, say

log = logging.getLogger(__name__)

TRIES, PAUSE_SECONDS = 3, 5  # the controller is busy when an array starts
KILL_SECONDS = 30.0  # from SLURM's SIGTERM to its SIGKILL: the default of its KillWait


@dataclass(frozen=True)
class OwnJob:
    """What is known of the job that this process runs in."""

    number: str
    job: Job | None  # None if SLURM did not say

    @property
    def end(self) -> float | None:
        """When its time is over, in seconds since 1970; None without a limit."""
        end = self.job.end if self.job else None
        if end is None:
            end = environment.job_end()
        if end is None:
            say("SLURM does not say when this job ends: the work goes on until its signal comes")
            return None
        return end if math.isfinite(end) else None

    def columns(self) -> dict[str, Any]:
        """The columns of a worker's row.

        The cluster is among them only if the job's state says whether this process is alive.
        """
        values: dict[str, Any] = {"slurm_job": self.number}
        if (end := self.end) is not None:
            values["wall_seconds"] = max(end - time.time(), 0.0)
        if self.job is not None and self.job.restarts is not None:
            values["slurm_restarts"] = self.job.restarts
            if environment.is_job_itself():
                values["slurm_cluster"] = environment.cluster_name()
        if self.job is not None and self.job.task:
            values["slurm_array_job"], values["slurm_array_task"] = self.job.array, self.job.task
        return values

    def requeue(self) -> bool:
        """Put the job back into the queue. Returns whether SLURM accepted; it then ends this process."""
        if not environment.is_job_itself():
            return False
        try:
            job = self.job or _ask(self.number)
            if job is None or job.array is None or job.task is None:
                raise SlurmError(f"squeue does not say which task of which array {self.number} is")
            # One of an array's tasks has the id of the whole array. Requeueing that would requeue all.
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
    number = environment.job_id()
    return OwnJob(number, _ask(number)) if number else None


def seconds_to_kill() -> float | None:
    """How long after a SIGTERM this process is killed; None outside SLURM, where nobody does it."""
    return KILL_SECONDS if environment.job_id() else None


def _ask(number: str) -> Job | None:
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE_SECONDS)
        try:
            return jobs([number]).find(number)
        except SilenceError as error:
            reason = str(error)
        except SlurmError as error:
            reason = str(error)
            break
    log.warning("SLURM does not say what this job is: %s", reason)
    return None

"""SLURM's environment variables: what a job believes of them, and what SLURM's commands get of them.

Only what slurmd sets anew for each job is believed. The rest may come from another job, from which this
one was submitted.
"""

import os
from typing import NamedTuple

# A user's own habits (SQUEUE_PARTITION hides jobs), and what another job has left in its environment.
FOREIGN = ("SLURM_", "SBATCH_", "SQUEUE_", "SINFO_", "SCONTROL_", "SACCT_")
# These say where the cluster is, and who asks.
NEEDED = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"}
# What a site or a lab sets for all of its jobs, and the options that say the same. sbatch takes it from
# the environment where the script leaves it open. Any other of these variables could beat the profile
# unseen, or describe another job.
LEFT_OPEN = {
    "SBATCH_ACCOUNT": ("--account", "-A"),
    "SBATCH_PARTITION": ("--partition", "-p"),
    "SBATCH_QOS": ("--qos", "-q"),
    "SBATCH_CONSTRAINT": ("--constraint", "-C"),
    "SBATCH_RESERVATION": ("--reservation",),
    "SBATCH_WCKEY": ("--wckey",),
    "SBATCH_CLUSTERS": ("--clusters", "--cluster", "-M"),
    "SLURM_CLUSTERS": ("--clusters", "--cluster", "-M"),
}
# Makes squeue print times as seconds since 1970.
UNIX_TIMES = {"SLURM_TIME_FORMAT": "%s"}


class Habits(NamedTuple):
    """What this user has set for all jobs. None for what is not set."""

    partition: str | None
    account: str | None
    qos: str | None


def habits() -> Habits:
    """This user's habits. Of several partitions the first counts."""
    names = ("SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_QOS")
    return Habits(*(os.environ.get(name, "").partition(",")[0] or None for name in names))


def job_id() -> str | None:
    """The id of the job that this process runs in; None outside SLURM."""
    return os.environ.get("SLURM_JOB_ID")


def cluster_name() -> str | None:
    """The cluster of the job that this process runs in; None outside SLURM."""
    return os.environ.get("SLURM_CLUSTER_NAME")


def job_end() -> float | None:
    """When the job's time is over, in seconds since 1970. None before SLURM 23.11: it does not say."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdecimal() else None


def is_job_itself() -> bool:
    """Whether this process is its SLURM job: not a step of it, and not one of several processes."""
    is_task = os.environ.get("SLURM_TASK_PID") == str(os.getpid())
    return is_task and not os.environ.get("SLURM_STEP_ID")


def clean_environment(*left_open: str) -> dict[str, str]:
    """This process's environment, without what SLURM's commands would read in it.

    `left_open` are names of variables that stay.
    """
    stays = NEEDED.union(left_open)
    return {k: v for k, v in os.environ.items() if k in stays or not k.startswith(FOREIGN)}


def kept_from_commands(*left_open: str) -> list[str]:
    """The names of this environment's variables that SLURM's commands do not get; a job's come last."""
    kept = os.environ.keys() - clean_environment(*left_open).keys()
    return sorted(kept, key=lambda name: (name.startswith("SLURM_"), name))

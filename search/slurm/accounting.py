"""What sacct says of jobs: how long each run waited and took, what it was granted and used."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from search.slurm.commands import call, not_understood
from search.slurm.environment import UNIX_TIMES, clean_environment
from search.slurm.queue import moment
from search.slurm.sizes import BYTE, size
from search.slurm.times import NO_LIMIT

# Of the GPU only the highest usage of a step is on record there, which says nothing of its mean.
FIELDS = ("JobID", "Submit", "Start", "ElapsedRaw", "TimelimitRaw", "State", "AllocTRES", "MaxRSS")
NEVER_BEGAN = ("Unknown", "None", "")
_JOB = re.compile(r"(\d+(?:_\d+)?)(\.\w+)?")
_WAITING_TASKS = re.compile(r"\d+_\[.*\]")
_GRANTED = re.compile(r"(?:^|,)mem=([^,]+)")


@dataclass(frozen=True)
class Run:
    """One run of a job or of an array's task: a requeued one has several. None: SLURM does not say."""

    state: str
    queued: float | None  # seconds from the submit, or from the requeue, to the start
    seconds: float
    wall_seconds: float | None  # None also without a limit
    memory: float | None  # bytes that it was granted
    peak_memory: float | None  # bytes; None while it lasts


def read_runs(ids: Iterable[str], since: datetime, cluster: str = "") -> dict[str, list[Run]]:
    """The runs of jobs by name, as in 12_3, in the order of their starts.

    An id counts with all tasks of its array. `since` keeps away jobs that had these ids before.
    `cluster` names another cluster than this machine's. Raises SlurmError, SilenceError.
    """
    words = ["--parsable2", "--noheader", "--duplicates", "--units=M", f"--format={','.join(FIELDS)}"]
    words += [f"--clusters={cluster}"] if cluster else []
    start = since.astimezone().strftime("%Y-%m-%dT%H:%M:%S")
    output = call(
        *("sacct", *words, f"--starttime={start}", f"--jobs={','.join(sorted(set(ids)))}"),
        environment=clean_environment() | UNIX_TIMES,
    ).output
    found: dict[str, list[tuple[float, Run]]] = {}
    steps_of: list[tuple[float, Run]] | None = None  # where the steps that follow belong
    for line in filter(None, map(str.strip, output.splitlines())):
        values = line.split("|")
        match = _JOB.fullmatch(values[0])
        if len(values) != len(FIELDS) or (match is None and not _WAITING_TASKS.fullmatch(values[0])):
            raise not_understood("sacct", line)
        row = dict(zip(FIELDS, values, strict=True))
        if match is None or (match[2] is None and _never_began(row)):
            steps_of = None
        elif match[2] is None:
            steps_of = found.setdefault(match[1], [])
            try:
                steps_of.append(_run(row))
            except ValueError:
                raise not_understood("sacct", line) from None
        elif steps_of and (peak := size(row["MaxRSS"], bare=BYTE)) is not None:
            start_time, run = steps_of[-1]
            steps_of[-1] = (start_time, replace(run, peak_memory=max(run.peak_memory or 0.0, peak)))
    return {job: [run for _, run in sorted(runs, key=lambda one: one[0])] for job, runs in found.items()}


def _never_began(row: dict[str, str]) -> bool:
    """A job that was cancelled at once may have a start all the same, but it was granted nothing."""
    return row["Start"] in NEVER_BEGAN or (row["ElapsedRaw"] == "0" and not row["AllocTRES"])


def _run(row: dict[str, str]) -> tuple[float, Run]:
    """When it began, in seconds since 1970, and the run. Raises ValueError if that is not understood."""
    submitted, started = moment(row["Submit"]), moment(row["Start"])
    if started is None:
        raise ValueError(row["Start"])
    limit = row["TimelimitRaw"]  # minutes
    granted = _GRANTED.search(row["AllocTRES"])
    return started, Run(
        row["State"],
        None if submitted is None else max(started - submitted, 0.0),
        float(row["ElapsedRaw"]),
        float(limit) * 60 if limit and limit.upper() not in (*NO_LIMIT, "PARTITION_LIMIT") else None,
        size(granted[1], bare=BYTE) if granted else None,
        None,
    )

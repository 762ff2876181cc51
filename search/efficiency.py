"""`atelier efficiency`: what a study's workers were granted and used, and what to ask for next time."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

from dashboards.study_tables import GIB, MUCH, duration
from search.slurm.accounting import Run, read_runs
from search.slurm.commands import SlurmError, version
from search.slurm.queue import ALIVE
from storage.efficiency import WorkerUse
from storage.outcome import WALL_TIME
from storage.studies import split_job
from storage.workers import WAITS

OUT_OF_MEMORY, TIMEOUT = "OUT_OF_MEMORY", "TIMEOUT"  # states of SLURM
OUR_RECORDS = "Atelier's own records"

SPARE = 1.2  # times what was used
STEP_SECONDS = 600  # of a wall time that is advised
IDLE = 0.7  # a GPU that is busy for less of the time has room for more trials at once


def advice(uses: Sequence[WorkerUse]) -> list[str]:
    """What to ask for next time, each with its reason. Empty before a worker has trained an epoch."""
    at_work = [use for use in uses if use.epochs]
    if not at_work:
        return []
    memory = _starved(uses) or _memory(at_work)
    return [line for line in (memory, _time(at_work), _pack(at_work), _array(uses)) if line]


def as_dict(uses: Sequence[WorkerUse], source: str) -> dict[str, Any]:
    """The form of `--json`, which programs rely on: it stays stable."""
    workers = [asdict(use) | {"seconds_lost": use.seconds_lost} for use in uses]
    return {"workers": workers, "advice": advice(uses), "source": source}


def with_accounting(
    uses: Sequence[WorkerUse], array_jobs: Sequence[str], since: datetime
) -> tuple[list[WorkerUse], str]:
    """The same with what sacct knows better, and the tasks that no worker has signed; and the source.

    `array_jobs` are the study's, and `since` is when it was made.
    """
    clusters: dict[str, set[str]] = {}
    for job, cluster in map(split_job, array_jobs):
        clusters.setdefault(cluster, set()).add(job)
    arrays = set().union(*clusters.values())
    jobs = {use.job.partition("_")[0] for use in uses if use.job}
    if alone := jobs - arrays:
        clusters.setdefault("", set()).update(alone)
    try:
        asked = [read_runs(ids, since, cluster) for cluster, ids in clusters.items()]
    except SlurmError as error:
        return [*uses], f"{OUR_RECORDS}, since {error}"
    runs = {job: found for answer in asked for job, found in answer.items()}
    workers = Counter((use.job, use.restarts) for use in uses)
    merged = []
    for use in uses:
        run = runs.get(use.job or "", [])[use.restarts : use.restarts + 1]
        # sacct knows a job. Of several workers in one it does not know which used what.
        merged += [_merged(use, *run)] if run and workers[use.job, use.restarts] == 1 else [use]
    known = sum(use.queued is not None for use in merged)
    unsigned = [
        _unsigned(job, restarts, run)
        for job, found in runs.items()
        for restarts, run in enumerate(found)
        if job.partition("_")[0] in arrays and not workers[job, restarts]
    ]
    if not runs:
        why = "; sacct says nothing of these jobs" if clusters else ""
        return merged, OUR_RECORDS + why
    return merged + unsigned, (
        f"sacct of {version()} for time, memory and the queue, of {known} of {len(uses)} workers; "
        f"{OUR_RECORDS} for the rest"
    )


def _merged(use: WorkerUse, run: Run) -> WorkerUse:
    peaks = [peak for peak in (use.peak_memory, run.peak_memory) if peak is not None]
    return replace(
        use,
        seconds=run.seconds,
        queued=run.queued,
        wall_seconds=run.wall_seconds or use.wall_seconds,
        memory=run.memory or use.memory,
        peak_memory=max(peaks, default=None),  # SLURM looks now and then, a killed worker saw no end
        ended=use.ended or (None if use.is_alive else run.state),
    )


def _unsigned(job: str, restarts: int, run: Run) -> WorkerUse:
    """A task that ended, or was requeued, before its worker could sign; or whose worker has yet to."""
    is_alive = run.state in ALIVE
    return WorkerUse(
        worker="",
        job=job,
        restarts=restarts,
        gpu=None,
        ended=None if is_alive else run.state,
        is_alive=is_alive,
        pack=None,
        trials=0,
        epochs=0,
        seconds=run.seconds,
        seconds_training=0.0,
        waits={},
        wall_seconds=run.wall_seconds,
        memory=run.memory,
        peak_memory=run.peak_memory,
        busy=None,
        queued=run.queued,
    )


def costs(uses: Sequence[WorkerUse]) -> str | None:
    """What the queue and restarts have cost, in words. None if neither is known of."""
    parts = []
    if queued := [use.queued for use in uses if use.queued is not None]:
        parts.append(f"{duration(sum(queued))} in the queue, before {len(queued)} starts")
    if again := [use for use in uses if use.restarts]:
        waited = sum(use.queued or 0.0 for use in again)
        lost = sum(use.seconds_lost for use in again)
        parts.append(
            f"{len(again)} of {len(uses)} began anew, which cost {duration(waited + lost)}: the queue, "
            "starting and saving"
        )
    return "; ".join(parts) or None


def _starved(uses: Sequence[WorkerUse]) -> str | None:
    """What SLURM's accounting says of memory, where there is one."""
    starved = [use for use in uses if use.ended == OUT_OF_MEMORY]
    if not starved:
        return None
    granted = max((use.memory for use in starved if use.memory), default=None)
    than = "" if granted is None else f" than {granted / GIB:.3g} GiB"
    return f"more memory{than} (--mem): SLURM killed {len(starved)} of {len(uses)} workers for it"


def _memory(uses: Sequence[WorkerUse]) -> str | None:
    used = max((use.peak_memory for use in uses if use.peak_memory), default=None)
    if used is None:
        return None
    killed = [use for use in uses if use.ended is None and not use.is_alive]
    if killed:
        granted = max((use.memory for use in killed if use.memory), default=used)
        return (
            f"memory of more than {max(granted, used) / GIB:.3g} GiB (--mem), if that was the reason: "
            f"{len(killed)} of {len(uses)} workers were killed"
        )
    enough = math.ceil(SPARE * used / GIB)
    return (
        f'memory = "{enough}G" (--mem) for each worker of a job: none used more than {used / GIB:.1f} '
        "GiB, with kept output"
    )


def _time(uses: Iterable[WorkerUse]) -> str | None:
    ended = [use for use in uses if not use.is_alive]
    cut = sum(use.ended in (WALL_TIME, TIMEOUT) for use in ended)
    if cut:
        return f"a longer time (--time): it ended {cut} of {len(ended)} workers, and each starts anew"
    if not ended:
        return None
    longest = max(use.seconds for use in ended)
    minutes = math.ceil(SPARE * longest / STEP_SECONDS) * STEP_SECONDS // 60
    return (
        f'time = "{minutes // 60:02}:{minutes % 60:02}:00" (--time): no worker took longer than '
        f"{duration(longest)}"
    )


def _pack(uses: Sequence[WorkerUse]) -> str | None:
    known = [use for use in uses if use.busy is not None and use.pack is not None]
    if not known:
        return None
    share = sum(use.busy or 0.0 for use in known) / len(known)
    if share >= IDLE:
        return None
    waits = {what: sum(use.waits[what] for use in known) for what in WAITS}
    longest = max(waits, key=lambda what: waits[what])
    if waits[longest] >= MUCH * sum(use.seconds for use in known):
        return f"the GPU was busy for {share:.0%} of the time, as workers waited for the {longest}"
    most = max(use.pack or 0 for use in known)
    return (
        f"no --pack, so that as many trials train at once as fit: it was {most}, and the GPU was busy "
        f"for {share:.0%} of the time"
    )


def _array(uses: Iterable[WorkerUse]) -> str | None:
    """Fewer tasks, if some of the newest array found nothing to train."""
    arrays: dict[str, list[WorkerUse]] = {}
    for use in uses:
        if use.worker and use.job and "_" in use.job:
            arrays.setdefault(use.job.partition("_")[0], []).append(use)
    if not arrays:
        return None
    *_, newest = arrays.values()  # by its first worker
    every, at_work = {use.job for use in newest}, {use.job for use in newest if use.epochs}
    if every == at_work:
        return None
    idle = len(every) - len(at_work)
    return f"--array 0-{max(len(at_work), 1) - 1}: {idle} of {len(every)} tasks trained nothing"

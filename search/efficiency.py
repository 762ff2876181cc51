"""`atelier efficiency`: what a study's workers were granted and used, and what to ask for next time."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from dashboards.study_tables import GIB, MUCH, duration
from storage.efficiency import WorkerUse
from storage.outcome import WALL_TIME
from storage.workers import WAITS

SPARE = 1.2  # times what was used
STEP_SECONDS = 600  # of a wall time that is advised
IDLE = 0.7  # a GPU that is busy for less of the time has room for more trials at once


def advice(uses: Sequence[WorkerUse]) -> list[str]:
    """What to ask for next time, each with its reason. Empty before a worker has trained an epoch."""
    at_work = [use for use in uses if use.epochs]
    lines = [_memory(at_work), _time(at_work), _pack(at_work), _array(uses)] if at_work else []
    return [line for line in lines if line]


def as_dict(uses: Sequence[WorkerUse]) -> dict[str, Any]:
    """The form of `--json`, which programs rely on: it stays stable."""
    workers = [asdict(use) | {"seconds_lost": use.seconds_lost} for use in uses]
    return {"workers": workers, "advice": advice(uses)}


def _memory(uses: Sequence[WorkerUse]) -> str | None:
    used = max((use.peak_memory for use in uses if use.peak_memory), default=None)
    if used is None:
        return None
    killed = [use for use in uses if use.ended is None and not use.is_alive]
    if killed:
        granted = max((use.memory for use in killed if use.memory), default=used)
        return (
            f"memory of more than {max(granted, used) / GIB:.0f} GiB (--mem), if that was the reason: "
            f"{len(killed)} of {len(uses)} workers were killed"
        )
    enough = math.ceil(SPARE * used / GIB)
    return (
        f'memory = "{enough}G" (--mem) for each worker of a job: none used more than {used / GIB:.1f} '
        "GiB, with kept output"
    )


def _time(uses: Iterable[WorkerUse]) -> str | None:
    ended = [use for use in uses if not use.is_alive]
    cut = sum(use.ended == WALL_TIME for use in ended)
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
        if use.job and "_" in use.job:
            arrays.setdefault(use.job.partition("_")[0], []).append(use)
    if not arrays:
        return None
    *_, newest = arrays.values()  # by its first worker
    every, at_work = {use.job for use in newest}, {use.job for use in newest if use.epochs}
    if every == at_work:
        return None
    idle = len(every) - len(at_work)
    return f"--array 0-{max(len(at_work), 1) - 1}: {idle} of {len(every)} tasks trained nothing"

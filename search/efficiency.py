"""`atelier efficiency`: what a study's workers were granted and used, and what to ask for next time."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from dashboards.study_tables import duration
from storage.efficiency import WorkerUse
from storage.outcome import WALL_TIME

SPARE = 1.2  # times what was used
GIB = 1 << 30
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


def _memory(uses: Iterable[WorkerUse]) -> str | None:
    used = max((use.peak_memory for use in uses if use.peak_memory), default=None)
    if used is None:
        return None
    enough = math.ceil(SPARE * used / GIB)
    return f'memory = "{enough}G" (--mem): a worker used {used / GIB:.1f} GiB at most, with kept output'


def _time(uses: Sequence[WorkerUse]) -> str | None:
    cut = sum(use.ended == WALL_TIME for use in uses)
    if cut:
        return f"a longer time (--time): it ended {cut} of {len(uses)} workers, and each starts anew"
    longest = max(use.seconds for use in uses)
    minutes = math.ceil(SPARE * longest / STEP_SECONDS) * STEP_SECONDS // 60
    return (
        f'time = "{minutes // 60:02}:{minutes % 60:02}:00" (--time): no worker took longer than '
        f"{duration(longest)}"
    )


def _pack(uses: Iterable[WorkerUse]) -> str | None:
    known = [(use.busy, use.pack) for use in uses if use.busy is not None and use.pack is not None]
    if not known:
        return None
    share = sum(busy for busy, _ in known) / len(known)
    most = max(pack for _, pack in known)
    if share >= IDLE:
        return f"--pack {most}: the GPU was busy for {share:.0%} of the time"
    return f"--pack auto, instead of {most}: the GPU was busy for only {share:.0%} of the time"


def _array(uses: Sequence[WorkerUse]) -> str | None:
    """Fewer tasks, if some found nothing to train."""
    tasks = {use.job for use in uses if use.job}
    at_work = {use.job for use in uses if use.job and use.epochs}
    if tasks == at_work:
        return None
    idle = len(tasks - at_work)
    return f"--array 0-{max(len(at_work), 1) - 1}: {idle} of {len(tasks)} tasks trained nothing"

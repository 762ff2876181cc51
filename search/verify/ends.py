"""Rules of a study's budgets and its strategy: how far its trials may go, and which go on."""

from collections import Counter
from datetime import datetime, timedelta

import numpy as np

from search.verify.evidence import Evidence, Found
from storage.outcome import NEVER_AMONG_THE_BEST, Outcome
from storage.ranks import Rank

# A worker asks whether the GPU-hours are spent with the statement that records an epoch.
AT_ONCE = timedelta(seconds=1)


def none_of_the_best_was_given_up(evidence: Evidence) -> Found:
    """A paused trial is pruned only if it is not among the best third, and if another completed."""
    completed = [trial.ended for trial in evidence.trials if trial.outcome == Outcome.COMPLETE]
    first = min((ended for ended in completed if ended), default=None)
    at_epoch: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for trial in evidence.trials:
        ended = trial.ended if trial.outcome == Outcome.PRUNED and trial.epochs else None
        if ended is None or NEVER_AMONG_THE_BEST not in (trial.attempts[-1].reason or ""):
            continue
        if first is None or first > ended:
            yield trial.number, "was given up before any trial had completed"
        last = trial.epochs[-1]
        if last.epoch not in at_epoch:
            at_epoch[last.epoch] = _at(evidence, last.epoch)
        values, recorded = at_epoch[last.epoch]
        rank = _rank(values[recorded <= ended.timestamp()], last.value)
        if rank.is_among_the_best:
            where = f"{rank.better} of {rank.peers} were better after epoch {last.epoch}"
            yield trial.number, f"was given up as never among the best, but {where}"


def _at(evidence: Evidence, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The trials' values after an epoch, and when they were recorded, in seconds."""
    rows = [row for trial in evidence.trials for row in trial.epochs if row.epoch == epoch]
    values = [np.nan if row.value is None else row.value for row in rows]
    return np.array(values), np.array([row.recorded.timestamp() for row in rows])


def _rank(peers: np.ndarray, own: float | None) -> Rank:
    """The rank of a value among those of all trials that had been there; NaN is the lowest."""
    better = ~np.isnan(peers) if own is None else peers > own
    return Rank(int(better.sum()), len(peers))


def trials_stop_where_the_strategy_decides(evidence: Evidence) -> Found:
    config = evidence.config
    rungs, only_there = config.rungs(), config.study.strategy in ("promote", "asha")
    for trial in evidence.trials:
        for row in trial.attempts:
            reason = row.reason or ""
            if row.outcome != Outcome.PAUSED and not reason.startswith(("paused after", "pruned after")):
                continue
            last = max((one.epoch for one in trial.epochs if one.attempt <= row.number), default=-1)
            decides = last in rungs if only_there else bool(rungs) and last >= rungs[0]
            if not decides or config.audits(trial.number):
                yield trial.number, f"was stopped after epoch {last}; the strategy decides at {rungs}"


def the_budget_of_trials_is_used_up(evidence: Evidence) -> Found:
    begun = [trial for trial in evidence.trials if trial.state != "WAITING"]
    allowed = evidence.entry.max_trials
    # Spent GPU-hours end a study earlier.
    if len(begun) > allowed or (len(begun) < allowed and evidence.max_gpu_seconds is None):
        yield None, f"was allowed {allowed} trials, and {len(begun)} have begun"


def the_budget_of_gpu_hours_is_kept(evidence: Evidence) -> Found:
    """Once it is spent, an attempt records at most the epoch that it is in."""
    spent = _spent_at(evidence)
    for trial in evidence.trials:
        late = Counter(row.attempt for row in trial.epochs if spent and row.recorded > spent + AT_ONCE)
        for attempt, epochs in late.items():
            if epochs > 1:
                yield trial.number, f"was trained {epochs} epochs after the end, by attempt {attempt}"


def _spent_at(evidence: Evidence) -> datetime | None:
    """When the GPU-hours were spent: the time in which workers held trials, whatever their number."""
    if evidence.max_gpu_seconds is None:
        return None
    changes = []
    for row in evidence.attempts:
        changes += [
            (row.claimed, 1, row.worker_id),
            (row.released or row.lease_until, -1, row.worker_id),
        ]
    left, held, last = timedelta(seconds=evidence.max_gpu_seconds), Counter[str](), datetime.max
    for moment, step, worker in sorted(changes):
        workers = sum(count > 0 for count in held.values())
        if workers and (moment - last) * workers >= left:
            return last + left / workers
        left -= (moment - last) * workers if workers else timedelta()
        held[worker] += step
        last = moment
    return None

"""Rules of a study's budgets and its strategy: how far its trials may go, and which go on."""

from bisect import bisect_left
from collections import Counter
from datetime import datetime, timedelta

import numpy as np

from search.verify.evidence import Evidence, Found
from storage.ledger import LEASE_SECONDS
from storage.outcome import NEVER_AMONG_THE_BEST, Outcome
from storage.ranks import Rank
from storage.words import counted

# A worker asks whether the GPU-hours are spent with the statement that records an epoch. What was
# written less than this before the record may not have been seen.
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
    if len(begun) > allowed or (len(begun) < allowed and not _is_spent(evidence)):
        yield None, f"was allowed {counted(allowed, 'trial')}, and {len(begun)} began"


def the_budget_of_gpu_hours_is_kept(evidence: Evidence) -> Found:
    """Once it is spent, an attempt records that epoch, and one that was trained before it was told."""
    told = _told_at(evidence)
    for trial in evidence.trials:
        late = Counter(row.attempt for row in trial.epochs if told and row.recorded >= told)
        for attempt, epochs in late.items():
            if epochs > 2:
                yield trial.number, f"was trained {epochs} epochs after the end, by attempt {attempt}"


def _told_at(evidence: Evidence) -> datetime | None:
    """The first time that a worker recorded an epoch and was surely told that the hours are spent."""
    if evidence.max_gpu_seconds is None:
        return None
    records = sorted(row.recorded for trial in evidence.trials for row in trial.epochs)
    budget = timedelta(seconds=evidence.max_gpu_seconds)
    first = bisect_left(records, budget, key=lambda record: _gpu_time(evidence, record - AT_ONCE))
    return records[first] if first < len(records) else None


def _is_spent(evidence: Evidence) -> bool:
    if evidence.max_gpu_seconds is None:
        return False
    return _gpu_time(evidence, None) >= timedelta(seconds=evidence.max_gpu_seconds)


def _gpu_time(evidence: Evidence, moment: datetime | None) -> timedelta:
    """The time in which workers held trials, as the database knew it at a moment; by now if None.

    A worker counts once, whatever it holds. A paused one counts to the end of its lease (that of
    `atelier worker`), until it records again or its attempt ends.
    """
    total, held_until = timedelta(), dict[str, datetime]()
    held = [(row, trial) for trial in evidence.trials for row in trial.attempts]
    for row, trial in sorted(held, key=lambda pair: pair[0].claimed):
        end = row.released or row.lease_until
        if moment is not None and end > moment:
            seen = [one.recorded for one in trial.epochs if one.attempt == row.number]
            last = max((time for time in seen if time <= moment), default=row.claimed)
            end = min(moment, last + timedelta(seconds=LEASE_SECONDS))
        begin = max(row.claimed, held_until.get(row.worker_id, row.claimed))
        total += max(end - begin, timedelta())
        held_until[row.worker_id] = max(begin, end)
    return total

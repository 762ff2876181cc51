"""What must hold of workers, beside the rules of search/verify: only a simulation sees it."""

import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest

from search.verify.evidence import Evidence
from storage.outcome import LEFT
from tests.simulation.process import Process

LOST = re.compile(r"trial (\d+) is (?:no longer held by this worker|held by another worker now)")


def worker_violations(evidence: Evidence, processes: Iterable[Process]) -> Iterator[str]:
    """What does not hold."""
    for process in processes:
        worker = process.worker and process.worker.ledger.worker_id
        if worker in evidence.workers:
            yield from _lost_what_it_had_ended(evidence, process, worker)
            yield from _left_a_trial_behind(evidence, process, worker)


def _lost_what_it_had_ended(evidence: Evidence, process: Process, worker: str) -> Iterator[str]:
    """A worker takes a trial for lost only if another has it."""
    lost = _lost(process)
    for trial in evidence.trials:
        outcomes = [row.outcome for row in trial.attempts if row.worker_id == worker]
        # Without any, it was another study, which a user has deleted.
        if trial.number in lost and outcomes and "lost" not in outcomes:
            what = f"{process.name} has {outcomes} of trial {trial.number}"
            yield f"no_success_is_taken_for_a_loss: {what}"


def _lost(process: Process) -> set[int]:
    """The trials that it has said to be lost."""
    return {int(match[1]) for text in process.said if (match := LOST.search(text))}


def _left_a_trial_behind(evidence: Evidence, process: Process, worker: str) -> Iterator[str]:
    """Who signs off gives back what it holds, and has not lost before."""
    stopped = evidence.workers[worker].stopped
    if stopped is None or process.exit_code not in (0, 3, 4, 130):
        return
    lost = _lost(process)
    for trial in evidence.trials:
        if trial.number in lost:  # when SLURM is wrong, others take it for gone
            continue
        for row, successor in zip_longest(trial.attempts, trial.attempts[1:]):
            was_left = row.worker_id == worker and row.reason == LEFT and row.lease_until > stopped
            if was_left and (successor is None or successor.claimed >= stopped):
                yield f"who_signs_off_holds_nothing: {process.name} left trial {trial.number} behind"

"""What must hold of workers, beside the rules of search/verify: only a simulation sees it."""

import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import pairwise, zip_longest

from search.verify.attempts import was_a_lost_reply
from search.verify.evidence import Evidence
from storage.outcome import LEFT
from tests.simulation.process import Process

AWHILE = 3600.0  # seconds between what SLURM says and the claim that believes it, at most
ROUNDED = 1e-6  # seconds: PostgreSQL's times are
BUG = re.compile(r"^(?:Attribute|Assertion|Index|Key|Name|Type|Unbound\w+)Error\b", re.MULTILINE)
LOST = re.compile(r"trial (\d+) is (?:no longer held by this worker|held by another worker now)")


def worker_violations(evidence: Evidence, processes: Iterable[Process]) -> Iterator[str]:
    """What does not hold."""
    for process in processes:
        for what in process.wrote:
            yield f"a_checkpoint_follows_the_record: {process.name} {what}"
        worker = process.worker and process.worker.ledger.worker_id
        if worker in evidence.workers:
            yield from _lost_what_it_had_ended(evidence, process, worker)
            yield from _left_a_trial_behind(evidence, process, worker)
            yield from _blamed_a_trial_for_its_company(evidence, process, worker)
            yield from _lost_what_it_still_held(evidence, process, worker)
            yield from _met_a_bug(evidence, process, worker)


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
    if stopped is None or process.exit_code not in (0, 3, 4, 130) or _was_denied(process, stopped):
        return
    lost = _lost(process)
    for trial in evidence.trials:
        if trial.number in lost:
            continue
        for row, successor in zip_longest(trial.attempts, trial.attempts[1:]):
            was_left = row.worker_id == worker and row.reason == LEFT and row.lease_until > stopped
            was_left = was_left and not was_a_lost_reply(evidence, trial, row)
            if was_left and (successor is None or successor.claimed >= stopped):
                yield f"who_signs_off_holds_nothing: {process.name} left trial {trial.number} behind"


def _blamed_a_trial_for_its_company(evidence: Evidence, process: Process, worker: str) -> Iterator[str]:
    """A trial without memory beside others is tried again alone."""
    for trial in evidence.trials:
        row = trial.attempts[-1] if trial.attempts else None
        is_blamed = row and row.worker_id == worker and (row.reason or "").startswith("out of memory\n")
        if is_blamed and not process.was_alone.get(trial.number, True):
            yield f"company_is_not_the_trials_fault: {process.name} has ended trial {trial.number}"


def _lost_what_it_still_held(evidence: Evidence, process: Process, worker: str) -> Iterator[str]:
    """A living worker loses no trial within its lease, whatever SLURM leaves unsaid."""
    for trial in evidence.trials:
        for row, successor in pairwise(trial.attempts):
            taken = successor.claimed
            is_early = row.worker_id == worker and row.reason == LEFT and taken < row.lease_until
            lived = process.ended > taken.timestamp() + ROUNDED
            excused = _was_denied(process, taken) or was_a_lost_reply(evidence, trial, row)
            if is_early and lived and not excused:
                yield f"the_living_keep_their_trials: {process.name} lost trial {trial.number}"


def _met_a_bug(evidence: Evidence, process: Process, worker: str) -> Iterator[str]:
    """An error of the program itself is nobody's fault but ours, whatever else happened just then."""
    for trial in evidence.trials:
        for row in trial.attempts:
            if row.worker_id == worker and BUG.search(row.reason or ""):
                yield f"no_bug_is_met: {process.name} gave trial {trial.number} back: {row.reason}"


def _was_denied(process: Process, moment: datetime) -> bool:
    """Whether SLURM had said that it is gone. Who was told so may act on it later."""
    return any(-ROUNDED < moment.timestamp() - lie < AWHILE for lie in process.lies)

"""Whose fault an error is, and what it does to the trial and to the worker: one table."""

import logging
import traceback
from enum import Enum, auto

from optuna.exceptions import UpdateFinishedTrialError

from dashboards.terminal import printable
from search.claims import RefusedError, SpoiltStudyError
from search.exit_codes import ExitCode
from search.stopping import Stop
from storage.ledger import Claim, LeaseLost, Ledger
from storage.liveness import host
from storage.optuna_storage import DATABASE_ERRORS
from storage.outcome import SICK_HOST, Outcome
from trainer.checkpoint import CheckpointError
from trainer.device import is_device_fault, is_out_of_memory

log = logging.getLogger(__name__)


class Fault(Enum):
    """What an error means: how the trial's attempt ends, and whether the worker ends too.

    Without an outcome nothing is written. After ERROR the trial is tried again, last of all.
    """

    DATABASE = auto(), None, True  # away: what is held is given back at sign-off, or its lease ends
    LEASE = auto(), None, False  # another worker holds the trial, or it was deleted
    ENDED = auto(), Outcome.RELEASED, False  # somebody has ended the trial: `release` finds that out
    MACHINE = auto(), Outcome.RELEASED, True  # this machine's files, or the whole study
    REFUSED = auto(), Outcome.FAILED, False  # the parameters are not in the study's space
    CROWDED = auto(), Outcome.RELEASED, False  # no memory beside the others; the worker takes fewer
    STOPPING = auto(), Outcome.RELEASED, False  # the job's processes are being ended
    MEMORY = auto(), Outcome.PRUNED, False  # no memory for the trial alone; so the sampler learns it
    HOST = auto(), Outcome.ERROR, True  # nothing works on this host
    TRIAL = auto(), Outcome.ERROR, False  # the trial's own
    BAD_TRIAL = auto(), Outcome.FAILED, False  # the trial's own, once too often

    def __init__(self, _: object, outcome: Outcome | None, ends_worker: bool) -> None:
        self.outcome, self._ends_worker = outcome, ends_worker

    def ends_worker(self, error: Exception) -> bool:
        """Whether the worker cannot go on after it; with a broken GPU it never can."""
        return self._ends_worker or is_device_fault(error)


# Errors that say by their type what they mean.
BY_TYPE: tuple[tuple[tuple[type[Exception], ...], Fault], ...] = (
    (DATABASE_ERRORS, Fault.DATABASE),
    ((LeaseLost,), Fault.LEASE),
    ((UpdateFinishedTrialError,), Fault.ENDED),
    ((CheckpointError, OSError, SpoiltStudyError), Fault.MACHINE),
    ((RefusedError,), Fault.REFUSED),
)


class SickHostError(RuntimeError):
    """Nothing works on this host, whatever the trial. The message is one line."""

    exit_code = ExitCode.FAILED


class Blame:
    """Finds whose fault an error is. It remembers what has worked on this host so far."""

    def __init__(self, ledger: Ledger, stop: Stop, max_failures: int, device_name: str | None) -> None:
        self._ledger, self._stop, self._max_failures = ledger, stop, max_failures
        self._device_name = device_name
        self.made_progress = False  # at least one optimizer step
        self._failed_before: set[int] = set()  # trials that failed here before that

    def judge(self, claim: Claim, error: Exception, in_company: bool) -> Fault:
        """What an error of the claim's trial means, which is logged. To be called once for each error.

        `in_company` says whether other trials are in training.
        """
        for types, fault in BY_TYPE:
            if isinstance(error, types):
                return fault
        if is_out_of_memory(error) and in_company:
            return Fault.CROWDED
        log.error("trial %d: %s", claim.trial_number, whole_text(error))
        if self._stop.requested:
            return Fault.STOPPING
        if is_out_of_memory(error):
            return Fault.MEMORY
        if self._blames_host(claim, error):
            return Fault.HOST
        is_bad = self._ledger.is_bad(claim, self._max_failures)
        return Fault.BAD_TRIAL if is_bad else Fault.TRIAL

    def _blames_host(self, claim: Claim, error: Exception) -> bool:
        """Whether it is the host's: a second trial fails before any has passed a step, or CUDA does."""
        if self.made_progress:
            return False
        self._failed_before.add(claim.trial_id)
        return len(self._failed_before) > 1 or is_device_fault(error)

    def sick_host(self, error: Exception) -> SickHostError:
        """What ends the worker on a sick host."""
        where = " ".join(filter(None, [host(), self._device_name]))
        [said] = traceback.format_exception_only(error)[:1]
        return SickHostError(
            f"{SICK_HOST} {where}: no trial has passed a first step there; what failed waits for "
            f"another: {printable(said.splitlines()[0])}"
        )


def whole_text(error: Exception) -> str:
    """The error with its traceback."""
    return "".join(traceback.format_exception(error))

"""The table of what must hold of a study: each rule, when it holds, and what to do if not."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum, auto
from operator import attrgetter
from typing import Any

from search.verify import attempts, curves, ends, files
from search.verify.evidence import Evidence, Found, Reference


class Holds(IntEnum):
    """Of which studies a rule holds. A later one has all that the earlier ones have."""

    ALWAYS = auto()  # of any study, at any moment
    ENDED = auto()  # of a study that has ended by itself
    UNDISTURBED = auto()  # of one that only its workers touched; its budgets never became less


@dataclass(frozen=True)
class Rule:
    """One row of the table. `needs` says whether the evidence is there."""

    holds: Holds
    check: Callable[[Evidence], Found]
    remedy: str
    needs: Callable[[Evidence], Any] = lambda _: True

    @property
    def name(self) -> str:
        return self.check.__name__


LOGS = "see what its workers did: atelier logs {study} --trial {trial}"
REPLAY = "see whether its curve can be believed: atelier replay {study} --trial {trial}"
ROWS = "rows were lost or changed; go on with a backup: atelier db restore FILE"
STATUS = "see: atelier status {study}"
REPORT = "report it, with the tables of: atelier db backup FILE"
AWAY = "move that file away; its trial goes on from another checkpoint, or begins again"
WITHOUT = "move its file away; without it, no interval of this trial is shown"
PRUNE = "remove it: atelier db prune {study}"

ALWAYS, ENDED, UNDISTURBED = Holds
FILES, REFERENCE = attrgetter("has_files"), attrgetter("reference")
RULES = (
    Rule(ALWAYS, attempts.trials_are_numbered_without_a_gap, ROWS),
    Rule(ALWAYS, attempts.rows_are_of_the_study_of_their_trial, ROWS),
    Rule(ALWAYS, attempts.attempts_are_numbered_without_a_gap, ROWS),
    Rule(ALWAYS, attempts.an_attempt_begins_when_the_one_before_has_ended, LOGS),
    Rule(ALWAYS, attempts.a_lost_trial_is_taken_when_its_lease_has_ended, LOGS),
    Rule(ALWAYS, attempts.an_attempt_that_has_ended_says_how, LOGS),
    Rule(ALWAYS, attempts.a_worker_takes_trials_while_it_is_signed_on, LOGS),
    Rule(ALWAYS, attempts.a_trial_ends_once, LOGS),
    Rule(ALWAYS, curves.a_trained_trial_has_parameters_of_the_space, ROWS),
    Rule(ALWAYS, curves.a_rerun_has_the_parameters_of_the_plan, REPORT),
    Rule(ALWAYS, curves.epochs_are_on_record_once, ROWS),
    Rule(ALWAYS, curves.an_epoch_is_of_an_attempt, LOGS),
    Rule(ALWAYS, curves.a_trial_goes_forward_through_the_stream, REPLAY),
    Rule(ALWAYS, curves.a_value_is_what_the_numbers_give, REPLAY),
    Rule(ALWAYS, curves.optuna_was_told_the_same, REPLAY),
    Rule(ALWAYS, curves.a_complete_trial_has_its_epochs_and_its_score, REPLAY),
    Rule(ALWAYS, curves.an_ended_trial_has_one_score, REPLAY),
    Rule(ALWAYS, curves.training_ends_where_the_loss_is_not_finite, REPLAY),
    Rule(ALWAYS, curves.a_curve_is_that_of_an_undisturbed_run, REPLAY, REFERENCE),
    Rule(ALWAYS, ends.none_of_the_best_was_given_up, REPORT),
    Rule(ALWAYS, files.predictions_are_of_the_epochs_on_record, WITHOUT, FILES),
    Rule(ALWAYS, files.a_checkpoint_is_of_an_attempt_on_record, AWAY, FILES),
    Rule(ALWAYS, files.an_older_checkpoint_is_whole, AWAY, FILES),
    Rule(ENDED, files.nothing_is_left, PRUNE, FILES),
    Rule(UNDISTURBED, attempts.every_trial_was_ended_by_a_worker, LOGS),
    Rule(UNDISTURBED, attempts.no_trial_has_failed, LOGS),
    Rule(UNDISTURBED, ends.the_budget_of_trials_is_used_up, STATUS),
    Rule(UNDISTURBED, ends.the_budget_of_gpu_hours_is_kept, LOGS),
    Rule(UNDISTURBED, ends.trials_stop_where_the_strategy_decides, LOGS),
    Rule(UNDISTURBED, files.a_complete_trial_has_its_predictions, LOGS, FILES),
)


@dataclass(frozen=True)
class Finding:
    """Where a rule does not hold, and what to do next."""

    rule: str
    trial: int | None  # its number; None for the whole study
    text: str  # what is wrong with it
    remedy: str

    def __str__(self) -> str:
        where = "the study" if self.trial is None else f"trial {self.trial}"
        return f"{where} {self.text}; {self.remedy}"


def rules_for(evidence: Evidence, kind: Holds) -> list[Rule]:
    """The rules that hold of such a study, and for which there is the evidence."""
    return [rule for rule in RULES if rule.holds <= kind and rule.needs(evidence)]


def violations(
    evidence: Evidence, kind: Holds = ALWAYS, reference: Reference | None = None
) -> list[Finding]:
    """Where the rules that hold of such a study are broken; empty if all is well.

    With a `reference` the curves are compared with it too, bit for bit. It trains each trial again.
    """
    evidence = replace(evidence, reference=reference)
    study = shlex.quote(evidence.entry.name)
    return [
        Finding(rule.name, trial, text, rule.remedy.format(study=study, trial=trial))
        for rule in rules_for(evidence, kind)
        for trial, text in rule.check(evidence)
    ]

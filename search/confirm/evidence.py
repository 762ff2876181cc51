"""What a confirmation shows of each candidate, and whether there is a winner."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import sqlalchemy as sa

from dashboards.predictions import PredictionsError, attribute_sizes, predictions_of
from search.confirm.intervals import (
    Estimate,
    Runs,
    compare,
    hits,
    per_class_accuracy,
    seed_flips,
    selection_bias,
)
from search.confirm.plan import SUFFIX, ConfirmationFile, recorded
from storage.status import State, Status, TrialRow, difference_line, read_status
from storage.studies import StudyEntry, study_entry

WINS = 0.96  # a candidate that is the best with this probability has won
DROPPED = 0.01  # below this probability it gets no further reruns
# Why a rerun is pruned before its first epoch.
CANNOT_WIN = "cannot win any more"
NEAR_ENOUGH = "a candidate is known to be as near to the best as was asked for"
LEAST_RERUNS = 2  # of different seeds or folds, before anything is said of a candidate
WINNING_RERUNS = 5  # of a winner; with fewer no paired test of them alone reaches 5 % (1/2**5 = 3 %)
# Of a winner, of each attribute: what luck does to fewer is far from a normal distribution.
WINNING_IMAGES = 10
ABOUT = 0.95  # so large a share of the training images counts as about as many
MOST_RIVALS = 100  # trials of the search that show how lucky the first one is


@dataclass(frozen=True)
class Candidate:
    """One trial of the search, and what its reruns say. Scores are average per-class accuracies."""

    number: int  # in the search
    params: dict[str, Any]
    searched: float | None  # in the search; None if its predictions are not here
    seeds: int  # complete reruns, each with a seed of its own
    failed: int  # reruns that failed, diverged, or ran out of memory
    passed_over: bool  # it could not win any more, so it got no further reruns
    estimate: Estimate | None  # None while there are too few reruns


@dataclass(frozen=True)
class Confirmation:
    """A confirmation as it stands. `candidates` are ranked, the leader first.

    `optimism` says how much too high the search's accuracy of its first trial probably is. One part is
    what fresh seeds do not repeat. The other is luck with the images, which they do repeat: see
    `selection_bias`. Below 0 the accuracy is too low. None if the search is ranked by another score, or
    if folds train on more or fewer images than it did.
    """

    study: str  # the search
    linked: str  # the name of the study that the reruns are trials of
    reruns: int  # that have ended
    max_reruns: int
    seeds: int  # wanted of each candidate, in each fold
    folds: int | None  # None if the validation split judges all reruns
    rarest: int  # images of the rarest attribute; 0 if that is not on record
    candidates: list[Candidate]
    optimism: float | None
    overtaken: list[int]  # trials that would be candidates, had the confirmation begun today
    left_out: int  # reruns that nobody needed, as a candidate was near enough
    within: float | None  # points: how near was asked for
    difference: str  # which reruns have epochs that differ from their record, in words; empty for none

    @property
    def finished(self) -> bool:
        """Whether every candidate has its reruns, or was given up."""
        return self.reruns >= self.max_reruns

    @property
    def leader(self) -> Candidate | None:
        """The candidate with the highest mean; None before the first estimate."""
        return self.candidates[0] if self.candidates[0].estimate else None

    @property
    def winner(self) -> Candidate | None:
        """The candidate that is surely the best: see WINS, WINNING_RERUNS and WINNING_IMAGES.

        None before the end.
        """
        # Not before the end: whoever looks often enough sees any candidate win for a while. And none of
        # whose reruns failed: it may have lost its bad seeds, or its rivals.
        first = self.leader
        if first is None or first.estimate is None or not self._is_decided or first.failed:
            return None
        is_known = first.seeds >= WINNING_RERUNS and self.rarest >= WINNING_IMAGES
        return first if is_known and first.estimate.best >= WINS else None

    @property
    def choice(self) -> Candidate | None:
        """The candidate that is the least behind the best one, with 95 %. None before the end."""
        if not self._is_decided:
            return None
        return min(
            (one for one in self.candidates if one.estimate and not one.failed),
            key=lambda one: one.estimate.within if one.estimate else 1.0,
            default=None,
        )

    @property
    def _is_decided(self) -> bool:
        several = len(self.candidates) > 1
        return self.finished and several and all(one.estimate for one in self.candidates)

    def as_dict(self) -> dict[str, Any]:
        """For programs: what `--json` prints. This form stays stable."""
        winner, choice = self.winner, self.choice
        return asdict(self) | {
            "finished": self.finished,
            "winner": None if winner is None else winner.number,
            "choice": None if choice is None else choice.number,
        }


def read_confirmation(
    bind: sa.Engine | sa.Connection, search: StudyEntry, searched: Status
) -> Confirmation | None:
    """What is known of a search's leaders by now. None if nobody asked for a confirmation.

    Raises PredictionsError if the predictions of a complete rerun cannot be read.
    """
    linked = study_entry(bind, search.name + SUFFIX)
    if linked is None or (plan := recorded(linked)) is None:
        return None
    status = read_status(bind, linked.study_id, linked.name)
    ranking = searched.completed()
    numbers = [candidate["number"] for candidate in plan.candidates]
    predicted = _searched(search, ranking, numbers)
    evidence = _Evidence(linked, plan, status.trials)
    candidates = []
    for number, planned in zip(numbers, plan.candidates, strict=True):
        candidates.append(
            Candidate(
                number=number,
                params=planned["params"],
                searched=predicted.accuracy.get(number),
                seeds=evidence.reruns[number],
                failed=len(_failed(status.trials, number)),
                passed_over=_is_passed_over(status.trials, number),
                estimate=evidence.estimates.get(number),
            )
        )
    candidates.sort(key=lambda candidate: -candidate.estimate.score.value if candidate.estimate else 0.0)
    return Confirmation(
        study=search.name,
        linked=linked.name,
        reruns=status.finished,
        max_reruns=status.max_trials,
        seeds=plan.seeds,
        folds=plan.folds,
        rarest=rarest(linked),
        candidates=candidates,
        optimism=_optimism(search, predicted, numbers[0], evidence, plan.folds),
        overtaken=[row.number for row in ranking[: len(numbers)] if row.number not in numbers],
        left_out=sum(row.reason == NEAR_ENOUGH for row in status.trials),
        within=plan.within,
        difference=difference_line(status.trials),
    )


@dataclass(frozen=True)
class _Searched:
    """What the search's best trials predicted: hits and accuracies by number."""

    runs: dict[int, np.ndarray]
    accuracy: dict[int, float]
    labels: np.ndarray | None


def _searched(search: StudyEntry, ranking: Sequence[TrialRow], candidates: Sequence[int]) -> _Searched:
    """What the best trials and the candidates predicted. Empty if there are no files of that here."""
    runs, labels = {}, None
    numbers = dict.fromkeys([*(row.number for row in ranking[:MOST_RIVALS]), *candidates])
    for number in numbers:
        try:
            predictions = predictions_of(search, number)
        except PredictionsError:
            continue
        runs[number], labels = hits(predictions), predictions.labels
    sizes = attribute_sizes(search)
    if labels is None:
        return _Searched({}, {}, None)
    accuracy = {number: per_class_accuracy(run, labels, sizes) for number, run in runs.items()}
    return _Searched(runs, accuracy, labels)


def rarest(entry: StudyEntry) -> int:
    """How many of the images that judge a study's trials have the rarest attribute that any has.

    0 if that is not on record, as of an early version.
    """
    return min((row["images"] for row in entry.attributes if row["images"]), default=0)


def _training_images(entry: StudyEntry) -> int:
    """How many images a study's trials learn from; 0 of an earlier version, which did not say it."""
    first = entry.attributes[0]["category"]
    return sum(row.get("train_images", 0) for row in entry.attributes if row["category"] == first)


def _optimism(
    search: StudyEntry, searched: _Searched, first: int, evidence: "_Evidence", folds: int | None
) -> float | None:
    estimate = evidence.estimates.get(first)
    by_accuracy = search.settings["study"]["score"] == "mean-last-5"
    if not by_accuracy or estimate is None or searched.labels is None or first not in searched.runs:
        return None
    learned = [_training_images(one) for one in (search, evidence.linked)]
    if folds and min(learned) < ABOUT * max(learned):
        return None
    sizes = attribute_sizes(search)
    luck = selection_bias([*searched.runs.values()], searched.labels, sizes, evidence.seed_flips)
    # Of the images of all folds, only that share are the search's.
    return searched.accuracy[first] - estimate.score.value + luck / (folds or 1)


class _Evidence:
    """The hits of a confirmation's complete trials, and the estimates from them.

    Raises PredictionsError.
    """

    def __init__(self, linked: StudyEntry, plan: ConfirmationFile, trials: Sequence[TrialRow]) -> None:
        self.linked = linked
        complete = [row for row in trials if row.state == State.COMPLETE]
        self._sizes, self._has_folds = attribute_sizes(linked), bool(plan.folds)
        self.reruns = Counter(row.params["candidate"] for row in complete)
        # By candidate, then by fold and seed. Without folds all reruns are of fold 0.
        self._runs: dict[int, dict[tuple[int, int], np.ndarray]] = {}
        labels = {}  # by fold; they are the same in all its reruns
        for row in complete:
            predictions = predictions_of(linked, row.number)
            fold, candidate = row.params.get("fold", 0), row.params["candidate"]
            self._runs.setdefault(candidate, {})[fold, row.params["seed"]] = hits(predictions)
            labels[fold] = predictions.labels
        self._labels = dict(sorted(labels.items()))
        # Reruns of one fold alone would not show how trainings differ.
        rounds = {n: {rerun[0 if plan.folds else 1] for rerun in runs} for n, runs in self._runs.items()}
        self._enough = {n: runs for n, runs in self._runs.items() if len(rounds[n]) >= LEAST_RERUNS}

    @property
    def _compared(self) -> tuple[Runs, np.ndarray, list[int], np.ndarray | None]:
        """What `compare` takes."""
        folds = np.repeat([*self._labels], [len(one) for one in self._labels.values()])
        labels = np.concatenate([*self._labels.values()])
        return [*self._enough.values()], labels, self._sizes, folds if self._has_folds else None

    @property
    def seed_flips(self) -> float:
        """See search.confirm.intervals.seed_flips."""
        return seed_flips(*self._compared)

    @cached_property
    def estimates(self) -> dict[int, Estimate]:
        """The estimates of the candidates that have enough reruns, by number."""
        if not self._enough:
            return {}
        return dict(zip(self._enough, compare(*self._compared), strict=True))


def gains_nothing(engine: sa.Engine, confirmation: str, candidate: int) -> str | None:
    """Why a candidate is worth no further rerun. None if it is worth one.

    `confirmation` is the name of the linked study.
    """
    linked = study_entry(engine, confirmation)  # anew: who asks for it may have changed what is wanted
    if linked is None or (plan := recorded(linked)) is None:
        return None
    trials = read_status(engine, linked.study_id, linked.name).trials
    if _is_passed_over(trials, candidate):
        return CANNOT_WIN  # once for all: else it would lack some of the others' reruns
    try:
        estimates = _Evidence(linked, plan, trials).estimates
    except PredictionsError:
        return None  # a missing file is not this trial's fault
    if candidate in estimates and estimates[candidate].best < DROPPED:
        return CANNOT_WIN
    if plan.within and len(estimates) == len(plan.candidates):
        nearest = min(
            (one.within for number, one in estimates.items() if not _failed(trials, number)), default=1.0
        )
        return NEAR_ENOUGH if 100 * nearest <= plan.within else None
    return None


def _is_passed_over(trials: Sequence[TrialRow], candidate: int) -> bool:
    """Whether a candidate has been found to win no more."""
    return any(row.reason == CANNOT_WIN and row.params.get("candidate") == candidate for row in trials)


def _failed(trials: Sequence[TrialRow], candidate: int) -> list[TrialRow]:
    """The reruns of a candidate that failed, diverged, or ran out of memory."""
    ended = (State.PRUNED, State.FAILED)
    return [
        row
        for row in trials
        if row.params.get("candidate") == candidate
        and row.state in ended
        and row.reason not in (CANNOT_WIN, NEAR_ENOUGH)
    ]

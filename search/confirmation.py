"""`atelier confirm`: the leaders of a study on fresh seeds, and who of them can be believed.

The reruns are ordinary trials of a linked study, so the same workers and arrays train them. Its trial
n is candidate n mod K with seed n div K: all candidates get a seed before the next one begins, and the
same seeds. A candidate that cannot win any more is passed over.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from rich.console import Group, RenderableType
from rich.text import Text

from dashboards.terminal import Grid
from search.confirm.intervals import Estimate, churn, compare, flattery, hits, per_class_accuracy
from search.errors import InputError
from search.study import check_reader
from search.study_config import StudyFile
from search.toml_file import validate
from storage.paths import RunFolder
from storage.status import TrialRow, read_status
from storage.studies import StudyEntry, study_entry
from trainer.config import TrainConfig
from trainer.predictions import Predictions

SUFFIX = "-confirm"  # of the linked study's name
TOP, SEEDS = 5, 5  # with three seeds, no paired test can reach significance
WINS = 0.95  # the probability of being best from which on a candidate has won
DROPPED = 0.01  # the one below which it gets no further seeds
CANNOT_WIN = "cannot win any more"  # then the reason why a rerun is pruned before its first epoch
TIED = 0.05  # the one from which on a candidate is named in a tie
LEAST_SEEDS = 2  # before anything is said of a candidate
WINNING_SEEDS = 5  # of a winner: with fewer no paired test of the seeds alone reaches 5 % (1/2**5 = 3 %)
MOST_RIVALS = 100  # trials of the search that are looked at for the luck of the first
MOST_TRIALS = 10**6


class Plan(BaseSampler):
    """An Optuna sampler that samples nothing: each trial's parameters follow from its number."""

    def __init__(self, candidates: Sequence[Mapping[str, Any]], seed: int) -> None:
        self._candidates, self._seed = candidates, seed

    def infer_relative_search_space(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self,
        study: optuna.Study,
        trial: optuna.trial.FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: optuna.trial.FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        turn, index = divmod(trial.number, len(self._candidates))
        candidate = self._candidates[index]
        # The search's own seed has had its luck.
        own = {"candidate": candidate["number"], "seed": (self._seed + 1 + turn) % 2**32}
        return (own | candidate["params"])[param_name]


class ConfirmationFile(StudyFile):
    """What a study file is to a search; made from what is on record of the search."""

    confirms: str  # the search's name
    candidates: list[dict[str, Any]]  # {"number", "params"} of its trials
    dataset: str  # the fingerprint of the search's

    @property
    def made_on(self) -> str:
        return self.dataset

    def corners(self) -> Iterator[dict[str, Any]]:
        """The candidates: nothing else is trained."""
        return (one["params"] for one in self.candidates)

    def config(self, params: dict[str, Any]) -> TrainConfig:
        """The full configuration of a trial with these parameters."""
        return super().config({key: value for key, value in params.items() if key != "candidate"})

    def distributions(self) -> dict[str, BaseDistribution]:
        """The search's space, and which of its trials is run again with which seed."""
        own = {"candidate": IntDistribution(0, MOST_TRIALS), "seed": IntDistribution(0, 2**32 - 1)}
        return own | super().distributions()

    def identity(self) -> dict[str, Any]:
        """As of the search, and the candidates, which must not change."""
        return super().identity() | {"confirms": {"study": self.confirms, "candidates": self.candidates}}

    def make_sampler(self, first: Sequence[Mapping[str, Any]]) -> BaseSampler:
        return Plan(self.candidates, self.shared.seed)


def recorded(entry: StudyEntry) -> ConfirmationFile | None:
    """The confirmation that a study on record is; None if it is a search."""
    if "confirms" not in entry.settings:
        return None
    confirms = entry.settings["confirms"]
    seeds = entry.max_trials // len(confirms["candidates"])
    return _confirmation_file(entry, confirms["study"], confirms["candidates"], seeds)


def _confirmation_file(
    entry: StudyEntry, search: str, candidates: list[dict[str, Any]], seeds: int
) -> ConfirmationFile:
    """The confirmation of a search's trials, with the settings of a study that is on record."""
    file = StudyFile.from_record(entry)
    tables = file.model_dump() | {"slurm": file.slurm}
    tables["study"] |= {
        "name": search + SUFFIX,
        "score": "mean-last-5",
        "max_trials": len(candidates) * seeds,
        "strategy": "none",
    }
    own = {"confirms": search, "candidates": candidates, "dataset": entry.dataset}
    return validate(ConfirmationFile, tables | own, f"confirmation of {search!r}")


def plan(engine: sa.Engine, search: StudyEntry, top: int | None, seeds: int | None) -> ConfirmationFile:
    """The confirmation that is on record, with more seeds if asked for; else a new one.

    Raises InputError if there is nothing to confirm, or if it was begun otherwise.
    """
    check_reader(search)
    linked = study_entry(engine, search.name + SUFFIX)
    if linked is None:
        status = read_status(engine, search.study_id, search.name)
        chosen = status.completed()
        if not chosen or len(chosen) < (top or 1):
            found = f"only {len(chosen)} complete trials" if chosen else "no complete trial"
            raise InputError(f"study {search.name!r} has {found} yet; see: atelier status {search.name}")
        candidates = [{"number": row.number, "params": row.params} for row in chosen[: top or TOP]]
        return _confirmation_file(search, search.name, candidates, seeds or SEEDS)
    begun = recorded(linked)
    if begun is None:
        raise InputError(f"{linked.name!r} is the name of a search; a confirmation cannot have it too")
    known, given = len(begun.candidates), begun.study.max_trials // len(begun.candidates)
    if top not in (None, known):
        raise InputError(
            f"--top {top}: the confirmation was begun with {known}; to begin anew, first delete "
            f"{linked.name!r} in the dashboard"
        )
    if seeds is not None and seeds < given:
        raise InputError(f"--seeds {seeds}: each candidate has {given} already; allowed are more")
    return _confirmation_file(linked, search.name, begun.candidates, seeds or given)


@dataclass(frozen=True)
class Candidate:
    """One trial of the search, and what its reruns say. Scores are average per-class accuracies."""

    number: int  # in the search
    params: dict[str, Any]
    searched: float | None  # in the search; None if its predictions are not at hand
    seeds: int  # reruns that are complete
    failed: int  # reruns that failed, diverged, or ran out of memory
    passed_over: bool  # it could not win any more
    estimate: Estimate | None  # None while there are too few seeds


@dataclass(frozen=True)
class Confirmation:
    """A confirmation as it stands. `candidates` are ranked, the leader first.

    `optimism` is by how much the accuracy of the trial that the search puts first is expected to be too
    high: what fresh seeds do not repeat, and the luck with the images that they do
    (search.confirm.intervals.flattery). Below 0 it is too low. None if the search is ranked by something else.
    """

    study: str  # the search
    linked: str  # the name of the study that the reruns are trials of
    reruns: int  # that have ended
    max_reruns: int
    seeds: int  # wanted of each candidate
    candidates: list[Candidate]
    optimism: float | None
    overtaken: list[int]  # trials of the search that were not among the candidates and now would be

    @property
    def finished(self) -> bool:
        """Whether every candidate has its seeds, or was given up."""
        return self.reruns >= self.max_reruns

    @property
    def leader(self) -> Candidate | None:
        """The candidate with the highest mean; None before the first estimate."""
        return self.candidates[0] if self.candidates[0].estimate else None

    @property
    def winner(self) -> Candidate | None:
        """The candidate that is the best with a probability of 95 %, if there is one in the end."""
        # Not before: who looks often enough sees any candidate win for a while. And none of whose reruns
        # failed: that luck must not count, nor win by having no rivals left.
        first, rivals = self.leader, self.candidates[1:]
        if first is None or first.estimate is None or not self.finished or first.failed:
            return None
        if first.seeds < WINNING_SEEDS:
            return None
        judged = bool(rivals) and all(one.estimate for one in rivals)
        return first if judged and first.estimate.best >= WINS else None

    def as_dict(self) -> dict[str, Any]:
        """For programs: the form of `--json`, which stays stable."""
        winner = self.winner
        return asdict(self) | {
            "finished": self.finished,
            "winner": None if winner is None else winner.number,
        }


def read_confirmation(engine: sa.Engine, search: StudyEntry) -> Confirmation | None:
    """What is known of a search's leaders by now; None if nobody asked for a confirmation.

    Raises InputError if a complete rerun's predictions are not at hand.
    """
    linked = study_entry(engine, search.name + SUFFIX)
    if linked is None or (plan := recorded(linked)) is None:
        return None
    status = read_status(engine, linked.study_id, linked.name)
    found = read_status(engine, search.study_id, search.name).completed()
    numbers = [one["number"] for one in plan.candidates]
    searched = _searched(search, found, numbers)
    evidence = _Evidence(linked, status.trials)
    candidates = []
    for number, one in zip(numbers, plan.candidates, strict=True):
        ended = [
            row
            for row in status.trials
            if row.params.get("candidate") == number and row.state in ("pruned", "failed")
        ]
        given_up = [row for row in ended if row.reason == CANNOT_WIN]
        candidates.append(
            Candidate(
                number=number,
                params=one["params"],
                searched=searched.accuracy.get(number),
                seeds=len(evidence.runs.get(number, {})),
                failed=len(ended) - len(given_up),
                passed_over=bool(given_up),
                estimate=evidence.estimates.get(number),
            )
        )
    candidates.sort(key=lambda one: -one.estimate.score.value if one.estimate else 0.0)
    return Confirmation(
        study=search.name,
        linked=linked.name,
        reruns=status.finished,
        max_reruns=status.max_trials,
        seeds=status.max_trials // len(candidates),
        candidates=candidates,
        optimism=_optimism(search, searched, numbers[0], evidence),
        overtaken=[row.number for row in found[: len(numbers)] if row.number not in numbers],
    )


def attribute_sizes(entry: StudyEntry) -> list[int]:
    """How many attributes each category of the study's dataset has."""
    kinds = [row["category"] for row in entry.attributes]
    return [kinds.count(kind) for kind in dict.fromkeys(kinds)]


def predictions_of(entry: StudyEntry, number: int) -> Predictions:
    """What a complete trial predicted. Raises InputError."""
    path = RunFolder(entry.name, entry.created).predictions(number)
    sizes = attribute_sizes(entry)
    try:
        found = Predictions.load(path)
        if found.labels.shape[1] == len(sizes) and (found.labels < sizes).all():
            return found
    except (OSError, ValueError):
        pass
    raise InputError(f"{path} cannot be read; use the ATELIER_HOME that the workers used")


@dataclass(frozen=True)
class _Searched:
    """What the search's best trials predicted: hits and accuracies by number."""

    runs: dict[int, np.ndarray]
    accuracy: dict[int, float]
    labels: np.ndarray | None


def _searched(search: StudyEntry, found: Sequence[TrialRow], candidates: Sequence[int]) -> _Searched:
    """Of the best trials and the candidates; empty if they are older than this, or elsewhere."""
    runs, labels = {}, None
    numbers = dict.fromkeys([*(row.number for row in found[:MOST_RIVALS]), *candidates])
    for number in numbers:
        try:
            predictions = predictions_of(search, number)
        except InputError:
            continue
        runs[number], labels = hits(predictions), predictions.labels
    sizes = attribute_sizes(search)
    if labels is None:
        return _Searched({}, {}, None)
    accuracy = {number: per_class_accuracy(run, labels, sizes) for number, run in runs.items()}
    return _Searched(runs, accuracy, labels)


def _optimism(
    search: StudyEntry, searched: _Searched, first: int, evidence: "_Evidence"
) -> float | None:
    estimate = evidence.estimates.get(first)
    by_accuracy = search.settings["study"]["score"] == "mean-last-5"
    if not by_accuracy or estimate is None or searched.labels is None or first not in searched.runs:
        return None
    sizes = attribute_sizes(search)
    luck = flattery([*searched.runs.values()], searched.labels, sizes, evidence.churn)
    return searched.accuracy[first] - estimate.score.value + luck


class _Evidence:
    """The hits of a confirmation's complete trials, and what follows from them. Raises InputError."""

    def __init__(self, linked: StudyEntry, trials: Sequence[TrialRow]) -> None:
        self.runs: dict[int, dict[int, np.ndarray]] = {}  # by candidate and seed
        self._sizes = attribute_sizes(linked)
        for row in trials:
            if row.state == "complete":
                predictions = predictions_of(linked, row.number)
                self._labels = predictions.labels
                runs = self.runs.setdefault(row.params["candidate"], {})
                runs[row.params["seed"]] = hits(predictions)
        self._judged = {n: runs for n, runs in self.runs.items() if len(runs) >= LEAST_SEEDS}

    @property
    def churn(self) -> float:
        """See search.confirm.intervals.churn."""
        return churn([*self._judged.values()], self._labels, self._sizes)

    @cached_property
    def estimates(self) -> dict[int, Estimate]:
        """Of the candidates that have enough seeds."""
        if not self._judged:
            return {}
        known = compare([*self._judged.values()], self._labels, self._sizes)
        return dict(zip(self._judged, known, strict=True))


def cannot_win(engine: sa.Engine, linked: StudyEntry, candidate: int) -> str | None:
    """The reason, if a candidate is worth no further seed."""
    trials = read_status(engine, linked.study_id, linked.name).trials
    if any(row.reason == CANNOT_WIN and row.params.get("candidate") == candidate for row in trials):
        return CANNOT_WIN  # once and for all, else its seeds would not be those of the others
    try:
        estimate = _Evidence(linked, trials).estimates.get(candidate)
    except InputError:
        return None  # a file is missing, which is not this trial's fault
    return CANNOT_WIN if estimate is not None and estimate.best < DROPPED else None


COLUMNS = ("trial", "seeds", "search", "score", "95 % interval", "behind", "95 % interval", "best")


def render(confirmation: Confirmation) -> RenderableType:
    """The confirmation as a table, and its verdict in words."""
    table = Grid(COLUMNS)
    for one in confirmation.candidates:
        table.add(*cells(one))
    return Group(table, *(Text(line, style="bold") for line in verdict(confirmation)))


def cells(one: Candidate) -> list[str]:
    """A row of the table; percent, and points of it."""
    notes = [f"{one.failed} failed"] * (one.failed > 0) + ["out"] * one.passed_over
    row = [
        str(one.number),
        str(one.seeds) + (f" ({', '.join(notes)})" if notes else ""),
        "" if one.searched is None else f"{100 * one.searched:.2f}",
    ]
    if one.estimate is None:
        return [*row, *[""] * (len(COLUMNS) - len(row))]
    score, behind = one.estimate.score, one.estimate.behind
    return [
        *row,
        f"{100 * score.value:.2f} ± {100 * score.error:.2f}",
        f"{100 * score.low:.2f} to {100 * score.high:.2f}",
        f"{100 * behind.value:.2f}",
        f"{100 * behind.low:.2f} to {100 * behind.high:.2f}" if behind.error else "",
        f"{100 * one.estimate.best:.0f} %",
    ]


def verdict(confirmation: Confirmation) -> list[str]:
    """What follows, in sentences."""
    lines = [_who_is_best(confirmation)]
    if confirmation.optimism is not None:
        points = 100 * confirmation.optimism
        lines.append(
            "the search's figure for the trial that it puts first is expected to be too "
            f"{'low' if points < 0 else 'high'} by {abs(points):.2f} points"
        )
    if confirmation.overtaken:
        numbers = ", ".join(map(str, confirmation.overtaken))
        lines.append(
            f"trials {numbers} of the search have come in front since; to confirm them, first delete "
            f"{confirmation.linked!r} in the dashboard"
        )
    return lines


def _who_is_best(confirmation: Confirmation) -> str:
    leader, winner = confirmation.leader, confirmation.winner
    if leader is None or leader.estimate is None or not confirmation.finished:
        return f"no verdict yet: {confirmation.reruns} of {confirmation.max_reruns} reruns have ended"
    if winner is not None:
        return f"trial {winner.number} is the best of them with {100 * leader.estimate.best:.0f} %"
    if len(confirmation.candidates) == 1:
        return "one candidate alone has nobody to win against"
    best = {one.number: round(one.estimate.best, 2) for one in confirmation.candidates if one.estimate}
    tied = [str(number) for number, probability in best.items() if probability >= TIED]
    if len(tied) > 1:
        return (
            f"no winner yet: trials {', '.join(tied)} tie; more seeds may tell them apart, or choose by "
            "other reasons"
        )
    return (
        f"no winner yet: trial {leader.number} leads with {100 * leader.estimate.best:.0f} %; a winner "
        f"has {100 * WINS:.0f} %, {WINNING_SEEDS} seeds and no failed rerun"
    )

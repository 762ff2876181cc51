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
from rich.table import Table
from rich.text import Text

from dashboards.status import Status, TrialRow, read_status
from search.bootstrap import Interval, churn, compare, flattery, hits, per_class_accuracy
from search.study import InputError, StudyFile
from storage.ledger import StudyEntry, study_entry
from storage.runs import RunFolder
from trainer.config import TrainConfig
from trainer.predictions import Predictions

SUFFIX = "-confirm"  # of the linked study's name
TOP, SEEDS = 5, 5  # with three seeds, no paired test can reach significance
WINS = 0.95  # the probability of being best from which on a candidate has won
DROPPED = 0.01  # the one below which it gets no further seeds
CANNOT_WIN = "cannot win any more"  # then the reason why a rerun is pruned before its first epoch
TIED = 0.05  # the one from which on a candidate is named in a tie
LEAST_SEEDS = 2  # before anything is said of a candidate
ESTIMATES = ("score", "behind", "best")
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

    def make_sampler(self) -> BaseSampler:
        return Plan(self.candidates, self.shared.seed)


def recorded(entry: StudyEntry) -> ConfirmationFile | None:
    """The confirmation that a study on record is; None if it is a search."""
    if "confirms" not in entry.settings:
        return None
    confirms = entry.settings["confirms"]
    seeds = entry.max_trials // len(confirms["candidates"])
    return _file(entry, confirms["study"], confirms["candidates"], seeds)


def _file(
    entry: StudyEntry, search: str, candidates: list[dict[str, Any]], seeds: int
) -> ConfirmationFile:
    """The confirmation of a search's trials, with the settings of a study that is on record."""
    tables = StudyFile.from_record(entry).model_dump()
    tables["study"] |= {
        "name": search + SUFFIX,
        "score": "mean-last-5",
        "max_trials": len(candidates) * seeds,
        "pruner": "none",
    }
    return ConfirmationFile(**tables, confirms=search, candidates=candidates, dataset=entry.dataset)


def plan(engine: sa.Engine, search: StudyEntry, top: int | None, seeds: int | None) -> ConfirmationFile:
    """The confirmation that is on record, with more seeds if asked for; else a new one.

    Raises InputError if there is nothing to confirm, or if it was begun otherwise.
    """
    name = search.name + SUFFIX
    if (plan := recorded(search)) is not None:
        raise InputError(f"{search.name!r} is a confirmation itself; name the study: {plan.confirms}")
    linked = study_entry(engine, name)
    if linked is None:
        chosen = leaders(read_status(engine, search.study_id, search.name), top or TOP)
        candidates = [{"number": row.number, "params": row.params} for row in chosen]
        return _file(search, search.name, candidates, seeds or SEEDS)
    plan = recorded(linked)
    if plan is None:
        raise InputError(f"{name!r} is the name of a search; a confirmation cannot have it too")
    begun, given = len(plan.candidates), plan.study.max_trials // len(plan.candidates)
    if top not in (None, begun):
        raise InputError(
            f"--top {top}: the confirmation was begun with {begun}; to begin anew, first delete "
            f"{name!r} in the dashboard"
        )
    if seeds is not None and seeds < given:
        raise InputError(f"--seeds {seeds}: each candidate has {given} already; allowed are more")
    more = {"max_trials": begun * (seeds or given)}
    return plan.model_copy(update={"study": plan.study.model_copy(update=more)})


def leaders(status: Status, top: int) -> list[TrialRow]:
    """The complete trials with the highest scores. Raises InputError without any."""
    complete = [row for row in status.ranked() if row.state == "complete"]
    if not complete:
        raise InputError(
            f"study {status.study!r} has no complete trial yet; see: atelier status {status.study}"
        )
    return complete[:top]


@dataclass(frozen=True)
class Candidate:
    """One trial of the search, and what its reruns say. Scores are average per-class accuracies."""

    number: int  # in the search
    params: dict[str, Any]
    searched: float | None  # what the search saw
    seeds: int  # reruns that are complete
    passed_over: bool  # it could not win any more
    score: Interval | None = None  # None while there are too few seeds
    behind: Interval | None = None
    best: float | None = None  # the probability of being the best candidate


@dataclass(frozen=True)
class Confirmation:
    """A confirmation as it stands. `candidates` are ranked, the leader first.

    `optimism` is by how much the search's maximum is expected to flatter its trial: what fresh seeds do
    not repeat, and the luck with the images that they do (search.bootstrap.flattery).
    """

    study: str  # the search
    linked: str  # the name of the study that the reruns are trials of
    reruns: int  # trials of the linked study that have ended
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
    def winner(self) -> Candidate | None:
        """The candidate that is the best with a probability of 95 %, if there is one in the end."""
        # Not before: who looks often enough sees any candidate win for a while.
        best = self.candidates[0] if self.finished else None
        return best if best and (best.best or 0) >= WINS else None

    def as_dict(self) -> dict[str, Any]:
        """For programs: the form of `--json`, which stays stable."""
        winner = self.winner
        return asdict(self) | {
            "finished": self.finished,
            "winner": None if winner is None else winner.number,
        }


def read_confirmation(engine: sa.Engine, search: StudyEntry) -> Confirmation | None:
    """What is known of a search's leaders by now; None if nobody asked for a confirmation.

    Raises InputError if a complete trial's predictions are not at hand.
    """
    linked = study_entry(engine, search.name + SUFFIX)
    if linked is None or (plan := recorded(linked)) is None:
        return None
    status = read_status(engine, linked.study_id, linked.name)
    searched = read_status(engine, search.study_id, search.name)
    values = {row.number: row.value for row in searched.trials}
    numbers = [one["number"] for one in plan.candidates]
    evidence = _Evidence(linked, status.trials)
    given_up = {row.params.get("candidate") for row in status.trials if row.reason == CANNOT_WIN}
    candidates = [
        Candidate(
            one["number"],
            one["params"],
            values.get(one["number"]),
            seeds=len(evidence.runs.get(one["number"], [])),
            passed_over=one["number"] in given_up,
            **evidence.estimates.get(one["number"], {}),
        )
        for one in plan.candidates
    ]
    naive = max(candidates, key=lambda one: one.searched or 0.0)
    return Confirmation(
        study=search.name,
        linked=linked.name,
        reruns=status.finished,
        max_reruns=status.max_trials,
        seeds=status.max_trials // len(candidates),
        candidates=sorted(candidates, key=lambda one: -one.score.value if one.score else 0.0),
        optimism=_optimism(search, searched, naive, evidence),
        overtaken=[row.number for row in leaders(searched, len(numbers)) if row.number not in numbers],
    )


def attribute_sizes(entry: StudyEntry) -> list[int]:
    """How many attributes each category of the study's dataset has."""
    kinds = [row["category"] for row in entry.attributes]
    return [kinds.count(kind) for kind in dict.fromkeys(kinds)]


def predictions_of(
    entry: StudyEntry, trials: Sequence[TrialRow]
) -> Iterator[tuple[TrialRow, Predictions]]:
    """The complete trials with their predictions, by number. Raises InputError."""
    folder = RunFolder(entry.name, entry.created)
    for row in trials:
        if row.state == "complete":
            path = folder.predictions(row.number)
            try:
                yield row, Predictions.load(path)
            except (OSError, ValueError):
                raise InputError(
                    f"{path} cannot be read; use the ATELIER_HOME that the workers used"
                ) from None


def _optimism(
    search: StudyEntry, status: Status, naive: Candidate, evidence: "_Evidence"
) -> float | None:
    if naive.searched is None or naive.score is None:
        return None
    try:
        found = list(predictions_of(search, status.trials))
    except InputError:
        return None  # the search is older than its predictions, or was on another machine
    runs = {row.number: hits(predictions) for row, predictions in found}
    labels, sizes = found[0][1].labels, attribute_sizes(search)
    seen = per_class_accuracy(runs[naive.number], labels, sizes)
    return seen - naive.score.value + flattery([*runs.values()], labels, sizes, evidence.churn)


class _Evidence:
    """The predictions of a confirmation's complete trials, and what follows from them."""

    def __init__(self, linked: StudyEntry, trials: Sequence[TrialRow]) -> None:
        self.runs: dict[int, dict[int, np.ndarray]] = {}  # hits by candidate and seed
        self._sizes = attribute_sizes(linked)
        for row, predictions in predictions_of(linked, trials):
            self.runs.setdefault(row.params["candidate"], {})[row.params["seed"]] = hits(predictions)
            self._labels = predictions.labels
        self._judged = {n: runs for n, runs in self.runs.items() if len(runs) >= LEAST_SEEDS}

    @property
    def churn(self) -> float:
        """See search.bootstrap.churn."""
        return churn([*self._judged.values()], self._labels, self._sizes)

    @cached_property
    def estimates(self) -> dict[int, dict[str, Any]]:
        """score, behind and best of each candidate with enough seeds."""
        if not self._judged:
            return {}
        known = compare([*self._judged.values()], self._labels, self._sizes)
        rows = zip(known.scores, known.behind, known.best, strict=True)
        named = (dict(zip(ESTIMATES, row, strict=True)) for row in rows)
        return dict(zip(self._judged, named, strict=True))


def cannot_win(engine: sa.Engine, linked: StudyEntry, candidate: int) -> str | None:
    """The reason, if a candidate is worth no further seed."""
    trials = read_status(engine, linked.study_id, linked.name).trials
    estimate = _Evidence(linked, trials).estimates.get(candidate)
    return CANNOT_WIN if estimate is not None and estimate["best"] < DROPPED else None


def render(confirmation: Confirmation) -> RenderableType:
    """The confirmation as a table, and its verdict in words."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for one in confirmation.candidates:
        table.add_row(*cells(one))
    return Group(table, *(Text(line, style="bold") for line in verdict(confirmation)))


COLUMNS = ("trial", "seeds", "search", "score", "95 % interval", "behind", "95 % interval", "best")


def cells(one: Candidate) -> list[str]:
    """A row of the table; percent, and points of it."""
    score, behind = one.score, one.behind
    return [
        str(one.number),
        f"{one.seeds}{' (out)' if one.passed_over else ''}",
        "" if one.searched is None else f"{100 * one.searched:.2f}",
        "" if score is None else f"{100 * score.value:.2f} ± {100 * score.error:.2f}",
        "" if score is None else f"{100 * score.low:.2f} to {100 * score.high:.2f}",
        "" if behind is None else f"{100 * behind.value:.2f}",
        ""
        if behind is None or not behind.error
        else f"{100 * behind.low:.2f} to {100 * behind.high:.2f}",
        "" if one.best is None else f"{100 * one.best:.0f} %",
    ]


def verdict(confirmation: Confirmation) -> list[str]:
    """What follows, in sentences."""
    lines = []
    leader, winner = confirmation.candidates[0], confirmation.winner
    if winner is not None:
        lines.append(f"trial {winner.number} is the best of them with {100 * (winner.best or 0):.0f} %")
    elif leader.best is None:
        lines.append(f"no verdict yet: each candidate needs {LEAST_SEEDS} seeds at least")
    elif not confirmation.finished:
        lines.append(
            f"no verdict yet: {confirmation.reruns} of {confirmation.max_reruns} reruns have ended"
        )
    else:
        tied = [str(one.number) for one in confirmation.candidates if (one.best or 0) >= TIED]
        lines.append(
            f"no winner yet: trials {', '.join(tied)} tie; more seeds may tell them apart, or choose by "
            "other reasons"
        )
    if confirmation.optimism is not None:
        lines.append(
            "the search's maximum is expected to flatter its trial by "
            f"{100 * confirmation.optimism:.2f} points"
        )
    if confirmation.overtaken:
        numbers = ", ".join(map(str, confirmation.overtaken))
        lines.append(
            f"trials {numbers} of the search have come in front since; to confirm them, first delete "
            f"{confirmation.linked!r} in the dashboard"
        )
    return lines

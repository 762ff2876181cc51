"""Plan a confirmation: which trials of a search run again, on which seeds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler

from search.errors import InputError
from search.study import check_versions
from search.study_config import StudyConfig
from search.toml_file import validate
from storage.status import read_status
from storage.studies import StudyEntry, study_entry
from trainer.config import TrainConfig

SUFFIX = "-confirm"  # of the linked study's name
TOP, SEEDS = 5, 5  # with three seeds no paired test can reach significance
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
        return self.of(trial.number)[param_name]

    def of(self, number: int) -> dict[str, Any]:
        """The parameters of the trial with this number."""
        round_number, index = divmod(number, len(self._candidates))
        candidate = self._candidates[index]
        # A fresh seed: the search's own one may have been lucky.
        rerun = {"candidate": candidate["number"], "seed": (self._seed + 1 + round_number) % 2**32}
        planned: dict[str, Any] = rerun | candidate["params"]
        return planned


class ConfirmationFile(StudyConfig):
    """For a confirmation what a study file is for a search. It is made from the search's record."""

    confirms: str  # the search's name
    candidates: list[dict[str, Any]]  # {"number", "params"} of its trials
    dataset: str  # the fingerprint of the search's
    within: float | None = None  # points: no reruns are needed once a candidate is known to be so near

    @property
    def dataset_fingerprint(self) -> str:
        return self.dataset

    def corners(self) -> Iterator[dict[str, Any]]:
        """The candidates: nothing else is trained."""
        return (candidate["params"] for candidate in self.candidates)

    def config(self, params: dict[str, Any]) -> TrainConfig:
        """The full configuration of a trial with these parameters."""
        return super().config({key: value for key, value in params.items() if key != "candidate"})

    def distributions(self) -> dict[str, BaseDistribution]:
        """The search's space, and two parameters: the trial to run again, and its seed."""
        rerun: dict[str, Any] = {
            "candidate": IntDistribution(0, MOST_TRIALS),
            "seed": IntDistribution(0, 2**32 - 1),
        }
        return rerun | super().distributions()

    def identity(self) -> dict[str, Any]:
        """The search's identity and the candidates, which must not change."""
        return super().identity() | {"confirms": {"study": self.confirms, "candidates": self.candidates}}

    def metadata(self, first: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return super().metadata(first) | {"wanted": {"within": self.within}}

    def make_sampler(self, first: Sequence[Mapping[str, Any]]) -> BaseSampler:
        return Plan(self.candidates, self.shared.seed)


def recorded(entry: StudyEntry) -> ConfirmationFile | None:
    """The confirmation that is on record as this study; None if the study is a search."""
    if "confirms" not in entry.settings:
        return None
    confirms = entry.settings["confirms"]
    seeds = entry.max_trials // len(confirms["candidates"])
    within = entry.settings.get("wanted", {}).get("within")
    return _confirmation_file(entry, confirms["study"], confirms["candidates"], seeds, within)


def _confirmation_file(
    entry: StudyEntry,
    search: str,
    candidates: list[dict[str, Any]],
    seeds: int,
    within: float | None,
) -> ConfirmationFile:
    """A confirmation of a search's trials. The other settings are those of a study on record."""
    file = StudyConfig.from_record(entry)
    tables = file.model_dump() | {"slurm": file.slurm}
    tables["study"] |= {
        "name": search + SUFFIX,
        "score": "mean-last-5",
        "max_trials": len(candidates) * seeds,
        "strategy": "none",
    }
    confirmation = {"confirms": search, "candidates": candidates, "dataset": entry.dataset}
    tables |= confirmation | {"within": within}
    return validate(ConfirmationFile, tables, f"confirmation of {search!r}")


def plan_confirmation(
    engine: sa.Engine,
    search: StudyEntry,
    top: int | None,
    seeds: int | None,
    within: float | None = None,
) -> ConfirmationFile:
    """The confirmation on record, with more seeds or another `within` if asked for. Else a new one.

    Raises InputError if there is nothing to confirm, or if the one on record was begun otherwise.
    """
    check_versions(search)
    linked = study_entry(engine, search.name + SUFFIX)
    if linked is None:
        status = read_status(engine, search.study_id, search.name)
        chosen = status.completed()
        if not chosen or len(chosen) < (top or 1):
            shortage = f"only {len(chosen)} complete trials" if chosen else "no complete trial"
            raise InputError(
                f"study {search.name!r} has {shortage} yet; see: atelier status {search.name}"
            )
        candidates = [{"number": row.number, "params": row.params} for row in chosen[: top or TOP]]
        return _confirmation_file(search, search.name, candidates, seeds or SEEDS, within)
    begun = recorded(linked)
    if begun is None:
        raise InputError(f"{linked.name!r} is the name of a search; a confirmation cannot have it too")
    n_candidates, n_seeds = len(begun.candidates), begun.study.max_trials // len(begun.candidates)
    if top not in (None, n_candidates):
        raise InputError(
            f"--top {top}: the confirmation was begun with {n_candidates}; to begin anew, first delete "
            f"{linked.name!r} in the dashboard"
        )
    if seeds is not None and seeds < n_seeds:
        raise InputError(f"--seeds {seeds}: each candidate has {n_seeds} already; allowed are more")
    within = begun.within if within is None else within
    return _confirmation_file(linked, search.name, begun.candidates, seeds or n_seeds, within)

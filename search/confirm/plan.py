"""Plan a confirmation: which trials of a search run again, on which seeds and folds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from search.comparable import check_versions
from search.errors import InputError
from search.study_config import Plan, Spec, StudyConfig, WholeRange
from search.toml_file import validate
from storage.status import read_status
from storage.studies import StudyEntry, study_entry
from storage.words import counted
from trainer.config import TrainConfig
from trainer.dataset import Dataset
from trainer.division import attribute_table, divide_all

SUFFIX = "-confirm"  # of the linked study's name
TOP, SEEDS = 5, 5  # with three seeds no paired test can reach significance
SEEDS_OF_FOLD = 1  # six folds have six
MOST_TRIALS = 10**6


class ConfirmationFile(StudyConfig):
    """For a confirmation what a study file is for a search. It is made from the search's record."""

    confirms: str  # the search's name
    candidates: list[dict[str, Any]]  # {"number", "params"} of its trials
    dataset: str  # the fingerprint of the search's
    within: float | None = None  # points: no reruns are needed once a candidate is known to be so near

    @property
    def dataset_fingerprint(self) -> str:
        return self.dataset

    @property
    def folds(self) -> int | None:
        """How many folds there are; None if all reruns are validated on the validation split."""
        return self.shared.folds

    @property
    def seeds(self) -> int:
        """How many seeds each candidate has, in each fold."""
        return self.study.max_trials // len(self.candidates) // (self.folds or 1)

    def corners(self) -> Iterator[dict[str, Any]]:
        """The candidates: nothing else is trained."""
        return (candidate["params"] for candidate in self.candidates)

    def config(self, params: dict[str, Any]) -> TrainConfig:
        """The full configuration of a trial with these parameters."""
        return super().config({key: value for key, value in params.items() if key != "candidate"})

    def parameters(self) -> dict[str, Spec]:
        """The search's space, and as parameters the trial to run again, its seed and its fold."""
        rerun: dict[str, Spec] = {
            "candidate": WholeRange(low=0, high=MOST_TRIALS),
            "seed": WholeRange(low=0, high=2**32 - 1),
        }
        if self.folds:
            rerun["fold"] = WholeRange(low=0, high=self.folds - 1)
        return rerun | super().parameters()

    def attribute_table(self, dataset: Dataset) -> list[dict[str, Any]]:
        """With folds, `images` counts those of all folds, and `folds` those of each."""
        if not self.folds:
            return super().attribute_table(dataset)
        divisions = divide_all(dataset, self.shared)
        tables = zip(*(attribute_table(dataset, self.shared, one) for one in divisions), strict=True)
        return [
            rows[0]
            | {"images": sum(row["images"] for row in rows), "folds": [row["images"] for row in rows]}
            for rows in tables
        ]

    def identity(self) -> dict[str, Any]:
        """The search's identity and the candidates, which must not change."""
        return super().identity() | {"confirms": {"study": self.confirms, "candidates": self.candidates}}

    def metadata(self, first: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return super().metadata(first) | {"wanted": {"within": self.within}}

    @property
    def plan(self) -> Plan:
        """The parameters of each trial, by its number. No candidate runs again before all have run."""
        seed, folds = self.shared.seed, self.folds

        def parameters(number: int) -> dict[str, Any]:
            round_number, index = divmod(number, len(self.candidates))
            candidate = self.candidates[index]
            # A fresh seed: the search's own one may have been lucky. Folds do not share one: what it did
            # to all of them could not be told from the configuration.
            rerun = {"candidate": candidate["number"], "seed": (seed + 1 + round_number) % 2**32}
            in_fold = {"fold": round_number % folds} if folds else {}
            return {**rerun, **in_fold, **candidate["params"]}

        return parameters


def recorded(entry: StudyEntry) -> ConfirmationFile | None:
    """The confirmation that is on record as this study; None if the study is a search."""
    if "confirms" not in entry.settings:
        return None
    confirms = entry.settings["confirms"]
    within = entry.settings.get("wanted", {}).get("within")
    folds = entry.settings["train"].get("folds")
    reruns = entry.max_trials // len(confirms["candidates"])
    return _confirmation_file(entry, confirms["study"], confirms["candidates"], reruns, folds, within)


def _confirmation_file(
    entry: StudyEntry,
    search: str,
    candidates: list[dict[str, Any]],
    reruns: int,
    folds: int | None,
    within: float | None,
) -> ConfirmationFile:
    """A confirmation with so many reruns of each candidate.

    The other settings are those of a study on record. Folds take all images of train and val.
    """
    file = StudyConfig.from_record(entry)
    tables = file.model_dump() | {"slurm": file.slurm}
    tables["study"] |= {
        "name": search + SUFFIX,
        "score": "mean-last-5",
        "max_trials": len(candidates) * reruns,
        "strategy": "none",
    }
    if folds:
        tables["train"] |= {"folds": folds, "train_images": None}
    confirmation = {"confirms": search, "candidates": candidates, "dataset": entry.dataset}
    tables |= confirmation | {"within": within}
    return validate(ConfirmationFile, tables, f"confirmation of {search!r}")


def plan_confirmation(
    engine: sa.Engine,
    search: StudyEntry,
    top: int | None,
    seeds: int | None,
    folds: int | None = None,
    within: float | None = None,
) -> ConfirmationFile:
    """The confirmation on record, with more seeds or another `within` if asked for. Else a new one.

    Raises InputError if there is nothing to confirm, or if the one on record was begun otherwise.
    """
    check_versions(search)
    linked = study_entry(engine, search.name + SUFFIX)
    if linked is not None:
        return _go_on(linked, search.name, top, seeds, folds, within)
    status = read_status(engine, search.study_id, search.name)
    chosen = status.completed()
    if not chosen or len(chosen) < (top or 1):
        n = len(chosen)
        shortage = f"only {counted(n, 'complete trial')}" if n else "no complete trial"
        has_ended = n and status.has_ended
        advice = "give a smaller --top, or raise study.max_trials" if has_ended else None
        raise InputError(
            f"study {search.name!r} has {shortage}{'' if has_ended else ' yet'}; "
            f"{advice or f'see: atelier status {search.name}'}"
        )
    candidates = [{"number": row.number, "params": row.params} for row in chosen[: top or TOP]]
    if seeds == 1 and not folds:
        raise InputError("--seeds 1: one run shows no noise; allowed are more seeds, or add --folds")
    reruns = (seeds or SEEDS_OF_FOLD) * folds if folds else seeds or SEEDS
    return _confirmation_file(search, search.name, candidates, reruns, folds, within)


def _go_on(
    linked: StudyEntry,
    search: str,
    top: int | None,
    seeds: int | None,
    folds: int | None,
    within: float | None,
) -> ConfirmationFile:
    """The confirmation on record, with what may change. Raises InputError for what may not."""
    begun = recorded(linked)
    if begun is None:
        raise InputError(f"{linked.name!r} is the name of a search; a confirmation cannot have it too")
    for option, wanted, has in (("top", top, len(begun.candidates)), ("folds", folds, begun.folds)):
        if wanted not in (None, has):
            raise InputError(
                f"--{option} {wanted}: the confirmation was begun with {has or 'none'}; to begin anew, "
                f"first delete {linked.name!r} in the dashboard"
            )
    if seeds is not None and seeds < begun.seeds:
        raise InputError(f"--seeds {seeds}: each candidate has {begun.seeds} already; allowed are more")
    reruns = (seeds or begun.seeds) * (begun.folds or 1)
    within = begun.within if within is None else within
    return _confirmation_file(linked, search, begun.candidates, reruns, begun.folds, within)

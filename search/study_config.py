"""The tables of a study file and their checks; its parameters, rungs and identity follow from them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote

from pydantic import (
    AliasChoices,
    Field,
    field_validator,
    model_validator,
)

from search.errors import InputError
from search.profile import Profiles, SlurmProfile
from search.score import Kind
from search.typed import Table, Texts, as_typed, unknown_key
from storage import studies
from storage.paths import path_to_record
from trainer.config import ARITHMETIC, CHECKPOINT_SECONDS, TUNABLE, Number, Real, TrainConfig, Whole
from trainer.dataset import Dataset
from trainer.division import attribute_table
from trainer.images import READER


class Range(Table):
    """A float parameter between two bounds, both included."""

    low: Real
    high: Real
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if self.low > self.high:
            raise ValueError(f"low = {self.low} is above high = {self.high}; swap them")
        if self.log and self.low <= 0:
            raise ValueError(f"low = {self.low} with log = true; a log scale needs low > 0")
        return self


class WholeRange(Range):
    """A range of whole numbers. No study file has one; a confirmation's parameters do."""


Choices = Annotated[list[Number], Field(min_length=1)]
Plan = Callable[[int], dict[str, Any]]
Spec = Range | list[float | int]  # what a parameter may be
NO_FILE = ("timm", "none")  # values of `weights` that name no file
WARM_START_TRIALS = 3  # of each earlier study
MAX_NAME = 200  # bytes of a percent-encoded study name, which is part of a folder's name


class StudySettings(Table):
    """The [study] table."""

    name: str = Field(min_length=1)
    score: Kind = "mean-last-5"
    max_trials: Whole = Field(ge=1, le=1_000_000)
    max_gpu_hours: Real | None = Field(None, gt=0)
    max_failures: Whole = Field(2, ge=0)  # how often a trial may fail where there is only one host
    sampler: Literal["tpe", "random", "gp", "qmc"] = "tpe"
    strategy: Literal["promote", "asha", "hyperband", "median", "none"] = Field(
        "promote", validation_alias=AliasChoices("strategy", "pruner")
    )
    rungs: list[Annotated[Whole, Field(ge=0)]] | None = None  # epochs; default: see `StudyConfig.rungs`
    first: list[dict[str, Number]] = Field([])  # parameters to begin with; some may be left open
    warm_start: Texts = Field([])  # earlier studies whose best parameters come first
    audit: Real = Field(0.0, ge=0, le=1)  # the share of trials that no strategy stops
    checkpoint_seconds: Real = Field(CHECKPOINT_SECONDS, ge=0)  # of work that a kill may cost

    @field_validator("name")
    @classmethod
    def _printable(cls, name: str) -> str:
        if not name.isprintable() or name != name.strip():
            raise ValueError(f"{name!r} has unprintable characters or outer spaces; rename it")
        if name.endswith(".toml"):
            raise ValueError(f"{name!r} would be taken for a file; leave out the .toml")
        if len(quote(name)) > MAX_NAME:
            raise ValueError(
                f"found {as_typed(name)}, too long for a folder's name; allowed are {MAX_NAME} bytes, "
                "encoded"
            )
        return name


class StudyConfig(Table):
    """A whole study file. `train` holds what all trials share, `space` what they try."""

    study: StudySettings
    space: dict[str, Range | Choices]
    train: dict[str, Any]
    slurm: Profiles = Field({})

    @field_validator("space", mode="before")
    @classmethod
    def _known_parameters(cls, space: object) -> object:
        if not isinstance(space, dict) or not space:
            raise ValueError(f"needs a table with at least one of {', '.join(TUNABLE)}")
        for name, spec in space.items():
            if name not in TUNABLE:
                raise ValueError(unknown_key(name, TUNABLE))
            if not isinstance(spec, (dict, list)):
                forms = [] if name == "batch_size" else ["{ low = ..., high = ... }"]
                is_number = isinstance(spec, (int, float)) and not isinstance(spec, bool)
                forms.append(f"a list, as in [{as_typed(spec) if is_number else '...'}]")
                raise ValueError(f"{name} = {as_typed(spec)}; write {' or '.join(forms)}")
            if isinstance(spec, list) and (
                not spec
                or any(
                    isinstance(choice, bool) or not isinstance(choice, (int, float)) for choice in spec
                )
                or len(set(spec)) < len(spec)
            ):
                raise ValueError(f"{name} = {as_typed(spec)}; a list needs numbers, each of them once")
        if isinstance(space.get("batch_size"), dict):
            raise ValueError("batch_size is a whole number; write a list, as in [64, 128, 256]")
        return space

    @model_validator(mode="after")
    def _each_key_once(self) -> "StudyConfig":
        both = self.train.keys() & self.space.keys()
        if both:
            raise ValueError(f"{both.pop()} stands in [space] and in [train]; keep one of them")
        return self

    def corners(self) -> Iterator[dict[str, Any]]:
        """Parameters at the ends of the space. Every trial lies between them."""
        for which in ("low", "high"):
            yield {name: _corner(spec, which) for name, spec in self.space.items()}
        lows = self._lows()
        for name, spec in self.space.items():
            if isinstance(spec, list):
                yield from ({**lows, name: choice} for choice in spec)

    def check_rungs(self) -> None:
        """Raises InputError."""
        rungs = self.study.rungs
        if rungs is not None and (rungs != sorted(set(rungs)) or max(rungs, default=0) >= self.epochs):
            raise InputError(
                f"study.rungs = {rungs}; allowed are ascending epochs from 0 to {self.epochs - 1}"
            )

    def check_first(self) -> None:
        """Raises InputError."""
        for params in self.study.first:
            if problem := self.foreign(params):
                raise InputError(f"study.first has {problem}, see [space]")

    def foreign(self, params: Mapping[str, Any]) -> str | None:
        """What is wrong with parameters, in words. None if the study could have sampled them."""
        parameters = self.parameters()
        for name, value in params.items():
            if name not in parameters:
                return unknown_key(name, parameters)
            spec = parameters[name]
            if not _fits(value, spec):
                allowed = spec if isinstance(spec, list) else f"{spec.low:g} to {spec.high:g}"
                return f"{name} = {value!r}; allowed is {allowed}"
        return None

    def clip(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that the space has. A value beyond a bound of its range moves to the bound."""
        in_space = {name: params[name] for name in self.space if name in params}
        return {
            name: value if isinstance(spec, list) else min(max(value, spec.low), spec.high)
            for name, value in in_space.items()
            if isinstance(spec := self.space[name], Range) or value in spec
        }

    def audits(self, number: int) -> bool:
        """Whether no strategy stops this trial. Such trials are evenly spread."""
        audited_before, audited_then = (int(n * self.study.audit + 0.5) for n in (number, number + 1))
        return audited_then > audited_before

    @property
    def largest(self) -> TrainConfig:
        """A configuration with the study's largest batches: it needs the most memory."""
        return max(map(self.config, self.corners()), key=lambda config: config.batch_size)

    @property
    def batch_sizes(self) -> set[int]:
        """All batch sizes that the study's trials may have."""
        return {self.config(params).batch_size for params in self.corners()}

    def _lows(self) -> dict[str, Any]:
        return {name: _corner(spec, "low") for name, spec in self.space.items()}

    def config(self, params: dict[str, Any]) -> TrainConfig:
        """The full configuration of a trial with these parameters."""
        return TrainConfig(**{**self.train, **params})

    @property
    def shared(self) -> TrainConfig:
        """A configuration of the study, for all that its parameters do not change."""
        return self.config(self._lows())

    @property
    def epochs(self) -> int:
        return self.shared.epochs

    def parameters(self) -> dict[str, Spec]:
        """What each parameter of a trial may be."""
        return {**self.space}

    @property
    def plan(self) -> Plan | None:
        """The parameters of each trial, by its number; None where a sampler chooses them."""
        return None

    def rungs(self) -> list[int]:
        """The epochs after which the strategy decides: the warm-up's last one, then times 3.

        A value during the warm-up says little about the final score. From its end on their rank
        correlation is at least 0.8 (docs/search.md).
        """
        if self.study.strategy == "none":
            return []
        if self.study.rungs is not None:
            return self.study.rungs
        rungs = [max(self.shared.warmup_epochs - 1, 1)]
        while rungs[-1] * 3 < self.epochs:
            rungs.append(rungs[-1] * 3)
        return [rung for rung in rungs if rung < self.epochs - 1]

    def identity(self) -> dict[str, Any]:
        """What makes trials comparable: score, space, settings, and the contents of files.

        Raises InputError if the weights file cannot be read.
        """
        train = self.shared.model_dump(exclude={"data", *self.space})
        return {
            "study": {"score": self.study.score},
            "space": self.model_dump(mode="json")["space"],
            "train": train | {"weights": weights_identity(self.shared.weights)},
            "images": {"reader": READER},
            "arithmetic": {"version": ARITHMETIC},
        }

    def with_paths(self, data: str | None, weights: str | None) -> Self:
        """The same configuration with other paths of dataset and weights; None for no change."""
        given = {"data": data, "weights": weights}
        places = {key: value for key, value in given.items() if value is not None}
        return self.model_copy(update={"train": self.train | places})

    @classmethod
    def from_record(cls, entry: studies.StudyEntry) -> "StudyConfig":
        """The configuration that a study on record was last opened with."""
        settings = entry.settings
        study = settings["study"] | settings.get("search", {})
        return cls(
            study=StudySettings(name=entry.name, max_trials=entry.max_trials, **study),
            space=settings["space"],
            train=settings["train"] | entry.places,
            # Not checked again: an earlier version accepted it, and SLURM has the last word.
            slurm={
                name: SlurmProfile.model_construct(**profile)
                for name, profile in settings.get("slurm", {}).items()
            },
        )

    def attribute_table(self, dataset: Dataset) -> list[dict[str, Any]]:
        """The attributes as they go on record, with how many images have each."""
        return attribute_table(dataset, self.shared)

    @property
    def dataset_fingerprint(self) -> str | None:
        """The fingerprint of the only dataset that it may run on; None for any."""
        return None

    def metadata(self, first: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What goes on record beside the identity: how to search, and where the files are."""
        elsewhere = {"name", "score", "max_trials", "max_gpu_hours", "warm_start"}
        return {
            "search": self.study.model_dump(exclude=elsewhere) | {"first": first},
            "slurm": self.model_dump()["slurm"],
            "places": self.places(),
        }

    def places(self) -> dict[str, str]:
        """Where the files are, so that a worker may start in another folder."""
        data, weights = self.shared.data, self.shared.weights
        return {
            "data": path_to_record(Path(data).absolute()),
            "weights": weights if weights in NO_FILE else path_to_record(Path(weights).absolute()),
        }


def weights_identity(weights: str) -> str:
    """The digest of a weights file, whatever its name. Raises InputError if it cannot be read."""
    if weights in NO_FILE:
        return weights
    try:
        with open(weights, "rb") as file:
            return f"SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise InputError(
            f"weights = {weights!r}: {error.strerror}; give its path with --weights"
        ) from None


def _fits(value: Any, spec: Spec) -> bool:
    if isinstance(spec, list):
        return value in spec
    if not isinstance(value, (int, float)) or (isinstance(spec, WholeRange) and value % 1):
        return False
    return spec.low <= value <= spec.high


def _corner(spec: Spec, which: str) -> Any:
    if isinstance(spec, Range):
        return getattr(spec, which)
    return min(spec) if which == "low" else max(spec)

"""Study files: what they may say, and the Optuna study that follows from one. Imports no torch."""

import hashlib
import logging
import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import quote

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.pruners import HyperbandPruner, MedianPruner
from optuna.samplers import GPSampler, RandomSampler, TPESampler
from pydantic import (
    AliasChoices,
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dashboards.status import read_status
from search.profile import Profiles, SlurmProfile
from search.sampling import STARTUP_TRIALS, Search
from search.score import Kind
from search.strategy import OptunasPruner, Rungs, Strategy
from search.typed import Table, Texts, as_typed, in_our_words, near
from storage import ledger
from storage.database import retrying
from storage.runs import path_to_record
from trainer.config import TUNABLE, Number, Real, TrainConfig, Whole
from trainer.dataset import Dataset, absent_attributes
from trainer.images import READER
from trainer.text import TextError, read_text

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=BaseModel)


class InputError(ValueError):
    """The user's input is wrong; the message is one line: found, allowed, what to do next."""


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


Choices = Annotated[list[Number], Field(min_length=1)]
NO_FILE = ("timm", "none")  # values of `weights` that name no file
# Of a study's settings: what does not make its trials incomparable.
NOT_COMPARED = {"places", "slurm", "search", "images"}
WARM_START_TRIALS = 3  # of each earlier study
MAX_NAME = 200  # bytes of a percent-encoded study name, which is part of a folder's name
# What a value may be that has to be printed, compared and handed on: TOML itself promises 64 bits, and
# Python can neither print an integer of 5,000 digits nor a table inside 1,000 others.
LARGEST_INTEGER, DEEPEST = 2**63 - 1, 20


class StudySettings(Table):
    """The [study] table."""

    name: str = Field(min_length=1)
    score: Kind = "mean-last-5"
    max_trials: Whole = Field(ge=1, le=1_000_000)
    max_gpu_hours: Real | None = Field(None, gt=0)
    max_failures: Whole = Field(2, ge=0)  # how often a trial may raise on the only host there is
    sampler: Literal["tpe", "random", "gp", "qmc"] = "tpe"
    strategy: Literal["promote", "asha", "hyperband", "median", "none"] = Field(
        "promote", validation_alias=AliasChoices("strategy", "pruner")
    )
    rungs: list[Annotated[Whole, Field(ge=0)]] | None = None  # epochs; default: see `rungs_of`
    first: list[dict[str, Number]] = Field([])  # parameters to begin with, not always all of them
    warm_start: Texts = Field([])  # earlier studies, with whose best parameters it begins
    audit: Real = Field(0.0, ge=0, le=1)  # the share of trials that go on whatever the strategy says

    @field_validator("name")
    @classmethod
    def _printable(cls, name: str) -> str:
        if not name.isprintable() or name != name.strip():
            raise ValueError(f"{name!r} has unprintable characters or outer spaces; rename it")
        if len(quote(name)) > MAX_NAME:
            raise ValueError(
                f"found {as_typed(name)}, too long for a folder's name; allowed are {MAX_NAME} bytes, "
                "encoded"
            )
        return name


class StudyFile(Table):
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
                raise ValueError(_unknown(name, TUNABLE))
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
    def _each_key_once(self) -> "StudyFile":
        both = self.train.keys() & self.space.keys()
        if both:
            raise ValueError(f"{both.pop()} stands in [space] and in [train]; keep one of them")
        return self

    def corners(self) -> Iterator[dict[str, Any]]:
        """Parameters at the ends of the space, which every trial lies between."""
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
        """Which of these are no parameters of the study, in words; None if all are."""
        distributions = self.distributions()
        for name, value in params.items():
            if name not in distributions:
                return _unknown(name, distributions)
            spec = distributions[name]
            try:
                fits = spec._contains(spec.to_internal_repr(value))
            except (ValueError, TypeError):
                fits = False
            if not fits:
                choices = getattr(spec, "choices", None)
                allowed = [*choices] if choices else f"{spec.low:g} to {spec.high:g}"  # type: ignore[attr-defined]
                return f"{name} = {value!r}; allowed is {allowed}"
        return None

    def within(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters as far as the space has them: what is beyond a bound of a range moves to it."""
        known = {name: params[name] for name in self.space if name in params}
        return {
            name: value if isinstance(spec, list) else min(max(value, spec.low), spec.high)
            for name, value in known.items()
            if isinstance(spec := self.space[name], Range) or value in spec
        }

    def audits(self, number: int) -> bool:
        """Whether this trial goes on whatever the strategy says: the share of them, evenly spread."""
        audited_before, audited_then = (int(n * self.study.audit + 0.5) for n in (number, number + 1))
        return audited_then > audited_before

    @property
    def largest(self) -> TrainConfig:
        """A configuration of the study with its largest batches, which need the most memory."""
        return max(map(self.config, self.corners()), key=lambda config: config.batch_size)

    @property
    def batch_sizes(self) -> set[int]:
        """All that the study's trials may have."""
        return {self.config(params).batch_size for params in self.corners()}

    def _lows(self) -> dict[str, Any]:
        return {name: _corner(spec, "low") for name, spec in self.space.items()}

    def config(self, params: dict[str, Any]) -> TrainConfig:
        """The full configuration of a trial with these parameters."""
        return TrainConfig(**{**self.train, **params})

    @property
    def shared(self) -> TrainConfig:
        """A configuration of the study, for what does not depend on the parameters."""
        return self.config(self._lows())

    @property
    def epochs(self) -> int:
        return self.shared.epochs

    def distributions(self) -> dict[str, BaseDistribution]:
        """The space in Optuna's words."""
        return {
            name: CategoricalDistribution(spec)
            if isinstance(spec, list)
            else FloatDistribution(spec.low, spec.high, log=spec.log)
            for name, spec in self.space.items()
        }

    def rungs_of(self) -> list[int]:
        """Epochs at which the strategy decides: the warm-up's last one, then times 3.

        A value from within the warm-up says little of the final score; from then on the rank
        correlation is 0.8 and more (docs/search.md).
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
        """What makes trials comparable: score, space and settings; of files what is in them.

        Raises InputError if the weights file cannot be read.
        """
        train = self.shared.model_dump(exclude={"data", *self.space})
        return {
            "study": {"score": self.study.score},
            "space": self.model_dump(mode="json")["space"],
            "train": train | {"weights": weights_identity(self.shared.weights)},
            "images": {"reader": READER},
        }

    def moved(self, data: str | None, weights: str | None) -> Self:
        """The same file with other places of the dataset and the weights; None for no change."""
        given = {"data": data, "weights": weights}
        places = {key: value for key, value in given.items() if value is not None}
        return self.model_copy(update={"train": self.train | places})

    @classmethod
    def from_record(cls, entry: ledger.StudyEntry) -> "StudyFile":
        """The file that a study on record was last opened with."""
        settings = entry.settings
        study = settings["study"] | settings.get("search", {})
        return cls(
            study=StudySettings(name=entry.name, max_trials=entry.max_trials, **study),
            space=settings["space"],
            train=settings["train"] | entry.places,
            # As the version that recorded it understood it: SLURM has the last word.
            slurm={
                name: SlurmProfile.model_construct(**profile)
                for name, profile in settings.get("slurm", {}).items()
            },
        )

    def make_sampler(self, first: Sequence[Mapping[str, Any]]) -> optuna.samplers.BaseSampler:
        """The sampler by name, which begins with the parameters `first`."""
        # Unseeded: workers that share a seed would try the same trials.
        makers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
            "tpe": lambda: TPESampler(n_startup_trials=1),
            "gp": lambda: GPSampler(n_startup_trials=1),
            "random": RandomSampler,
            "qmc": RandomSampler,  # never asked
        }
        startup = {"random": 0, "qmc": math.inf}.get(self.study.sampler, STARTUP_TRIALS)
        inner = makers[self.study.sampler]()
        return Search(self.distributions(), inner, first, startup)

    def make_strategy(self, study: optuna.Study, trials: ledger.Ledger) -> Strategy:
        """The strategy by name; every one starts at the first rung."""
        name, rungs = self.study.strategy, self.rungs_of()
        makers: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
            "median": lambda: MedianPruner(n_startup_trials=5, n_warmup_steps=rungs[0]),
            "hyperband": lambda: HyperbandPruner(
                min_resource=max(rungs[0], 1),
                max_resource=self.epochs,
                reduction_factor=ledger.REDUCTION_FACTOR,
            ),
        }
        if name in makers and rungs:
            return OptunasPruner(study, trials, makers[name](), rungs[0])
        return Rungs(trials, rungs, pauses=name == "promote")

    @property
    def made_on(self) -> str | None:
        """The fingerprint of the dataset that it belongs to; None for any."""
        return None

    def incidentals(self, first: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What goes on record beside the identity: how to search, and where things are."""
        apart = {"name", "score", "max_trials", "max_gpu_hours", "warm_start"}
        return {
            "search": self.study.model_dump(exclude=apart) | {"first": first},
            "slurm": self.model_dump()["slurm"],
            "places": self.places(),
        }

    def places(self) -> dict[str, str]:
        """Where the files are, for whoever starts from another folder."""
        data, weights = self.shared.data, self.shared.weights
        return {
            "data": path_to_record(Path(data).absolute()),
            "weights": weights if weights in NO_FILE else path_to_record(Path(weights).absolute()),
        }


def weights_identity(weights: str) -> str:
    """What is in a weights file, whatever its name. Raises InputError if it cannot be read."""
    if weights in NO_FILE:
        return weights
    try:
        with open(weights, "rb") as file:
            return f"SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise InputError(
            f"weights = {weights!r}: {error.strerror}; give its path with --weights"
        ) from None


def _corner(spec: Range | list[float | int], which: str) -> Any:
    if isinstance(spec, Range):
        return getattr(spec, which)
    return min(spec) if which == "low" else max(spec)


def load_study_file(path: Path, overrides: list[str] | None = None) -> StudyFile:
    """Read a study file; `overrides` are `table.key=value`. Raises InputError."""
    tables = read_toml(path)
    if "train" in tables and not {"study", "space"} & tables.keys():
        raise InputError(f"{path} is the configuration of one run; train it with: atelier train {path}")
    for override in overrides or []:
        _override(tables, override)
    file = validate(StudyFile, tables, path)
    if file.train.get("train_on", "train") != "train":
        raise InputError(
            f"{path}: train.train_on = {file.train['train_on']!r}: a search needs the validation split; "
            "allowed is 'train'; give --train-on to: atelier train"
        )
    for params in file.corners():
        validate(TrainConfig, {**file.train, **params}, path, "train", dict.fromkeys(params, "space"))
    file.check_rungs()
    file.check_first()
    return file


def read_toml(path: Path) -> dict[str, Any]:
    """Raises InputError."""
    try:
        return _parse(read_text(path), str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; ready study files are in studies/") from None
    except TextError as error:
        raise InputError(str(error)) from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML: {error}; a text stands in straight quotes") from None


def _parse(text: str, place: str) -> dict[str, Any]:
    """Raises TOMLDecodeError, and InputError for TOML that goes beyond the limits above."""
    large = InputError(f"{place}: an integer is too large; allowed are 64 bits")
    deep = InputError(f"{place}: tables or lists are nested too deeply; allowed are {DEEPEST} levels")
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:
        raise large from None
    except RecursionError:
        raise deep from None
    level: list[Any] = [tables]
    for _ in range(DEEPEST):
        if any(isinstance(value, int) and abs(value) > LARGEST_INTEGER for value in level):
            raise large
        level = [inner for value in level for inner in _parts(value)]
    if level:
        raise deep
    return tables


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _override(tables: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    *parents, name = path.strip().split(".")
    if not equals or not parents:
        raise InputError(f"--set {text!r}: expected table.key=value, as in train.epochs=10")
    try:
        parsed = _parse(f"value = {value}", f"--set {path.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare string
    table: Any = tables
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {text!r}: {parent} = {table!r} is not a table")
    table[name] = parsed


def validate(
    model: type[Model],
    values: dict[str, Any],
    path: Path | str,
    table: str = "",
    tables: Mapping[str, str] | None = None,
) -> Model:
    """Build a model from a file's values, which stand in `table`, or where `tables` says for a key.

    Raises InputError with the first problem, in one line; a key that does not exist comes first.
    """
    try:
        return model(**values)
    except ValidationError as error:
        problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        key = str(problem["loc"][0]) if problem["loc"] else ""
        where = [name for name in [(tables or {}).get(key, table)] if name]
        location = ".".join(where + [str(p) for p in _without_branches(problem["loc"])])
        if problem["type"] == "extra_forbidden":
            name = str(problem["loc"][-1])
            message = _unknown(name, _keys_at(model, problem["loc"][:-1]))
        else:
            message = in_our_words(problem)
        place = f"{path}: {location}" if location else str(path)
        raise InputError(f"{place}: {message}".replace("\n", " ")) from error


def _unknown(name: str, allowed: Any) -> str:
    return f"unknown key {name!r}{near(name, allowed)} (allowed: {', '.join(allowed)})"


def _without_branches(location: tuple[int | str, ...]) -> Iterator[int | str]:
    """Without what pydantic adds to say which type of several it tried."""
    for depth, part in enumerate(location):
        tried = isinstance(part, str) and (part.startswith(("list[", "function-")) or part == "Range")
        if not tried and not (part in ("float", "int") and depth == len(location) - 1):
            yield part


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            return list(Range.model_fields) if "space" in location else list(SlurmProfile.model_fields)
        model = field.annotation
    return list(model.model_fields)


@retrying
def open_study(
    file: StudyFile,
    engine: sa.Engine,
    storage: optuna.storages.BaseStorage,
    dataset: Dataset,
    lead: bool = False,
) -> tuple[optuna.Study, ledger.StudyEntry]:
    """Create the study, or go on with it. Raises InputError if it was made with other settings.

    A worker joins what is on record; the command that a person types to start a search (`lead`) also
    sets the budget and takes back an earlier `atelier stop`.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the commands say what there is to say
    name = file.study.name
    identity = file.identity()
    existing = ledger.study_entry(engine, name)
    if existing is not None:
        _same(identity, existing, dataset.fingerprint)
    if file.made_on not in (None, dataset.fingerprint):
        raise other_dataset(name, str(file.made_on), dataset.fingerprint)
    first = _recorded_first(file, existing) if existing else _first(file, engine)
    study = optuna.create_study(
        storage=storage, study_name=name, direction="maximize", load_if_exists=True
    )
    if existing is None:  # first, so that what is on record has its note
        from dashboards.note import leave_note  # here: most commands find the study made

        leave_note(study)
    hours = file.study.max_gpu_hours
    budget = {
        "max_trials": file.study.max_trials,
        "max_gpu_seconds": None if hours is None else hours * 3600,
    }
    ledger.enter_study(
        engine,
        study._study_id,
        dataset=dataset.fingerprint,
        attributes=dataset.attribute_table(file.shared),
        settings=identity | file.incidentals(first),
        **budget,
    )
    entry = _entered(engine, name)
    _same(identity, entry, dataset.fingerprint)  # two processes may have created it at once
    first = _recorded_first(file, entry)
    if lead:
        settings = identity | file.incidentals(first)
        ledger.update_study(engine, study._study_id, stop_requested=None, settings=settings, **budget)
        entry = _entered(engine, name)
        for line in absent_attributes(entry.attributes):
            log.warning("study %r: %s", name, line)
    study.sampler = file.make_sampler(first)
    return study, entry


def _first(file: StudyFile, engine: sa.Engine) -> list[dict[str, Any]]:
    """The parameters that a new study begins with. Raises InputError."""
    first = [*file.study.first]
    for name in file.study.warm_start:
        earlier = ledger.study_entry(engine, name)
        if earlier is None:
            raise InputError(f"study.warm_start: no study {name!r}; see: atelier status")
        best = read_status(engine, earlier.study_id, name).completed()
        if not best:
            raise InputError(
                f"study.warm_start: {name!r} has no complete trial; wait for one, or leave it out"
            )
        # What that study held fixed may be open here.
        points = [file.within(earlier.settings["train"] | row.params) for row in best]
        distinct = list({tuple(point.items()): point for point in points}.values())
        first += [point for point in distinct[:WARM_START_TRIALS] if point not in first]
    return first


def _recorded_first(file: StudyFile, entry: ledger.StudyEntry) -> list[dict[str, Any]]:
    """As of the study's beginning; of one that was made by an earlier version, the file's."""
    recorded: list[dict[str, Any]] = entry.settings.get("search", {}).get("first", file.study.first)
    return recorded


def _entered(engine: sa.Engine, name: str) -> ledger.StudyEntry:
    entry = ledger.study_entry(engine, name)
    assert entry is not None  # it was just entered
    return entry


def reader_of(entry: ledger.StudyEntry) -> int:
    """The version of the reader of images that a study was made with."""
    version: int = entry.settings.get("images", {}).get("reader", 1)
    return version


def reader_note(what: str, version: int) -> str:
    """What to say where a search or a run is used that had another version of the reader."""
    return (
        f"note: the {what} had version {version} of the reader of images, this is {READER}: the same "
        "files may look different (CHANGELOG.md)"
    )


def check_reader(entry: ledger.StudyEntry) -> None:
    """That its images would be read as they were. Raises InputError."""
    made_by = reader_of(entry)
    if made_by != READER:
        raise InputError(
            f"study {entry.name!r} was made with version {made_by} of the reader of images, this is "
            f"{READER}: the same files may look different (CHANGELOG.md); go on with the Atelier that "
            "made it, or begin a study of another name"
        )


def _same(identity: dict[str, Any], existing: ledger.StudyEntry, fingerprint: str) -> None:
    check_reader(existing)
    name = existing.name
    other = f"give [study] another name than {name!r}, or restore the setting"
    if existing.optuna_version != optuna.__version__:
        raise InputError(
            f"study {name!r} was made with Optuna {existing.optuna_version}, here is "
            f"{optuna.__version__}; install the same version on every machine"
        )
    for table in identity.keys() | (existing.settings.keys() - NOT_COMPARED):
        settings, saved = identity.get(table, {}), existing.settings.get(table, {})
        for key in settings.keys() | saved.keys():
            # Settings that a study of an earlier version does not mention had the default.
            default = TrainConfig.model_fields[key].default if table == "train" else None
            if settings.get(key, default) != saved.get(key, default):
                raise InputError(
                    f"study {name!r} was made with {table}.{key} = {saved.get(key, default)}, the file "
                    f"says {settings.get(key, default)}; {other}"
                )
    if existing.dataset != fingerprint:
        raise other_dataset(name, existing.dataset, fingerprint)


def other_dataset(name: str, expected: str, found: str) -> InputError:
    """What to raise where a study meets another dataset than its own; both by fingerprint."""
    return InputError(
        f"study {name!r} was made on another dataset ({expected[:12]}, here is {found[:12]}); give the "
        "right one with --data, or another name in [study]"
    )

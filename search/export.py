"""The winner as a file that `atelier train` runs unchanged: written and read here."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import tomli_w
from pydantic import BaseModel, ConfigDict, field_validator

from dashboards.outputs import OutputError, check_output
from dashboards.predictions import PredictionsError, attribute_sizes, predictions_of
from search.comparable import reader_note, reader_of
from search.confirm.evidence import Confirmation
from search.confirm.intervals import hits, of_hits
from search.confirm.table import field, in_points, percent
from search.errors import InputError, no_trial
from search.profile import Profiles, SlurmProfile
from search.study_config import weights_identity
from search.toml_file import read_toml, validate
from storage.status import FINISHED, Status, TrialRow
from storage.studies import StudyEntry, curve
from storage.words import counted
from trainer.config import TrainConfig, Whole
from trainer.files import write_atomically
from trainer.images import READER

FORMAT = 1
PACKAGES = ("atelier", "torch", "torchvision", "timm", "optuna", "numpy", "pillow")


@dataclass(frozen=True)
class Choice:
    """The trial to export, and why it is that one."""

    row: TrialRow
    standing: str  # "confirmed", "near the best", "unconfirmed", or "chosen by hand"
    words: str


def find_trial(status: Status, number: int) -> TrialRow:
    """The trial of this number. Raises InputError."""
    for row in status.trials:
        if row.number == number:
            return row
    raise no_trial(status.study, number, len(status.trials))


def choose(status: Status, confirmation: Confirmation | None, number: int | None) -> Choice:
    """The given trial, else what a confirmation names, else the best with a warning.

    Raises InputError.
    """
    row = None if number is None else find_trial(status, number)
    named = (confirmation.winner or confirmation.choice) if confirmation else None
    if row is not None and not (named and named.number == number):
        return Choice(row, "chosen by hand", "chosen by hand")
    if confirmation and named and named.estimate:
        row = find_trial(status, named.number)
        if named is confirmation.winner:
            sure = percent(named.estimate.best)
            words = f"confirmed with {sure} to be the best of {field(confirmation)}"
            return Choice(row, "confirmed", words)
        words = f"confirmed with 95 % to be {in_points(named.estimate.within, confirmation)}"
        return Choice(row, "near the best", words)
    if status.best is None:
        raise InputError(
            f"study {status.study!r} has no complete trial yet; see: atelier status {status.study}"
        )
    leader = confirmation.leader if confirmation else None
    if leader is None:
        words = f"unconfirmed, so partly luck; compare the leaders with: atelier confirm {status.study}"
    elif leader.number == status.best.number:
        words = (
            "unconfirmed: it leads, but no candidate has won yet; see: atelier confirm --show "
            f"{status.study}"
        )
    else:
        words = (
            f"unconfirmed: no candidate has won yet, trial {leader.number} leads (export it with "
            f"--trial {leader.number}); see: atelier confirm --show {status.study}"
        )
    return Choice(status.best, "unconfirmed", words)


def known_accuracy(
    entry: StudyEntry, row: TrialRow, confirmation: Confirmation | None
) -> dict[str, Any]:
    """A trial's average per-class accuracy with its interval: from its reruns, else from its one run.

    Empty if it is not complete, or if its run folder is on another machine.
    """
    if confirmation is not None:
        for candidate in confirmation.candidates:
            if candidate.number == row.number and candidate.estimate is not None:
                return asdict(candidate.estimate.score) | {
                    "noise": "images, seeds and folds" if confirmation.folds else "images and seeds",
                    "seeds": candidate.seeds,
                    "probability_best": candidate.estimate.best,
                    "within": candidate.estimate.within,
                    "optimism": confirmation.optimism,
                }
    try:
        predictions = predictions_of(entry, row.number)
    except PredictionsError:
        return {}
    accuracy = of_hits(hits(predictions), predictions.labels, attribute_sizes(entry))
    return asdict(accuracy) | {"noise": "images", "seeds": 1}


def in_words(accuracy: dict[str, Any]) -> str:
    """What `known_accuracy` returns, in one line, in percent."""
    value, low, high = (100 * accuracy[key] for key in ("value", "low", "high"))
    return f"{value:.2f} % (95 %: {low:.2f} to {high:.2f}; noise of {accuracy['noise']})"


def export_trial(
    engine: sa.Engine,
    entry: StudyEntry,
    choice: Choice,
    accuracy: dict[str, Any],
    output: Path,
) -> None:
    """Write a trial's configuration, with what `known_accuracy` says of it.

    [train] holds every resolved setting, [origin] says where they come from and what is known of the
    score, [slurm.*] are the search's profiles. Raises InputError if the trial has not yet all its
    parameters, OutputError if another file is there, and OSError if it cannot be written.
    """
    row = choice.row
    missing = entry.settings["space"].keys() - row.params.keys()
    if missing:
        so_far = "" if row.state in FINISHED else " yet"
        names = ", ".join(sorted(missing))
        raise InputError(f"trial {row.number} has no {names}{so_far}; choose another with --trial")
    params = {key: value for key, value in row.params.items() if key in TrainConfig.model_fields}
    config = TrainConfig(**entry.settings["train"] | entry.places | params)
    origin = {
        "study": entry.name,
        "trial": row.number,
        "state": row.state,
        "standing": choice.standing,
        "score": row.value,
        "curve": curve(engine, entry.study_id, row.number),
        "seed": config.seed,
        "dataset": entry.dataset,
        "reader": reader_of(entry),
        "weights": entry.settings["train"].get("weights"),
        "git_commit": git_commit(),
        "exported": datetime.now(UTC).replace(microsecond=0),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "accuracy": accuracy,
    }
    tables = {"format": FORMAT, "train": config.model_dump(), "origin": origin}
    slurm = entry.settings.get("slurm", {})
    text = tomli_w.dumps(_present(tables | ({"slurm": slurm} if slurm else {})))
    check_export(output, entry.name)  # another search may have ended meanwhile
    write_atomically(output, text.encode())


def check_export(output: Path, study: str) -> None:
    """Check that an export may be written: where no file is, or an earlier export of the study.

    Raises OutputError.
    """
    check_output(output)
    if not output.exists():
        return
    try:
        origin = read_toml(output).get("origin") if output.is_file() else None
    except InputError:
        origin = None
    if not isinstance(origin, dict):
        raise OutputError(
            f"{output}: there is a file that atelier export did not write; give another name"
        )
    if origin.get("study") != study:
        raise OutputError(
            f"{output}: there is the export of study {origin.get('study')!r}, and this is {study!r}; "
            "give another name with -o"
        )


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without None, for which TOML has no word."""
    return {
        key: _present(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def git_commit() -> str | None:
    """The commit of this program's source, if it is a checkout; "-dirty" if it was changed."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


class Accuracy(BaseModel):
    """What `known_accuracy` says of a trial."""

    value: float
    low: float
    high: float
    noise: str
    seeds: int
    within: float | None = None  # see `Estimate`; None without a confirmation
    optimism: float | None = None  # see `Confirmation`


class Origin(BaseModel):
    """What others than `train` read of [origin]. A user may have changed it."""

    study: str = "?"
    trial: int | str = "?"
    standing: str = "?"
    accuracy: Accuracy | None = None

    @field_validator("accuracy", mode="before")
    @classmethod
    def _none_if_unknown(cls, value: object) -> object:
        return value or None


@dataclass(frozen=True)
class Bundle:
    """An exported file that has been read."""

    config: TrainConfig
    origin: dict[str, Any]
    slurm: dict[str, SlurmProfile]


class _Tables(BaseModel):
    """The tables of an exported file."""

    model_config = ConfigDict(extra="forbid")

    format: Whole = FORMAT
    train: dict[str, Any]
    origin: dict[str, Any] = {}
    slurm: Profiles = {}


def load_bundle(path: Path) -> Bundle:
    """Read an exported configuration. Raises InputError."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the configuration that atelier export wrote")
    if not path.is_file():
        raise InputError(f"{path}: no such file; write one with: atelier export STUDY -o {path}")
    tables = read_toml(path)
    if "train" not in tables:
        raise InputError(f"{path}: no [train] table; write one with: atelier export STUDY -o FILE")
    if "space" in tables:
        raise InputError(f"{path} is a study file with a [space]; run it with: atelier search {path}")
    if tables.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"{path}: has format {tables['format']}, this version reads {FORMAT}; export it again with "
            "this version, or install the one that wrote it"
        )
    checked = validate(_Tables, tables, path)
    config = validate(TrainConfig, checked.train, path, "train")
    validate(Origin, checked.origin, path, "origin")
    return Bundle(config, checked.origin, checked.slurm)


def check_origin(bundle: Bundle, config: TrainConfig, dataset: str) -> None:
    """Check that dataset and weights are those of the search. Raises InputError.

    `dataset` is the fingerprint of the one that is there.
    """
    present = {"data": ("dataset", dataset), "weights": ("weights", weights_identity(config.weights))}
    if bundle.origin.get("reader", 1) != READER:
        del present["data"]  # fingerprints were made differently then; a note says what may differ
    for option, (name, value) in present.items():
        if bundle.origin.get(name, value) != value:
            raise InputError(
                f"{option} = {getattr(config, option)!r} is not the {name} of the search; give that "
                f"with --{option}, or delete the line {name} in [origin]"
            )


def changed(
    bundle: Bundle, changes: Mapping[str, Any], path: Path, stretch_warmup: bool = False
) -> tuple[TrainConfig, list[str]]:
    """The configuration with some values changed (None is no change), and notes for the user.

    If the length changes, the warm-up keeps its number of epochs. Another number may be given, or
    `stretch_warmup` changes it in proportion. Raises InputError.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    warmup, notes = _schedule(bundle.config, given, stretch_warmup)
    given["warmup_epochs"] = warmup
    if bundle.origin:
        trial, study, standing = (bundle.origin.get(key, "?") for key in ("trial", "study", "standing"))
        notes.append(f"trains trial {trial} of study {study!r}, {standing}")
        if (reader := bundle.origin.get("reader", 1)) != READER:
            notes.append(reader_note("search", reader))
    config = validate(TrainConfig, bundle.config.model_dump() | given, path, "train")
    if not config.validates:
        notes.append("note: it trains on the validation images too, so nothing is validated")
    return config, notes


def _schedule(old: TrainConfig, given: Mapping[str, Any], stretch_warmup: bool) -> tuple[int, list[str]]:
    """The warm-up's epochs, and notes on the schedule. Raises InputError."""
    epochs, hint = given.get("epochs", old.epochs), ""
    warmup = given.get("warmup_epochs", old.warmup_epochs)
    stretched = min(round(old.warmup_epochs * epochs / old.epochs), epochs - 1)
    if stretch_warmup:
        if "warmup_epochs" in given:
            raise InputError(
                f"--stretch-warmup and --warmup-epochs {given['warmup_epochs']} are two lengths of the "
                "warm-up; give one of them"
            )
        if "epochs" not in given:
            raise InputError("--stretch-warmup goes with --epochs, to whose length it stretches")
        warmup = stretched
    elif epochs != old.epochs and "warmup_epochs" not in given:
        if old.warmup_epochs >= epochs:
            others = f"--stretch-warmup, for one of {stretched}, or --warmup-epochs, 0 to {epochs - 1}"
            raise InputError(
                f"--epochs {epochs}: the warm-up of {counted(old.warmup_epochs, 'epoch')} leaves "
                f"nothing of it; add {others if epochs > 1 else '--warmup-epochs 0'}"
            )
        if stretched != old.warmup_epochs:
            hint = f"; --stretch-warmup makes it {stretched}"
    if (epochs, warmup) == (old.epochs, old.warmup_epochs):
        return warmup, []
    length = counted(epochs, "epoch")
    return warmup, [
        f"note: the schedule has {length}{_before(epochs, old.epochs)}, with a warm-up of "
        f"{warmup}{_before(warmup, old.warmup_epochs)}{hint}"
    ]


def _before(now: int, before: int) -> str:
    return " as before" if now == before else f" instead of {before}"

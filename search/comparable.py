"""Refuse to go on with a study that was made with other versions, settings or images than those here."""

from importlib.metadata import version
from typing import Any

from search.errors import InputError
from storage import studies
from trainer.config import ARITHMETIC, TrainConfig
from trainer.images import READER

# These settings may change: trials stay comparable.
NOT_COMPARED = {"places", "slurm", "search", "images", "arithmetic", "wanted"}
SAME_NUMBERS = {"graphs"}  # of [train]


def reader_of(entry: studies.StudyEntry) -> int:
    """The version of the reader of images that a study was made with."""
    reader: int = entry.settings.get("images", {}).get("reader", 1)
    return reader


def reader_note(what: str, reader: int) -> str:
    """The note for a search or a run that had another version of the reader."""
    return (
        f"note: the {what} had version {reader} of the reader of images, this is {READER}: the same "
        "files may look different (CHANGELOG.md)"
    )


def check_versions(entry: studies.StudyEntry) -> None:
    """Raises InputError if this version would read or train the study's images otherwise than it did."""
    arithmetic = entry.settings.get("arithmetic", {}).get("version", 1)
    for what, made_by, here, difference in (
        ("reader of images", reader_of(entry), READER, "the same files may look different"),
        ("training's arithmetic", arithmetic, ARITHMETIC, "the same trial gets another curve"),
    ):
        if made_by != here:
            raise InputError(
                f"study {entry.name!r} was made with version {made_by} of the {what}, this is {here}: "
                f"{difference} (CHANGELOG.md); go on with the Atelier that made it, or begin a study of "
                "another name"
            )


def check_optuna(entry: studies.StudyEntry) -> None:
    """Raises InputError if the study was made with another Optuna."""
    if entry.optuna_version != (here := version("optuna")):
        raise InputError(
            f"study {entry.name!r} was made with Optuna {entry.optuna_version}, here is {here}; install "
            "the same version on every machine"
        )


def check_same(identity: dict[str, Any], entry: studies.StudyEntry, fingerprint: str) -> None:
    """Raises InputError unless the study was made with these settings, on this dataset."""
    check_versions(entry)
    check_optuna(entry)
    name = entry.name
    other = f"give [study] another name than {name!r}, or restore the setting"
    for table in identity.keys() | (entry.settings.keys() - NOT_COMPARED):
        settings, saved = identity.get(table, {}), entry.settings.get(table, {})
        for key in (settings.keys() | saved.keys()) - SAME_NUMBERS:
            # A setting that an earlier version did not know had today's default.
            default = TrainConfig.model_fields[key].default if table == "train" else None
            if settings.get(key, default) != saved.get(key, default):
                raise InputError(
                    f"study {name!r} was made with {table}.{key} = {saved.get(key, default)}, the file "
                    f"says {settings.get(key, default)}; {other}"
                )
    if entry.dataset != fingerprint:
        raise other_dataset(name, entry.dataset, fingerprint)


def other_dataset(name: str, expected: str, found: str) -> InputError:
    """The error of a study that meets another dataset than its own. Both are fingerprints."""
    return InputError(
        f"study {name!r} was made on another dataset ({expected[:12]}, here is {found[:12]}); give the "
        "right one with --data, or another name in [study]"
    )

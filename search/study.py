"""Create the study that a study file describes, or join it and compare. Imports no torch."""

import logging
from dataclasses import replace
from typing import Any

import optuna
import sqlalchemy as sa

from search.errors import InputError
from search.study_config import WARM_START_TRIALS, StudyConfig
from storage import studies
from storage.database import retrying
from storage.status import read_status
from trainer.config import ARITHMETIC, TrainConfig
from trainer.dataset import Dataset
from trainer.division import absent_attributes
from trainer.images import READER

log = logging.getLogger(__name__)

# These settings may change: trials stay comparable.
NOT_COMPARED = {"places", "slurm", "search", "images", "arithmetic", "wanted"}
SAME_NUMBERS = {"graphs"}  # of [train]


@retrying
def open_study(
    config: StudyConfig,
    engine: sa.Engine,
    storage: optuna.storages.BaseStorage,
    dataset: Dataset,
    lead: bool = False,
) -> tuple[optuna.Study, studies.StudyEntry]:
    """Create the study, or go on with it.

    A worker joins what is on record. The command that a person types to start a search (`lead`) also
    sets the budget, and takes back an earlier `atelier stop`. Raises InputError if the study was made
    with other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the commands say what there is to say
    name, identity = config.study.name, config.identity()
    entry = studies.study_entry(engine, name)
    try:
        if entry is None:
            entry = _create(config, identity, engine, storage, dataset)
        _check_same(identity, entry, dataset.fingerprint)
        first = _recorded_first(config, entry)
        if lead:
            entry = _take_the_lead(config, identity | config.metadata(first), engine, entry)
        study = optuna.load_study(study_name=name, storage=storage, sampler=config.make_sampler(first))
    except KeyError:  # Optuna's, of a study that is no more
        raise InputError(
            f"study {name!r} was deleted meanwhile; give the same command again to begin anew"
        ) from None
    return study, entry


def _create(
    config: StudyConfig,
    identity: dict[str, Any],
    engine: sa.Engine,
    storage: optuna.storages.BaseStorage,
    dataset: Dataset,
) -> studies.StudyEntry:
    """Make the study, unless another process is quicker. Returns what is on record then.

    Raises InputError for another dataset than the configuration's only one.
    """
    if config.dataset_fingerprint not in (None, dataset.fingerprint):
        raise other_dataset(config.study.name, str(config.dataset_fingerprint), dataset.fingerprint)
    from dashboards.note import leave_note  # late: it takes a second, and most studies are made before

    study = optuna.create_study(
        storage=storage, study_name=config.study.name, direction="maximize", load_if_exists=True
    )
    leave_note(study)  # before the entry: what is on record has its note
    return studies.enter_study(
        engine,
        study._study_id,
        dataset=dataset.fingerprint,
        attributes=config.attribute_table(dataset),
        settings=identity | config.metadata(_first(config, engine)),
        **_budget(config),
    )


def _take_the_lead(
    config: StudyConfig, settings: dict[str, Any], engine: sa.Engine, entry: studies.StudyEntry
) -> studies.StudyEntry:
    """Set the budget and how to search, let workers start, and say what is odd about the labels."""
    budget = _budget(config)
    studies.update_study(engine, entry.study_id, stop_requested=None, settings=settings, **budget)
    for line in absent_attributes(entry.attributes):
        log.warning("study %r: %s", entry.name, line)
    return replace(entry, max_trials=config.study.max_trials, settings=settings)


def _budget(config: StudyConfig) -> dict[str, Any]:
    hours = config.study.max_gpu_hours
    return {
        "max_trials": config.study.max_trials,
        "max_gpu_seconds": None if hours is None else hours * 3600,
    }


def _first(config: StudyConfig, engine: sa.Engine) -> list[dict[str, Any]]:
    """The parameters that a new study begins with. Raises InputError."""
    first = [*config.study.first]
    for name in config.study.warm_start:
        earlier = studies.study_entry(engine, name)
        if earlier is None:
            raise InputError(f"study.warm_start: no study {name!r}; see: atelier status")
        best = read_status(engine, earlier.study_id, name).completed()
        if not best:
            raise InputError(
                f"study.warm_start: {name!r} has no complete trial; wait for one, or leave it out"
            )
        # What that study held fixed may be open here.
        points = [config.clip(earlier.settings["train"] | row.params) for row in best]
        distinct = list({tuple(point.items()): point for point in points}.values())
        first += [point for point in distinct[:WARM_START_TRIALS] if point not in first]
    return first


def _recorded_first(config: StudyConfig, entry: studies.StudyEntry) -> list[dict[str, Any]]:
    """The parameters that the study began with. Earlier versions did not record them."""
    recorded: list[dict[str, Any]] = entry.settings.get("search", {}).get("first", config.study.first)
    return recorded


def reader_of(entry: studies.StudyEntry) -> int:
    """The version of the reader of images that a study was made with."""
    version: int = entry.settings.get("images", {}).get("reader", 1)
    return version


def reader_note(what: str, version: int) -> str:
    """The note for a search or a run that had another version of the reader."""
    return (
        f"note: the {what} had version {version} of the reader of images, this is {READER}: the same "
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
    if entry.optuna_version != optuna.__version__:
        raise InputError(
            f"study {entry.name!r} was made with Optuna {entry.optuna_version}, here is "
            f"{optuna.__version__}; install the same version on every machine"
        )


def _check_same(identity: dict[str, Any], entry: studies.StudyEntry, fingerprint: str) -> None:
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

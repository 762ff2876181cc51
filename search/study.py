"""Create the study that a study file describes, or join it and compare. Imports no torch."""

import logging
from dataclasses import replace
from typing import Any

import optuna
import sqlalchemy as sa

from search.comparable import check_same, other_dataset
from search.errors import InputError
from search.sampling import make_sampler
from search.study_config import WARM_START_TRIALS, StudyConfig
from storage import studies
from storage.database import retrying
from storage.optuna_storage import optuna_storage
from storage.schema import ensure_tables
from storage.status import read_status
from trainer.dataset import Dataset
from trainer.division import absent_attributes

log = logging.getLogger(__name__)


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
        check_same(identity, entry, dataset.fingerprint)
        first = _recorded_first(config, entry)
        if lead:
            entry = _take_the_lead(config, identity | config.metadata(first), engine, entry)
        study = optuna.load_study(study_name=name, storage=storage, sampler=make_sampler(config, first))
    except KeyError:  # Optuna's, of a study that is no more
        raise InputError(
            f"study {name!r} was deleted meanwhile; give the same command again to begin anew"
        ) from None
    return study, entry


@retrying
def lead_study(config: StudyConfig, engine: sa.Engine, dataset: Dataset) -> studies.StudyEntry:
    """Make the tables if there are none, and open the study as its lead. Raises DatabaseError too."""
    ensure_tables(engine)
    return open_study(config, engine, optuna_storage(engine), dataset, lead=True)[1]


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

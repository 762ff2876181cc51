"""Study files: what they may say, and the Optuna study that follows from one. Imports no torch."""

import logging
from typing import Any

import optuna
import sqlalchemy as sa

from search.errors import InputError
from search.study_config import WARM_START_TRIALS, StudyConfig
from storage import studies
from storage.database import retrying
from storage.status import read_status
from trainer.config import TrainConfig
from trainer.dataset import Dataset, absent_attributes
from trainer.images import READER

log = logging.getLogger(__name__)

# Of a study's settings: what does not make its trials incomparable.
NOT_COMPARED = {"places", "slurm", "search", "images"}


@retrying
def open_study(
    file: StudyConfig,
    engine: sa.Engine,
    storage: optuna.storages.BaseStorage,
    dataset: Dataset,
    lead: bool = False,
) -> tuple[optuna.Study, studies.StudyEntry]:
    """Create the study, or go on with it. Raises InputError if it was made with other settings.

    A worker joins what is on record; the command that a person types to start a search (`lead`) also
    sets the budget and takes back an earlier `atelier stop`.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the commands say what there is to say
    name = file.study.name
    identity = file.identity()
    existing = studies.study_entry(engine, name)
    if existing is not None:
        _same(identity, existing, dataset.fingerprint)
    if file.dataset_fingerprint not in (None, dataset.fingerprint):
        raise other_dataset(name, str(file.dataset_fingerprint), dataset.fingerprint)
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
    studies.enter_study(
        engine,
        study._study_id,
        dataset=dataset.fingerprint,
        attributes=dataset.attribute_table(file.shared),
        settings=identity | file.metadata(first),
        **budget,
    )
    entry = _entered(engine, name)
    _same(identity, entry, dataset.fingerprint)  # two processes may have created it at once
    first = _recorded_first(file, entry)
    if lead:
        settings = identity | file.metadata(first)
        studies.update_study(engine, study._study_id, stop_requested=None, settings=settings, **budget)
        entry = _entered(engine, name)
        for line in absent_attributes(entry.attributes):
            log.warning("study %r: %s", name, line)
    study.sampler = file.make_sampler(first)
    return study, entry


def _first(file: StudyConfig, engine: sa.Engine) -> list[dict[str, Any]]:
    """The parameters that a new study begins with. Raises InputError."""
    first = [*file.study.first]
    for name in file.study.warm_start:
        earlier = studies.study_entry(engine, name)
        if earlier is None:
            raise InputError(f"study.warm_start: no study {name!r}; see: atelier status")
        best = read_status(engine, earlier.study_id, name).completed()
        if not best:
            raise InputError(
                f"study.warm_start: {name!r} has no complete trial; wait for one, or leave it out"
            )
        # What that study held fixed may be open here.
        points = [file.clip(earlier.settings["train"] | row.params) for row in best]
        distinct = list({tuple(point.items()): point for point in points}.values())
        first += [point for point in distinct[:WARM_START_TRIALS] if point not in first]
    return first


def _recorded_first(file: StudyConfig, entry: studies.StudyEntry) -> list[dict[str, Any]]:
    """As of the study's beginning; of one that was made by an earlier version, the file's."""
    recorded: list[dict[str, Any]] = entry.settings.get("search", {}).get("first", file.study.first)
    return recorded


def _entered(engine: sa.Engine, name: str) -> studies.StudyEntry:
    entry = studies.study_entry(engine, name)
    assert entry is not None  # it was just entered
    return entry


def reader_of(entry: studies.StudyEntry) -> int:
    """The version of the reader of images that a study was made with."""
    version: int = entry.settings.get("images", {}).get("reader", 1)
    return version


def reader_note(what: str, version: int) -> str:
    """What to say where a search or a run is used that had another version of the reader."""
    return (
        f"note: the {what} had version {version} of the reader of images, this is {READER}: the same "
        "files may look different (CHANGELOG.md)"
    )


def check_reader(entry: studies.StudyEntry) -> None:
    """That its images would be read as they were. Raises InputError."""
    made_by = reader_of(entry)
    if made_by != READER:
        raise InputError(
            f"study {entry.name!r} was made with version {made_by} of the reader of images, this is "
            f"{READER}: the same files may look different (CHANGELOG.md); go on with the Atelier that "
            "made it, or begin a study of another name"
        )


def _same(identity: dict[str, Any], existing: studies.StudyEntry, fingerprint: str) -> None:
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

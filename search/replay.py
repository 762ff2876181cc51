"""`atelier replay`: a trial once more, alone, through the same epochs of the stream of images.

A trial's numbers depend on its configuration and on the stream's epochs, not on the trials that went
through them beside it. This shows it for any trial on record.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from search.errors import InputError
from search.study import check_reader, other_dataset
from search.study_config import StudyConfig
from storage.status import read_status
from storage.studies import StudyEntry, epochs_of
from trainer.loop import train
from trainer.metrics import REPEATABLE, EpochResult
from trainer.workspace import Workspace


@dataclass(frozen=True)
class Replayed:
    """One epoch as it is on record, and as it came out again."""

    recorded: dict[str, Any]  # columns of the table `epoch`
    again: EpochResult

    @property
    def differing(self) -> list[str]:
        """The numbers that are not equal, bit for bit."""
        return [
            name for name in REPEATABLE if not _equal(self.recorded[name], getattr(self.again, name))
        ]


def replay(
    engine: sa.Engine, entry: StudyEntry, file: StudyConfig, number: int, cache: Path
) -> Iterator[Replayed]:
    """Train a trial's epochs again, those that are on record. Raises InputError."""
    rows = {row.number: row for row in read_status(engine, entry.study_id, entry.name).trials}
    if number not in rows:
        raise InputError(f"study {entry.name!r} has no trial {number}; it has {len(rows)}, from 0")
    recorded = epochs_of(engine, entry.study_id, number)
    if not recorded:
        raise InputError(f"trial {number} of study {entry.name!r} has no epoch yet; wait for one")
    check_reader(entry)
    config = file.config(rows[number].params)
    workspace = Workspace(config, cache)
    if workspace.dataset.fingerprint != entry.dataset:
        raise other_dataset(entry.name, entry.dataset, workspace.dataset.fingerprint)
    stream_epochs = [row["stream_epoch"] for row in recorded]
    results = train(config, workspace, stream_epochs=stream_epochs)
    for row, result in zip(recorded, results, strict=False):  # a pruned trial's end early
        yield Replayed(row, result)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return one == list(other)
    if one is None:  # an epoch of an earlier version
        return True
    return bool(one == other) or (math.isnan(one) and math.isnan(other))

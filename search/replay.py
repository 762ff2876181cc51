"""`atelier replay`: trains a trial again, alone, through the same epochs of the stream of images.

A trial's numbers depend on its configuration and on the stream's epochs. They do not depend on the
trials that were trained beside it. This shows it for any trial on record.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from search.comparable import check_versions, other_dataset
from search.errors import InputError
from search.export import find_trial
from search.study_config import StudyConfig
from storage.status import read_status
from storage.studies import StudyEntry, epochs_of
from trainer.loop import train
from trainer.metrics import EpochResult
from trainer.workspace import Workspace


@dataclass(frozen=True)
class Replayed:
    """One epoch: as it is on record, and as it was trained again."""

    recorded: dict[str, Any]  # columns of the table `epoch`
    again: EpochResult

    @property
    def differing(self) -> list[str]:
        """The numbers that are not equal, bit for bit."""
        return [*self.again.differing(self.recorded)]


def replay(
    engine: sa.Engine, entry: StudyEntry, file: StudyConfig, number: int, cache: Path
) -> Iterator[Replayed]:
    """Train those epochs of a trial again that are on record. Raises InputError."""
    row = find_trial(read_status(engine, entry.study_id, entry.name), number)
    recorded = epochs_of(engine, entry.study_id, number)
    if not recorded:
        raise InputError(f"trial {number} of study {entry.name!r} has no epoch yet; wait for one")
    check_versions(entry)
    config = file.config(row.params)
    workspace = Workspace(config, cache)
    if workspace.dataset.fingerprint != entry.dataset:
        raise other_dataset(entry.name, entry.dataset, workspace.dataset.fingerprint)
    # Where the study never was on such a device, the trunk computes what it computes here.
    workspace.agree(lambda device, digest: entry.trunks.get(device, digest))
    stream_epochs = [epoch["stream_epoch"] for epoch in recorded]
    results = train(config, workspace, stream_epochs=stream_epochs)
    for epoch, result in zip(recorded, results, strict=False):  # a pruned trial has fewer on record
        yield Replayed(epoch, result)

"""What a study's rules (search/verify) do not ask: undisturbed curves, and what is left in a home."""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from search.study_config import StudyConfig
from search.verify.evidence import Trial
from storage.paths import RunFolder, artifacts, files_in, image_cache
from storage.prune import remove, superfluous
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.metrics import EpochResult
from trainer.workspace import Workspace


class Reference:
    """A run of one configuration, trained as far as it is asked for."""

    def __init__(self, config: TrainConfig, workspace: Workspace, stream: list[int]) -> None:
        self._epochs = train(config, workspace, stream_epochs=stream)
        self._results: list[EpochResult] = []
        # After those that are given, it goes on through the next ones.
        beyond = range(stream[-1] + 1 if stream else 0, sys.maxsize)
        self._stream = [*stream, *beyond[: config.epochs]][: config.epochs]

    def begins_with(self, stream: list[int]) -> bool:
        """Whether it goes through these epochs of the stream first."""
        return self._stream[: len(stream)] == stream

    def first(self, epochs: int) -> list[EpochResult]:
        """So many, or all that there are."""
        self._results += itertools.islice(self._epochs, max(epochs - len(self._results), 0))
        return self._results[:epochs]


class References:
    """What each configuration learns, alone and undisturbed, through given epochs of the stream.

    `cache` is the folder for prepared images; that of the home, if unset, which must then stay.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache
        self._workspaces: dict[str, Workspace] = {}
        self._known: dict[str, list[Reference]] = {}

    def curve(self, config: StudyConfig, trial: Trial) -> list[EpochResult]:
        """As many epochs as are on record, if a run has so many."""
        settings = config.config(trial.params)
        stream = [row.stream_epoch for row in trial.epochs]
        known = self._known.setdefault(settings.model_dump_json(), [])
        reference = next((one for one in known if one.begins_with(stream)), None)
        if reference is None:
            reference = Reference(settings, self._workspace(config.shared), stream)
            known.append(reference)
        return reference.first(len(stream))

    def _workspace(self, shared: TrainConfig) -> Workspace:
        key = shared.model_dump_json()
        if key not in self._workspaces:
            self._workspaces[key] = Workspace(shared, self._cache or image_cache())
        return self._workspaces[key]


def half_written(engine: sa.Engine, study_id: int, runs: RunFolder) -> Iterator[str]:
    """Files that nobody finishes any more, and that are left by `db prune` a day after all workers' end.

    A killed worker cannot remove what it was writing. Its successor writes under another name.
    """
    for path in _hidden(runs):
        os.utime(path, (0, 0))
    remove(superfluous(engine, study_id, runs, keep=None))
    for path in _hidden(runs):
        yield f"{path} is left"


def _hidden(runs: RunFolder) -> list[Path]:
    files = [*runs.files(), *files_in(artifacts()), *files_in(image_cache())]
    return [path for path in files if path.name.startswith(".") or path.suffix == ".partial"]

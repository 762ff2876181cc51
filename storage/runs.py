"""The run folder: every path of a study on disk. Nobody else puts a file name together."""

import os
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from storage.database import home


def total_size(files: Iterable[Path]) -> int:
    """Bytes of files, as far as they are still there."""
    size = 0
    for path in files:
        with suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def files_in(folder: Path) -> list[Path]:
    """All files below a folder; some may come and go meanwhile."""
    # Unlike Path.rglob it is not surprised by a folder that has just been removed.
    return [Path(top, name) for top, _, names in os.walk(folder) for name in names]


def make_private(folder: Path) -> None:
    """Make a folder that only its owner may enter."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


class RunFolder:
    """`.atelier/runs/<study>-<when it was created>`: a folder per trial, and the workers' logs.

    The time keeps a study of another database, or a deleted one, with the same name apart.
    """

    def __init__(self, study_name: str, created: datetime) -> None:
        # Percent-encoding keeps any name one harmless path part; a leading dot would hide it.
        part = quote(study_name, safe=" ").replace(".", "%2E")
        self.path = home() / "runs" / f"{part}-{created.astimezone(UTC):%Y%m%d-%H%M%S}"

    def make(self) -> "RunFolder":
        """Make the folder, for its owner alone: predictions are nobody else's."""
        make_private(self.path)
        return self

    def files(self) -> list[Path]:
        """All that is in it; some may come and go meanwhile."""
        return files_in(self.path)

    def checkpoints(self, trial_number: int) -> Path:
        """The folder of a trial's checkpoints."""
        return self.path / f"trial-{trial_number:05d}"

    def predictions(self, trial_number: int) -> Path:
        """The file of a complete trial's predictions, of every epoch."""
        return self.path / "predictions" / f"trial-{trial_number:05d}.npz"

    @property
    def logs(self) -> Path:
        """The folder of the workers' logs."""
        return self.path / "logs"


def artifacts() -> Path:
    """Where the pictures are that optuna-dashboard shows with a trial."""
    return home() / "artifacts"


def image_cache() -> Path:
    """Where prepared images are kept, for all studies."""
    return home() / "cache"

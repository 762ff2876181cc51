"""The run folder: every path of a study on disk. Nobody else puts a file name together."""

import os
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from storage.ownership import private, require_own

# What of a path is below a home, wherever that was: of a worker's log, or that of an array's task.
_FORMER = re.compile(r"/.*/(runs/[^/]+-\d{8}-\d{6}/logs/[^/]+|slurm/[^/]+)")


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
    """Make a folder of the home that only its owner may enter. Raises OSError, ForeignHomeError."""
    require_own(home())
    with private():
        folder.mkdir(parents=True, exist_ok=True)


def path_to_record(path: Path) -> str:
    """A path for the database: one below the home is kept relative to it, so that it moves along."""
    own = home()
    if ".." in path.parts:
        path = path.resolve()
    for base in (own, own.resolve()):
        if path.is_relative_to(base):
            return f"./{path.relative_to(base)}"
    return str(path)


def path_from_record(text: str) -> Path:
    """The path that was put on record. Earlier versions wrote where it was, in a home of that time."""
    if former := _FORMER.fullmatch(text):
        own = home() / former[1]
        return own if own.exists() else Path(text)
    return home() / text if text.startswith("./") else Path(text)


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

    def new_log(self) -> Path:
        """An empty log, of a name that no other worker's has, in this home or another of the study.

        A log on record is looked for in whatever home is at hand: it must not be somebody else's.
        """
        make_private(self.logs)
        path = self.logs / f"worker-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}.log"
        path.touch(mode=0o600, exist_ok=False)
        return path


def artifacts() -> Path:
    """Where the pictures are that optuna-dashboard shows with a trial."""
    return home() / "artifacts"


def image_cache() -> Path:
    """Where prepared images are kept, for all studies. Raises ForeignHomeError."""
    require_own(home())
    return home() / "cache"


def home() -> Path:
    """The folder for everything that Atelier keeps beside the database: `.atelier`, if unset."""
    # A ~ that no shell has seen, as from a file of settings.
    return Path(os.path.expanduser(os.environ.get("ATELIER_HOME") or ".atelier")).absolute()

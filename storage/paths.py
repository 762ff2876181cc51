"""Build every path in the home and in a study's run folder: no other file does."""

import os
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, unquote

from storage.ownership import private, require_own

# An absolute path of a worker's log or an array task's log; the group is its part below the home.
_FORMER = re.compile(r"/.*/(runs/[^/]+-\d{8}-\d{6}/logs/[^/]+|slurm/[^/]+)")

DELETED = ".deleted"  # a file in the run folder of a study that was deleted


def total_size(files: Iterable[Path]) -> int:
    """The bytes of the files; deleted files count nothing."""
    size = 0
    for path in files:
        with suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def files_in(folder: Path) -> list[Path]:
    """All files below a folder; files may come and go meanwhile."""
    # Path.rglob fails on a folder that has just been removed; os.walk does not.
    return [Path(top, name) for top, _, names in os.walk(folder) for name in names]


def make_private(folder: Path) -> None:
    """Make a folder of the home that only its owner may enter. Raises OSError, ForeignHomeError."""
    require_own(home())
    with private():
        folder.mkdir(parents=True, exist_ok=True)


def path_to_record(path: Path) -> str:
    """A path as text for the database: relative to the home if below it, so that the home can move."""
    base = home()
    if ".." in path.parts:
        path = path.resolve()
    for folder in (base, base.resolve()):
        if path.is_relative_to(folder):
            return f"./{path.relative_to(folder)}"
    return str(path)


def path_from_record(text: str) -> Path:
    """The path for a text from the database. Earlier versions wrote absolute paths, in an old home."""
    if former := _FORMER.fullmatch(text):
        path = home() / former[1]
        return path if path.exists() else Path(text)
    return home() / text if text.startswith("./") else Path(text)


class RunFolder:
    """`.atelier/runs/<study>-<when it was created>`: a folder per trial, and the workers' logs.

    The time tells studies with the same name apart, such as a deleted one or another database's.
    """

    def __init__(self, study_name: str, created: datetime) -> None:
        # Percent-encoding makes any name one valid path part. Dots too: a leading dot would hide it.
        part = quote(study_name, safe=" ").replace(".", "%2E")
        self.path = home() / "runs" / f"{part}-{created.astimezone(UTC):%Y%m%d-%H%M%S}"

    def make(self) -> "RunFolder":
        """Make the folder so that only its owner may enter: predictions are private."""
        make_private(self.path)
        return self

    def files(self) -> list[Path]:
        """All files in it; files may come and go meanwhile."""
        return files_in(self.path)

    def checkpoints(self, trial_number: int) -> Path:
        """The folder of a trial's checkpoints."""
        return self.path / f"trial-{trial_number:05d}"

    def predictions(self, trial_number: int) -> Path:
        """The file with a complete trial's predictions of every epoch."""
        return self.path / "predictions" / f"trial-{trial_number:05d}.npz"

    def mark_deleted(self) -> None:
        """Note that the database has the study no longer: shells do not offer it any more."""
        with suppress(OSError):  # no folder here, or none that this process may write to
            (self.path / DELETED).touch()

    @property
    def logs(self) -> Path:
        """The folder of the workers' logs."""
        return self.path / "logs"

    def new_log(self) -> Path:
        """Make an empty log; no other worker of the study has its name, in this home or another.

        A log on record is looked up below the present home, and must not be another worker's there.
        """
        make_private(self.logs)
        path = self.logs / f"worker-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}.log"
        path.touch(mode=0o600, exist_ok=False)
        return path


def studies_here() -> set[str]:
    """The names of the studies that have a run folder in the home, whether or not a database runs.

    Those that were deleted in the dashboard are not among them.
    """
    folders = (home() / "runs").glob("*-????????-??????")
    kept = (folder.name for folder in folders if not (folder / DELETED).exists())
    return {unquote(name[: -len("-YYYYMMDD-HHMMSS")]) for name in kept}


def artifacts() -> Path:
    """The folder of the pictures that optuna-dashboard shows with a trial."""
    return home() / "artifacts"


def image_cache() -> Path:
    """The folder of prepared images, for all studies. Raises ForeignHomeError."""
    require_own(home())
    return home() / "cache"


def home() -> Path:
    """The folder for all that Atelier keeps outside the database: ATELIER_HOME, or `.atelier`."""
    # No shell has expanded a ~ that comes from a file of settings.
    return Path(os.path.expanduser(os.environ.get("ATELIER_HOME") or ".atelier")).absolute()

"""Where SLURM writes the logs of its tasks, and which is the newest."""

from collections.abc import Iterable
from pathlib import Path

from storage.paths import home
from storage.studies import split_job


def log_folder() -> Path:
    """Where array tasks write their logs."""
    return home() / "slurm"


def newest_log(array_jobs: Iterable[str]) -> Path | None:
    """The log that was written to last by a task of these arrays."""
    logs = [path for job in array_jobs for path in log_folder().glob(f"{split_job(job)[0]}_*.log")]
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)

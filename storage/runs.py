"""The run folder: every path of a study on disk. Nobody else puts a file name together."""

from pathlib import Path
from urllib.parse import quote

from storage.database import home


class RunFolder:
    """`.atelier/runs/<study>`: a folder per trial, and the workers' logs."""

    def __init__(self, study_name: str) -> None:
        # Percent-encoding keeps any name one harmless path part; a leading dot would hide it.
        part = quote(study_name, safe=" ").replace(".", "%2E")
        self.path = home() / "runs" / part

    def checkpoints(self, trial_number: int) -> Path:
        """The folder of a trial's checkpoints."""
        return self.path / f"trial-{trial_number:05d}"

    def worker_log(self, number: int) -> Path:
        """The log of the n-th worker of a local search."""
        return self.path / "logs" / f"worker-{number}.log"


def image_cache() -> Path:
    """Where prepared images are kept, for all studies."""
    return home() / "cache"

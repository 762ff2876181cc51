"""An embedded PostgreSQL in a temporary folder, for benchmarks."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.embedded import EmbeddedPostgres


@contextmanager
def temporary_home() -> Iterator[Path]:
    """Set ATELIER_HOME, for this process and its children, to a temporary folder with a server."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ATELIER_HOME"] = folder
        os.environ.pop("ATELIER_DATABASE_URL", None)
        embedded = EmbeddedPostgres(Path(folder))
        embedded.start()
        try:
            yield Path(folder)
        finally:
            embedded.stop()

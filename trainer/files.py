"""Write files so that a reader or a crash sees all of a file or nothing."""

import os
import uuid
from pathlib import Path


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write to a temporary name in the same folder, fsync, and move into place."""
    # Not the process id, because another host on a shared file system may use the same one.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

"""Which file system a folder is on. Imports no torch."""

from pathlib import Path

import psutil


def file_system(path: Path) -> str:
    """The type of the file system that holds the path, as in ext4. Empty if it is not known."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    whole = path.resolve()
    return next((mounts[parent] for parent in (whole, *whole.parents) if parent in mounts), "")

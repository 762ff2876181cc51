"""Protects files that a command would overwrite: only the same study may replace its own output.

Each file that a command writes has a mark of its study or its run in it. A file may be written where
there is none, or one with the mark. A folder may be written to if it is new or empty, or if all that it
has is files with the mark. Hidden files are no matter: a killed command or a desktop leaves some.
"""

import os
from pathlib import Path
from urllib.parse import quote

LOOKED_AT = 1 << 16  # bytes at both ends of a file


class OutputError(ValueError):
    """A file that is something else would be overwritten. The message is one line."""


def mark(study: str) -> str:
    """The text that marks a study's files, in letters that every format can hold."""
    return f"atelier:{quote(study, safe='')};"


def check_output(output: Path) -> None:
    """Check that a file may be written at this place, whatever is there. Raises OutputError."""
    folder = output.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"{output}: no such folder; make it first")
    if output.is_dir():
        raise OutputError(f"{output}: is a folder; give a file")
    if output.is_file() or not output.exists():  # else a pipe or a device, which nothing replaces
        _check_writable(folder)


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: nothing may be written there; choose another folder")


def check_overwritable(output: Path, marker: str, what: str) -> None:
    """Check that a file may be written: where none is yet, or one that has the marker.

    `what` names the kind of file that may be overwritten. Raises OutputError, OSError.
    """
    check_output(output)
    if output.is_file() and not _has(output, marker):  # a pipe or a device may be written to
        raise OutputError(
            f"{output}: there is a file that is not {what}; give another name, or remove it"
        )


def check_folder(folder: Path, marker: str, what: str) -> None:
    """Check that a folder may be written: a new one, or one that has only files with the marker.

    `what` names what they may be of, as in "a report". Raises OutputError, OSError.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise OutputError(f"{there}: is a file; give a folder")
    _check_writable(there)
    if there != folder:
        return
    for path in sorted(folder.iterdir()):
        if not (path.name.startswith(".") or (path.is_file() and _has(path, marker))):
            raise OutputError(f"{folder}: has {path.name}, which is not of {what}; give another folder")


def _has(path: Path, marker: str) -> bool:
    """Whether the marker is at one of the ends of a file."""
    with path.open("rb") as file:
        ends = file.read(LOOKED_AT)
        file.seek(max(path.stat().st_size - LOOKED_AT, 0))
        return marker.encode() in ends + file.read()

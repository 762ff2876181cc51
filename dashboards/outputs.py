"""Protects files that a command would overwrite: only the same study may replace its own output.

Each file that a command writes has a mark of its study in it.
"""

from pathlib import Path
from urllib.parse import quote

LOOKED_AT = 1 << 16  # bytes at both ends of a file


class OutputError(ValueError):
    """A file that is something else would be overwritten. The message is one line."""


def mark(study: str) -> str:
    """The text that marks a study's files, in letters that every format can hold."""
    return f"atelier:{quote(study, safe='')};"


def check_overwritable(output: Path, marker: str, what: str) -> None:
    """Check that there is no file yet, or one that has the marker. Raises OutputError, OSError.

    `what` names the kind of file that may be overwritten.
    """
    if not output.is_file():  # a pipe or a device may be written to
        return
    with output.open("rb") as file:
        ends = file.read(LOOKED_AT)
        file.seek(max(output.stat().st_size - LOOKED_AT, 0))
        ends += file.read()
    if marker.encode() not in ends:
        raise OutputError(
            f"{output}: there is a file that is not {what}; give another name, or remove it"
        )

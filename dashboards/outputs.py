"""Files that a verb writes where its user says: never over what is of another origin.

What a verb writes says of which study it is, so that the same study may write over its own.
"""

from pathlib import Path
from urllib.parse import quote

LOOKED_AT = 1 << 16  # bytes at both ends of a file


class OutputError(ValueError):
    """There is a file of another origin; the message is one line."""


def mark(study: str) -> str:
    """What a file says that was made of a study, in letters that every format can hold."""
    return f"atelier:{quote(study, safe='')};"


def check_overwritable(output: Path, own: str, what: str) -> None:
    """That there is no file yet, or one that says `own`. Raises OutputError, OSError."""
    if not output.is_file():  # nor a pipe's end, which is lost to nobody
        return
    with output.open("rb") as file:
        ends = file.read(LOOKED_AT)
        file.seek(max(output.stat().st_size - LOOKED_AT, 0))
        ends += file.read()
    if own.encode() not in ends:
        raise OutputError(
            f"{output}: there is a file that is not {what}; give another name, or remove it"
        )

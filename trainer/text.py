"""Read text files, whatever encoding and line ends an editor or a system gave them."""

import codecs
import os
import unicodedata
from pathlib import Path

from trainer.kind import POINTER, kind_of

# UTF-32 comes before UTF-16, because its mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class TextError(ValueError):
    """A file cannot be read as text. The message is one line and names file and line."""


def read_text(path: Path) -> str:
    r"""Read a file's text in NFC, with \n at the end of lines.

    The text is UTF-8, unless a byte order mark says otherwise. Raises FileNotFoundError, TextError.
    """
    path = as_on_disk(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except IsADirectoryError:
        raise TextError(f"{path}: is a folder; give a text file") from None
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        why = getattr(error, "strerror", None) or error
        raise TextError(f"{path}: cannot be read ({why}); give a text file") from None
    mark, encoding = next((pair for pair in MARKS if data.startswith(pair[0])), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if kind := kind_of(path):
            raise TextError(f"{path}: is {kind}; give a text file") from None
        position = len(mark) + error.start
        line = data[:position].count(b"\n") + 1
        raise TextError(
            f"{path}:{line}: byte 0x{data[position]:02x} is no {encoding.upper()}; "
            "save the file as UTF-8"
        ) from None
    if "\0" in text:
        raise TextError(f"{path}: has NUL bytes, as UTF-16 without a mark has; save the file as UTF-8")
    if data.startswith(POINTER):
        raise TextError(f"{path}: is {kind_of(path)}")
    # A file that was joined from others has marks in the middle.
    return same_letters(text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n"))


def read_lines(path: Path) -> list[str]:
    """Read a file's lines, stripped, without empty lines at the end.

    Raises FileNotFoundError, TextError.
    """
    lines = [line.strip() for line in read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def same_letters(text: str) -> str:
    """The text in NFC. A Mac stores letters and accents apart, which looks the same."""
    return unicodedata.normalize("NFC", text)


def as_on_disk(path: Path) -> Path:
    """The path in the Unicode form that it has on disk, or unchanged if it does not exist.

    A ~ at the beginning becomes the user's home folder, as in a shell.
    """
    path = Path(os.path.expanduser(path))
    forms = (path, *(Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD")))
    try:
        return next((form for form in forms if form.exists()), path)
    except (OSError, ValueError):  # the name is too long, or has a NUL
        return path

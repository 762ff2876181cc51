"""Writes tables as CSV, with all rows and all columns, and names the files."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TextIO
from urllib.parse import quote

from storage.status import TrialRow, parameter_names

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a formula begins in a spreadsheet
LONGEST_NAME = 60  # characters before the ending of a file name, so at most 240 bytes


def columns(kind: type[Any], *without: str) -> list[str]:
    """The columns of a table whose rows are of this dataclass."""
    return [field.name for field in fields(kind) if field.name not in without]


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """The text of `write_csv`."""
    text = io.StringIO(newline="")
    write_csv(text, columns, rows)
    return text.getvalue()


def write_csv(
    file: TextIO, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], end: str = "\r\n"
) -> None:
    """Write the rows below the names of the columns, one after another. A missing value is empty.

    If a spreadsheet would read a text as a formula, an apostrophe comes before it.
    """
    writer = csv.writer(file, lineterminator=end)
    writer.writerow(map(_no_formula, columns))
    writer.writerows([_no_formula(row.get(name)) for name in columns] for row in rows)


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def file_name(words: str) -> str:
    """A file name that every file system allows, as in fashion-trials.csv."""
    # The beginning is cut: a study's name may be long, and the end says which table it is.
    plain = re.sub(r'[\s\\/:*?"<>|]+', "-", words)[-LONGEST_NAME:].strip("-.")
    return f"{plain or 'table'}.csv"


def attachment(words: str) -> str:
    """The header Content-Disposition of a table with this name, which may have any letters."""
    name = file_name(words)
    ascii_name = name.encode("ascii", "replace").decode().replace("?", "_")
    exact = "" if ascii_name == name else f"; filename*=UTF-8''{quote(name)}"
    return f'attachment; filename="{ascii_name}"{exact}'


def trial_table(rows: list[TrialRow]) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns and the rows of the trials: their fields, then a column for each hyperparameter."""
    names = [*columns(TrialRow, "params"), *parameter_names(rows)]
    return names, [row.params | vars(row) for row in rows]

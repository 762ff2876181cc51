"""Tables as CSV files: all rows and all columns, in UTF-8."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any
from urllib.parse import quote

from storage.status import TrialRow, parameter_names

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how it begins
LONGEST_NAME = 60  # characters of a file's name before its ending: at most 240 bytes


def columns(kind: type[Any], *without: str) -> list[str]:
    """The columns of rows that are of one dataclass."""
    return [field.name for field in fields(kind) if field.name not in without]


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows with these columns, below their names. What a row lacks is empty.

    A text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(map(_no_formula, columns))
    writer.writerows([_no_formula(row.get(name)) for name in columns] for row in rows)
    return text.getvalue()


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def file_name(words: str) -> str:
    """A name for a table that every file system takes, as in fashion-trials.csv."""
    # What is cut is the beginning: a study's name may be long, and the end says which table it is.
    plain = re.sub(r'[\s\\/:*?"<>|]+', "-", words)[-LONGEST_NAME:].strip("-.")
    return f"{plain or 'table'}.csv"


def attachment(words: str) -> str:
    """The header Content-Disposition of a table with this name, whatever its letters."""
    name = file_name(words)
    ascii_name = name.encode("ascii", "replace").decode().replace("?", "_")
    exact = "" if ascii_name == name else f"; filename*=UTF-8''{quote(name)}"
    return f'attachment; filename="{ascii_name}"{exact}'


def trial_table(rows: list[TrialRow]) -> tuple[list[str], list[dict[str, Any]]]:
    """All that is known of trials: names of columns, one for each hyperparameter too, and rows."""
    names = [*columns(TrialRow, "params"), *parameter_names(rows)]
    return names, [row.params | vars(row) for row in rows]

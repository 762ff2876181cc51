"""Writes a frame as CSV, JSON or Parquet, into a file or to standard output."""

import json
import math
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from dashboards.csv_tables import write_csv
from dashboards.outputs import OutputError, check_overwritable, mark

FORMATS = CSV, JSON, PARQUET = "csv", "json", "parquet"
ROWS = 1_000  # that are Python's objects at once
IN_JSON = ("images_per_second", "stream_epoch")  # columns that no other file is likely to have


def check_format(kind: str, output: Path | None) -> None:
    """Check what can be checked before a table is read. Raises OutputError."""
    if kind not in FORMATS:
        raise OutputError(f"--format {kind!r}: allowed are {', '.join(FORMATS)}")
    if kind == PARQUET and output is None:
        raise OutputError("--format parquet writes a file; name it with -o FILE")
    if kind == PARQUET and find_spec("pyarrow") is None:
        raise OutputError(
            "no package pyarrow is installed, and Parquet needs it; get it with: pip install pyarrow, "
            "or take --format csv"
        )


def write_frame(frame: pd.DataFrame, kind: str, output: Path | None, what: str) -> None:
    """Write a frame's rows, to standard output unless a file is given.

    `what` is what a file may hold that is written over. Raises OutputError, OSError.
    """
    if output is None:
        _write_text(frame, kind, sys.stdout)
        return
    names = [*frame]
    marks = {
        CSV: ",".join(names[:3]),
        JSON: next((f'"{name}": ' for name in IN_JSON if name in names), ""),
        PARQUET: mark(what),
    }
    check_overwritable(output, marks[kind], what)
    if kind == PARQUET:
        frame.attrs["written by"] = mark(what)
        frame.to_parquet(output, index=False)
    else:
        with output.open("w", encoding="utf-8", newline="") as file:
            _write_text(frame, kind, file)


def _write_text(frame: pd.DataFrame, kind: str, file: TextIO) -> None:
    if kind == CSV:
        write_csv(file, [*frame], _records(frame), end="\n")
        return
    start = "[\n"
    for record in _records(frame):
        values = {name: _in_json(value) for name, value in record.items()}
        file.write(start + json.dumps(values, ensure_ascii=False))
        start = ",\n"
    file.write("\n]\n" if len(frame) else "[]\n")


def _records(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """The rows, with Python's own values; None where there is none."""
    for start in range(0, len(frame), ROWS):
        part = frame.iloc[start : start + ROWS]
        rows: list[Any] = part.astype(object).where(part.notna(), None).to_dict("records")
        yield from rows


def _in_json(value: Any) -> Any:
    """JSON has neither times nor infinity."""
    if isinstance(value, pd.Timestamp):
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The trials, epochs, attempts and predictions of a study as pandas frames: see docs/notebook.md."""

from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any, get_args

import numpy as np
import pandas as pd
import sqlalchemy as sa
from pandas.api.types import union_categoricals

from dashboards.csv_tables import columns
from dashboards.predictions import Judgement, attribute_names
from dashboards.thumbnails import PicturesError, file_names
from storage.curves import name_categories, select_epochs
from storage.database import one_moment, retrying
from storage.outcome import Outcome
from storage.status import STATES, TrialRow, parameter_names, read_status
from storage.studies import StudyEntry
from storage.workers import AttemptRow, read_attempts

TIME: Any = "datetime64[ns, UTC]"
DTYPES: dict[Any, Any] = {int: "Int64", float: "float64", str: "str", datetime: TIME, bool: "bool"}
ROWS = 10_000  # that are Python's objects at once


@retrying
def trials(engine: sa.Engine, entry: StudyEntry) -> pd.DataFrame:
    """A row for each trial: what `atelier trials` lists, and when its attempts began and ended."""
    with one_moment(engine) as connection:
        rows = read_status(connection, entry.study_id, entry.name).trials
        attempts = _of_rows(AttemptRow, read_attempts(connection, entry.study_id))
    frame = _of_rows(TrialRow, rows, "params").astype({"state": pd.CategoricalDtype([*STATES])})
    first, last = (attempts.drop_duplicates("trial", keep=keep) for keep in ("first", "last"))
    for name, ends in (("claimed", first), ("released", last)):
        frame[name] = ends.set_index("trial")[name].reindex(frame["number"]).array
    for name in parameter_names(rows):
        frame[name] = _parameter([row.params.get(name) for row in rows])
    return frame


def attempts(engine: sa.Engine, entry: StudyEntry) -> pd.DataFrame:
    """A row for each attempt at a trial, by the time of its claim."""
    frame = _of_rows(AttemptRow, read_attempts(engine, entry.study_id))
    return frame.astype({"outcome": pd.CategoricalDtype([*Outcome]), "gpu": "category"})


@retrying
def epochs(engine: sa.Engine, entry: StudyEntry) -> pd.DataFrame:
    """A row for each epoch on record of each trial. Epochs are counted from 1, as on the pages."""
    query = select_epochs(entry.study_id)
    with one_moment(engine) as connection:
        # All rows as Python's objects would take five times the memory.
        found = connection.execution_options(stream_results=True).execute(query)
        parts = [_epochs(query, rows) for rows in found.partitions(ROWS)] or [_epochs(query, [])]
    frame = pd.concat(parts, ignore_index=True)
    width = sum(isinstance(name, int) for name in frame)
    names = [f"{name} accuracy" for name in name_categories(entry.attributes, width)]
    return frame.rename(columns=dict(enumerate(names)))


def _epochs(query: sa.Select[Any], rows: Sequence[Any]) -> pd.DataFrame:
    """Some rows of the query; the accuracies of the categories are in columns 0, 1, ..."""
    types = {column.name: column.type.python_type for column in query.selected_columns}
    frame = pd.DataFrame.from_records(rows, columns=[*types])
    place = frame.columns.get_loc("val_category")
    categories = pd.DataFrame(frame.pop("val_category").tolist(), dtype=float)
    frame = frame.astype({name: DTYPES[types[name]] for name in frame})
    frame["epoch"] += 1
    return pd.concat([frame.iloc[:, :place], categories, frame.iloc[:, place:]], axis=1)


def predictions(entry: StudyEntry, trials: Sequence[int]) -> pd.DataFrame:
    """A row for each image and category of one or more complete trials, after their last epoch.

    Raises PredictionsError.
    """
    names = attribute_names(entry)
    every = [*dict.fromkeys(name for some in names.values() for name in some)]
    attribute = pd.CategoricalDtype(every)
    # Of each category's attributes among all; the last is for an unknown label, which is -1.
    codes = [np.array([*map(every.index, some), -1]) for some in names.values()]
    parts, files = [], []
    for number in trials:
        judged = Judgement.of_trial(entry, number)
        images, categories = judged.labels.shape
        true, predicted = (
            np.stack([code[column] for code, column in zip(codes, of.T, strict=True)], 1)
            for of in (judged.labels, judged.classes)
        )
        part = {
            "image": np.repeat(judged.images, categories),
            "trial": np.full(images * categories, number),
            "category": pd.Categorical.from_codes(
                np.tile(np.arange(categories), images), pd.Index([*names])
            ),
            "true": pd.Categorical.from_codes(true.ravel(), dtype=attribute),
            "predicted": pd.Categorical.from_codes(predicted.ravel(), dtype=attribute),
            "probability_of_true": np.where(judged.labels < 0, np.nan, judged.probabilities).ravel(),
        }
        parts.append(pd.DataFrame(part).astype({"image": "Int64", "trial": "Int64"}))
        files.append(pd.Categorical(np.repeat(np.array(_files(entry, judged), object), categories)))
    frame = pd.concat(parts, ignore_index=True)
    frame.insert(
        1, "file", pd.Series(union_categoricals(files))
    )  # trials of other folds have other files
    return frame


def _files(entry: StudyEntry, judged: Judgement) -> list[str] | list[None]:
    """The images' files from the data folder on; unknown if this machine does not see them."""
    try:
        return file_names(entry.places.get("data", ""), judged)
    except PicturesError:
        return [None] * len(judged)


def _of_rows(kind: type[Any], rows: Sequence[Any], *without: str) -> pd.DataFrame:
    """A frame of rows of a dataclass, with a column for each of its fields."""
    names = columns(kind, *without)
    frame = pd.DataFrame.from_records([vars(row) for row in rows], columns=names)
    types = {field.name: (get_args(field.type) or (field.type,))[0] for field in fields(kind)}
    return frame.astype({name: DTYPES[types[name]] for name in names})


def _parameter(values: Sequence[Any]) -> pd.Series:
    """The values of a hyperparameter. What is no number is a category."""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds <= {int}:
        return pd.Series(values, dtype="Int64")
    return pd.Series(values, dtype="float64" if kinds <= {int, float} else "category")

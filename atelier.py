"""Studies in Python, read only: `atelier.open("fashion").trials` is a pandas frame (docs/notebook.md).

The database is found as the command finds it: by ATELIER_DATABASE_URL, else in ATELIER_HOME. Nothing
here needs PyTorch, and no session here can write. What is needed is imported on use, so that to import
this module takes no time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["AtelierError", "Study", "open", "studies"]

Trials = int | str | Iterable[int]  # 3, "3,5-9" as for the command, or [3, 5]


class AtelierError(Exception):
    """What was found, what is allowed, what to do next: the line that the command would print."""


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Raises AtelierError for any error that the command would end with in one line."""
    _check_packages()
    try:
        yield
    except Exception as error:
        from search.error_lines import one_line

        line = one_line(error)
        if line is None:
            raise
        raise AtelierError(line) from None


@cache
def _check_packages() -> None:
    """Raises AtelierError if a file of the user's is imported instead of one of our packages."""
    for name in ("search", "storage", "trainer", "dashboards"):
        spec = find_spec(name)
        place = Path(spec.origin if spec and spec.origin else "").resolve()
        if place.parent.parent != Path(__file__).resolve().parent:
            found = spec.origin if spec else "nothing"
            raise AtelierError(
                f"{found} was found instead of Atelier's package {name!r}; rename it, or start Python "
                "in another folder"
            )


def studies() -> list[str]:
    """The names of the studies on record, oldest first. Raises AtelierError."""
    with _in_one_line():
        from search.cli.finding import find_database
        from storage.database import READING
        from storage.studies import study_names

        engine = find_database(READING)
        try:
            return study_names(engine)
        finally:
            engine.dispose()


def open(study: str) -> Study:
    """A study on record, by its name or its study file. Raises AtelierError."""
    return Study(study)


class Study:
    """What is on record of a study. Each use reads it anew, as of one moment, also while workers run.

    Columns and units are in docs/notebook.md. `trials` are a number, a text as in "3,5-9", or several
    numbers. Whatever cannot be had raises AtelierError.
    """

    def __init__(self, study: str) -> None:
        with _in_one_line():
            from search.cli.finding import find_study
            from storage.database import READING

            self._engine, self._entry = find_study(study, READING)

    @property
    def name(self) -> str:
        return self._entry.name

    def __repr__(self) -> str:
        return f"atelier.open({self.name!r})"

    @property
    def trials(self) -> pd.DataFrame:
        """A row for each trial, with a column for each hyperparameter."""
        return self._frame("trials")

    @property
    def epochs(self) -> pd.DataFrame:
        """A row for each epoch of each trial."""
        return self._frame("epochs")

    @property
    def attempts(self) -> pd.DataFrame:
        """A row for each attempt of a worker at a trial."""
        return self._frame("attempts")

    def predictions(self, trials: Trials | None = None) -> pd.DataFrame:
        """A row for each validation image and category, of all complete trials unless some are named.

        They are in the ATELIER_HOME that the workers used.
        """
        with _in_one_line():
            from dashboards.frames import predictions
            from dashboards.plot import complete_trials
            from storage.status import read_status

            status = read_status(self._engine, self._entry.study_id, self.name)
            return predictions(self._entry, sorted(complete_trials(status, _text(trials))))

    def curves(
        self, trials: Trials | None = None, top: int | None = None, smooth: float = 0.0
    ) -> go.Figure:
        """Loss, accuracy and learning rate by epoch; of the best eight trials, unless some are named.

        `smooth` in [0, 1) is the weight of the epochs before.
        """
        return self._figure("curves", trials, top, smooth=smooth)

    def compare(
        self, by: str | None = None, trials: Trials | None = None, top: int | None = None
    ) -> go.Figure:
        """Accuracy by epoch, in one panel for each value or range of a hyperparameter."""
        return self._figure("compare", trials, top, by=by)

    def history(self) -> go.Figure:
        """Scores and the best score so far, over time and over GPU-hours."""
        return self._figure("history")

    def confusion(self, trial: int | None = None) -> go.Figure:
        """The confusion matrix of each category; of the best trial, unless one is named."""
        return self._figure("confusion", trial)

    def errors(self, trial: int | None = None) -> go.Figure:
        """The images that a trial was most surely wrong on; the best trial, unless one is named."""
        return self._figure("errors", trial)

    def _frame(self, table: str) -> pd.DataFrame:
        with _in_one_line():
            from dashboards import frames

            frame: pd.DataFrame = getattr(frames, table)(self._engine, self._entry)
            return frame

    def _figure(
        self, kind: str, trials: Trials | None = None, top: int | None = None, **options: Any
    ) -> go.Figure:
        with _in_one_line():
            from dashboards.plot import figure_of
            from dashboards.plotly_figure import plotly_figure

            return plotly_figure(
                *figure_of(self._engine, self._entry, kind, _text(trials), top, **options)
            )


def _text(trials: Trials | None) -> str | None:
    """Trials as the command takes them."""
    if trials is None or isinstance(trials, str):
        return trials
    return ",".join(map(str, trials if isinstance(trials, Iterable) else [trials]))

"""The filters of a page: reads them from the address, and answers with a page or a CSV file."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from flask import Response, abort, render_template, request

from dashboards import csv_tables
from dashboards.arguments import ArgumentError, in_words, pick, read_choice, read_count, read_trials
from storage import curves
from storage.status import STATES, Status, TrialRow

T = TypeVar("T")


class Filters:
    """The values of a page's filters, and a line in `problems` for each that cannot be read."""

    def __init__(self, *names: str) -> None:
        self.problems: list[str] = []
        for name in (name for name in request.args if name not in names):
            allowed = f"allowed are {', '.join(names)}" if names else "this page has none"
            self.problems.append(f"{name!r}: no such filter; {allowed}")

    def one(self, name: str, read: Callable[[str], T], default: T) -> T:
        """The value of a filter. The default if it is absent, or blank as a form sends it."""
        values = self.all(name, read)
        if len(values) > 1:
            self.problems.append(f"{name}: given {len(values)} times; give it once")
        return values[0] if values else default

    def all(self, name: str, read: Callable[[str], T]) -> list[T]:
        """The values of a filter that may be repeated."""
        values = []
        for text in filter(None, map(str.strip, request.args.getlist(name))):
            try:
                values.append(read(text))
            except ArgumentError as error:
                self.problems.append(f"{name}: {error}")
        return values

    def count(self, name: str, default: int, most: int, least: int = 1) -> int:
        """A whole number."""
        return self.one(name, partial(read_count, least=least, most=most), default)

    def states(self) -> set[str]:
        """The states of the trials to show; empty for all."""
        return set(self.all("state", partial(read_choice, allowed=STATES)))

    def page(self, template: str, **values: Any) -> tuple[str, int]:
        """The page and its status. If there are problems, they are shown instead of figures and rows."""
        status = 400 if self.problems else 200
        return render_template(template, problems=self.problems, status_code=status, **values), status

    def table(self, name: str, columns: list[str], rows: list[dict[str, Any]]) -> Response:
        """The rows as a CSV file to download. Any problem is an error 400."""
        if self.problems:
            abort(400, "; ".join(self.problems))
        response = Response(csv_tables.csv_text(columns, rows), mimetype="text/csv")
        response.headers["Content-Disposition"] = csv_tables.attachment(name)
        return response


def in_states(rows: list[TrialRow], states: set[str]) -> list[TrialRow]:
    """The trials in one of these states; all, if no state is given."""
    return [row for row in rows if not states or row.state in states]


@dataclass
class Choice:
    """The trials that a page draws."""

    trials: list[TrialRow]
    named: str  # as the address names them
    states: set[str]
    left_out: list[str]  # why some of the named trials are not drawn, a line for each reason

    @property
    def numbers(self) -> str:
        """The trials as an address names them."""
        return ",".join(str(row.number) for row in self.trials)


def choose_trials(filters: Filters, status: Status, default: int, most: int) -> Choice:
    """The trials that the address names. If it names none, the best of the states that it names."""
    named: list[range] = filters.one("trials", read_trials, [])
    count = filters.count("top", default, most)
    states, text = filters.states(), request.args.get("trials", "")
    drawable = in_states([row for row in status.trials if row.epochs], states)
    if not named:
        return Choice(curves.top(drawable, count), text, states, [])
    left_out = []
    chosen, absent = pick(drawable, named)
    if absent:
        where = " in these states" if states else ""
        left_out.append(f"No epoch on record{where} of {in_words(absent)}.")
    if len(chosen) > most:
        left_out.append(f"The first {most} of these {len(chosen)} trials are drawn.")
    return Choice(chosen[:most], text, states, left_out)

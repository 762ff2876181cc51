"""How text and tables are printed: to a terminal within its width, to all else plainly.

What is not a terminal, a pipe or a file, gets every row in one line, as wide as it is, and no colours;
no width in the environment counts there. A terminal that is too narrow gets its table in parts, one
below the other. Nothing is left out.

rich is imported late: whoever prints a word comes by here.
"""

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


ENDLESS = 1 << 20  # columns of a pipe
NARROWEST = 20  # columns that COLUMNS may say
LONGEST_WORD = 24  # what is longer (a path, a host) may go on in the next line
TERMINAL = ("TERM", "COLORTERM", "NO_COLOR")  # all that rich is told of the environment


def printable(text: str) -> str:
    """The text in one line, with escapes for what a terminal would act on: it may quote any file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def console() -> "Console":
    """Where tables go: stdout."""
    from rich.console import Console, ConsoleDimensions

    told = {name: os.environ[name] for name in TERMINAL if name in os.environ}
    found = Console(_environ=told)
    if not found.is_terminal:
        return Console(_environ={}, width=ENDLESS, color_system=None)
    columns = os.environ.get("COLUMNS", "")
    if re.fullmatch("[0-9]{1,6}", columns) and int(columns) >= NARROWEST:
        found.width = int(columns)
    if found.is_dumb_terminal:  # rich takes those for 80 columns wide
        width, height = os.get_terminal_size(found.file.fileno())
        found.size = ConsoleDimensions(width or 80, height or 25)
    return found


def is_drawn_on(console: "Console") -> bool:
    """Whether what was printed there can be drawn anew, as a live view is."""
    return console.is_terminal and not console.is_dumb_terminal


class Grid:
    """A table that loses nothing, for a console of any width; rich renders it.

    The headings of `left` are above text, all others above numbers. Words of up to
    LONGEST_WORD letters stay whole.
    """

    def __init__(self, headings: Sequence[str], left: Sequence[str] = (), gap: int = 1) -> None:
        self._headings, self._gap = headings, gap
        self._justify = ["left" if heading in left else "right" for heading in headings]
        self._rows: list[tuple[Sequence[str], str | None]] = []

    def add(self, *cells: str, style: str | None = None) -> None:
        """Append a row, with a cell for every heading."""
        self._rows.append(([printable(cell) for cell in cells], style))

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.cells import cell_len
        from rich.table import Table

        columns = [
            [heading, *(cells[index] for cells, _ in self._rows)]
            for index, heading in enumerate(self._headings)
        ]
        natural = [max(map(cell_len, cells)) for cells in columns]
        words = [
            max(cell_len(word) for cell in cells for word in [*cell.split(), ""]) for cells in columns
        ]
        most = min(LONGEST_WORD, (options.max_width - self._gap) // 2)  # two have room beside each other
        least = [min(word, most) for word in words]
        for part in self._parts(least, options.max_width):
            spare = options.max_width - self._width(part, least)
            table = Table(box=None, padding=(0, self._gap, 0, 0), pad_edge=False, header_style="bold")
            for index in part:
                more = min(natural[index] - least[index], spare)
                spare -= more
                table.add_column(
                    self._headings[index],
                    justify=self._justify[index],  # type: ignore[arg-type]
                    overflow="fold",
                    width=least[index] + more,
                )
            for cells, style in self._rows:
                table.add_row(*(cells[index] for index in part), style=style)
            yield table

    def _width(self, part: Sequence[int], widths: Sequence[int]) -> int:
        return sum(widths[index] for index in part) + self._gap * (len(part) - 1)

    def _parts(self, least: Sequence[int], width: int) -> list[list[int]]:
        """The columns of each part. All begin with the first, by which a row is known."""
        parts = [[0]]
        for index in range(1, len(least)):
            if len(parts[-1]) > 1 and self._width([*parts[-1], index], least) > width:
                parts.append([0])
            parts[-1].append(index)
        return parts

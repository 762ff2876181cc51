"""Prints text and tables: within the width of a terminal, and plainly into a pipe or a file.

- In a pipe or a file each row is one line, without colours. No width in the environment counts there.
- On a narrow terminal a table is cut into parts, one below the other. Nothing is left out.

rich is imported late, because every command imports this module for `printable`.
"""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


ENDLESS = 1 << 20  # columns of a pipe or a file
NARROWEST = 20  # a smaller number in COLUMNS is ignored
LONGEST_WORD = 24  # longer words (a path, a host) may be broken
TERMINAL = ("TERM", "COLORTERM", "NO_COLOR")  # the only variables of the environment that rich sees


def printable(text: str) -> str:
    """The text in one line. Control characters are escaped, since the text may quote any file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def say(text: str) -> None:
    """Print a line to stderr."""
    with suppress(OSError):  # if stderr cannot be written, there is no other way to tell
        print(text, file=sys.stderr, flush=True)


def console() -> "Console":
    """The console for tables, which writes to stdout."""
    from rich.console import Console, ConsoleDimensions  # late: `printable` needs no rich

    console = Console(_environ={name: os.environ[name] for name in TERMINAL if name in os.environ})
    if not console.is_terminal:
        return Console(_environ={}, width=ENDLESS, color_system=None)
    columns = os.environ.get("COLUMNS", "")
    if re.fullmatch("[0-9]{1,6}", columns) and int(columns) >= NARROWEST:
        console.width = int(columns)
    if console.is_dumb_terminal:  # rich assumes 80 columns
        width, height = os.get_terminal_size(console.file.fileno())
        console.size = ConsoleDimensions(width or 80, height or 25)
    return console


def can_redraw(console: "Console") -> bool:
    """Whether a live view can redraw what it has printed."""
    return console.is_terminal and not console.is_dumb_terminal


class Grid:
    """A table for a console of any width, which rich renders without leaving anything out.

    The columns of `left` have text, all others numbers. Words of up to LONGEST_WORD letters stay whole.
    """

    def __init__(self, headings: Sequence[str], left: Sequence[str] = (), gap: int = 1) -> None:
        self._headings, self._gap = headings, gap
        self._justify = ["left" if heading in left else "right" for heading in headings]
        self._rows: list[tuple[Sequence[str], str | None]] = []

    def add(self, *cells: str, style: str | None = None) -> None:
        """Append a row, which has a cell for every heading."""
        self._rows.append(([printable(cell) for cell in cells], style))

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich import cells, table, text  # late, as in console()

        columns = [
            [heading, *(row[index] for row, _ in self._rows)]
            for index, heading in enumerate(self._headings)
        ]
        natural = [max(map(cells.cell_len, column)) for column in columns]
        words = [
            max(cells.cell_len(word) for cell in column for word in [*cell.split(), ""])
            for column in columns
        ]
        most = min(LONGEST_WORD, (options.max_width - self._gap) // 2)  # two columns fit side by side
        least = [min(word, most) for word in words]
        for part in self._parts(least, options.max_width):
            spare = options.max_width - self._width(part, least)
            grid = table.Table(
                box=None, padding=(0, self._gap, 0, 0), pad_edge=False, header_style="bold"
            )
            for index in part:
                more = min(natural[index] - least[index], spare)
                spare -= more
                grid.add_column(
                    self._headings[index],
                    justify=self._justify[index],  # type: ignore[arg-type]
                    overflow="fold",
                    width=least[index] + more,
                )
            for row, style in self._rows:
                # As plain text: in a cell, [slurm.tuning] is no markup.
                grid.add_row(*(text.Text(row[index]) for index in part), style=style)
            yield grid

    def _width(self, part: Sequence[int], widths: Sequence[int]) -> int:
        return sum(widths[index] for index in part) + self._gap * (len(part) - 1)

    def _parts(self, least: Sequence[int], width: int) -> list[list[int]]:
        """The columns of each part. Each part begins with the first column, which identifies the row."""
        parts = [[0]]
        for index in range(1, len(least)):
            if len(parts[-1]) > 1 and self._width([*parts[-1], index], least) > width:
                parts.append([0])
            parts[-1].append(index)
        return parts

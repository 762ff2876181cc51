"""Tables lose nothing, whatever the width; and one that fits is as wide as it is."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from dashboards.terminal import Grid

PATH = "/home/somebody/a project/.atelier/runs/demo-20261125-101010/logs/worker-1.log"
TABLES = {
    "short": (("trial", "state"), [("1", "complete"), ("2", "pruned")]),
    "a path at the end": (
        ("trial", "attempt", "worker", "ended", "log"),
        [("1", "2", "n:77", "no", PATH)],
    ),
    "a path in front": (("log", "trial"), [(PATH, "17")]),
    "two long ones": (("worker", "log"), [("node-0123.cluster.example.org:123456", PATH)]),
    "many columns": ([f"number {i}" for i in range(30)], [[f"{i}.123456" for i in range(30)]]),
    "wide letters": (("name", "score"), [("日本語の名前" * 6, "0.5")]),
    "a line break and a colour": (("log", "end"), [("a\nb\x1b[31m", "x")]),
    "no rows": (("trial", "state"), []),
    "one column": (("name",), [("x" * 200,)]),
}


def drawn(headings, rows, width):
    grid = Grid(headings, left=("log", "name", "worker"))
    for row in rows:
        grid.add(*row, style="dim")
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(grid)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [20, 40, 79, 80, 200])
@pytest.mark.parametrize("name", TABLES)
def test_every_letter_is_there_at_any_width(name, width):
    headings, rows = TABLES[name]
    lines = drawn(headings, rows, width)
    assert all(cell_len(line) <= width for line in lines)
    shown, text = "".join(lines), "".join([*headings, *(cell for row in rows for cell in row)])
    for letter in {*text} - {*" \n\x1b"}:
        assert shown.count(letter) >= text.count(letter), letter


@pytest.mark.parametrize("name", TABLES)
def test_with_room_enough_a_row_is_a_line(name):
    headings, rows = TABLES[name]
    lines = drawn(headings, rows, 10_000)
    assert len(lines) == 1 + len(rows)
    assert not any("\x1b" in line for line in lines)


def test_words_and_numbers_stay_whole_and_each_part_begins_with_the_row_it_tells_of():
    headings, rows = TABLES["many columns"]
    lines = drawn(headings, [row[:] for row in rows] * 2, 40)
    words = " ".join(lines).split()
    assert words.count("7.123456") == 2
    assert words.count("0.123456") > 2 * 3
    assert {line.split()[0] for line in lines if ".123456" in line} == {"0.123456"}

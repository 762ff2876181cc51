"""Tables as CSV files."""

import csv
import io

import pytest

from dashboards.csv_tables import csv_text, file_name


def test_every_value_comes_back():
    rows = [
        {"name": 'a "b", c', "reason": "first\nsecond", "value": 0.1},
        {"name": "ß – 漢", "other": 1},
    ]
    text = csv_text(["name", "reason", "value"], rows)
    assert list(csv.DictReader(io.StringIO(text, newline=""))) == [
        {"name": 'a "b", c', "reason": "first\nsecond", "value": "0.1"},
        {"name": "ß – 漢", "reason": "", "value": ""},
    ]


def test_no_text_is_a_formula_for_a_spreadsheet():
    names = ["=1+1", "plain"]
    rows = [{"=1+1": text, "plain": -0.5} for text in ("=A1", "+1", "-1", "@SUM(1)", "\tx", "a=b", "")]
    head, *cells = csv.reader(io.StringIO(csv_text(names, rows), newline=""))
    assert head == ["'=1+1", "plain"]
    assert [cell for cell, _ in cells] == ["'=A1", "'+1", "'-1", "'@SUM(1)", "'\tx", "a=b", ""]
    assert {number for _, number in cells} == {"-0.5"}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("fashion trials", "fashion-trials.csv"),
        ("größe 漢 trials", "größe-漢-trials.csv"),
        ("../../etc/passwd trials", "etc-passwd-trials.csv"),
        ('a "b" <c> : d?* trials', "a-b-c-d-trials.csv"),
        ("x" * 300 + " trials", "x" * 53 + "-trials.csv"),
        ("", "table.csv"),
        ("...", "table.csv"),
    ],
)
def test_a_name_that_every_system_takes(words, name):
    assert file_name(words) == name

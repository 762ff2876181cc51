"""What is asked for, as an address and the command line write it."""

import pytest

from dashboards.arguments import ArgumentError, in_words, pick, read_choice, read_count, read_trials
from storage.status import TrialRow


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("3", [3]),
        ("3,14", [3, 14]),
        ("3, 14 15", [3, 14, 15]),
        ("3,5-9", [3, 5, 6, 7, 8, 9]),
        ("1-5", [1, 2, 3, 4, 5]),
        (" 5 - 7 ,", [5, 6, 7]),
        ("7,1-3,2-4,5", [1, 2, 3, 4, 5, 7]),
        ("0-0", [0]),
        ("007", [7]),
    ],
)
def test_numbers_and_ranges(text, numbers):
    assert [number for one in read_trials(text) for number in one] == numbers


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            ",",
            "-",
            "3-",
            "-3",
            "1-2-3",
            "1--2",
            "x",
            "3,x",
            "3;4",
            "3..5",
            "1–5",
            "all",
            "1e3",
        ),
        *("3.0", "+3", "٣", "³", "9" * 10, "9" * 5000, "0x3", "5-x", "3\x00"),
    ],
)
def test_what_is_neither_is_said_in_one_line(text):
    with pytest.raises(ArgumentError, match="write numbers and ranges of trials, as in 3,5-9") as error:
        read_trials(text)
    assert len(str(error.value)) < 150
    assert str(error.value).isprintable()


def test_a_range_that_runs_backwards():
    with pytest.raises(ArgumentError, match=r"'9-5': the smaller number comes first"):
        read_trials("1,9-5")


@pytest.mark.parametrize("text", ["0", "41", "-1", "8.0", "x", "٨", "9" * 5000, "1e1", " 8"])
def test_a_count_outside_its_limits(text):
    with pytest.raises(ArgumentError, match="write a whole number from 1 to 40"):
        read_count(text, 1, 40)
    assert read_count("40", 1, 40) == 40


def test_a_word_that_is_not_allowed():
    with pytest.raises(ArgumentError, match="'c': allowed are a, b"):
        read_choice("c", ["a", "b"])


def test_what_is_absent_is_named():
    rows = [TrialRow(number, "complete") for number in (0, 1, 4, 5, 9)]
    chosen, absent = pick(rows, read_trials("0-5,8,100-999999999"))
    assert [row.number for row in chosen] == [0, 1, 4, 5]
    assert in_words(absent) == "trials 2-3, 8, 100-999999999"
    assert in_words(pick(rows, read_trials("7"))[1]) == "trial 7"
    assert pick(rows, read_trials("4-5")) == (rows[2:4], [])


def test_many_that_are_absent_are_counted():
    _, absent = pick([], read_trials(" ".join(map(str, range(0, 60, 2)))))
    assert in_words(absent).endswith("16, 18 and 20 more")

"""Counts in texts for people."""

import ast
import re

import pytest

from storage.words import counted
from tests.unit.test_repository import ROOT, sources

# A text like f"{n} trials" says "1 trials" some day.
THINGS = (
    "attempt attribute candidate epoch file finding folder image rerun run seed study task trial worker"
)
PLURALS = "|".join(
    thing.removesuffix("y") + ("ies" if thing[-1] == "y" else "s") for thing in THINGS.split()
)


@pytest.mark.parametrize(
    ("number", "thing", "words"),
    [
        (0, "trial", "0 trials"),
        (1, "trial", "1 trial"),
        (2, "study", "2 studies"),
        (1, "study", "1 study"),
        (3, "day", "3 days"),
    ],
)
def test_a_count_agrees_with_its_noun(number, thing, words):
    assert counted(number, thing) == words


def bare_counts(tree):
    """Numbers in f-strings that are followed by a noun in the plural, with what stands before them."""
    for text in ast.walk(tree):
        parts = text.values if isinstance(text, ast.JoinedStr) else []
        for before, number, after in zip([ast.Constant(""), *parts], parts, parts[1:], strict=False):
            is_count = isinstance(number, ast.FormattedValue) and isinstance(after, ast.Constant)
            if is_count and re.match(rf" ({PLURALS})\b", after.value):
                yield getattr(before, "value", ""), ast.unparse(number.value)


SEVERAL = {
    ("search/cli/options.py", "workers"),
    ("search/cli/searching.py", "config.seeds * config.folds"),
    ("search/confirm/table.py", "len(confirmation.candidates)"),
    ("search/verify/ends.py", "epochs"),
    ("dashboards/web/filters.py", "len(chosen)"),
}
NO_COUNT = {
    ("search/cli/training.py", "outputs"),
    ("search/doctor/files.py", "images"),
    ("storage/embedded.py", "self.home"),
    ("dashboards/web/images.py", "reading.choice.trial"),
    ("dashboards/web/pages.py", "status.study"),
    ("dashboards/web/pages.py", "trial"),
}


def test_no_text_counts_without_that():
    counts = {
        (str(path.relative_to(ROOT)), number)
        for path, tree in sources("search", "storage", "dashboards")
        for before, number in bare_counts(tree)
        if not before.endswith((" of ", "/"))  # "1 of 1 trials" is a share
    }
    assert counts == SEVERAL | NO_COUNT

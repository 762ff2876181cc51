"""What a confirmation says in words."""

import pytest

from search.confirm.evidence import Candidate, Confirmation
from search.confirm.table import verdict


@pytest.mark.parametrize(
    ("optimism", "words"),
    [(0.0049, "too high by 0.49 points"), (-0.002, "too low by 0.20 points"), (0.0, "too high by 0.00")],
)
def test_a_figure_is_too_high_or_too_low_by_a_positive_number(optimism, words):
    alone = Candidate(3, {}, 0.6, seeds=5, failed=0, passed_over=False, estimate=None)
    known = Confirmation("s", "s-confirm", 0, 5, 5, None, [alone], optimism, [], 0, None, "")
    assert words in verdict(known)[-1]

"""What a confirmation says in words."""

import pytest

from search.confirm.evidence import Candidate, Confirmation
from search.confirm.intervals import Estimate, Interval
from search.confirm.table import no_winner, verdict


@pytest.mark.parametrize(
    ("optimism", "words"),
    [(0.0049, "too high by 0.49 points"), (-0.002, "too low by 0.20 points"), (0.0, "too high by 0.00")],
)
def test_a_figure_is_too_high_or_too_low_by_a_positive_number(optimism, words):
    alone = Candidate(3, {}, 0.6, seeds=5, failed=0, passed_over=False, estimate=None)
    known = Confirmation("s", "s-confirm", 0, 5, 5, None, 99, [alone], optimism, [], 0, None, "")
    assert words in verdict(known)[-1]


def leading(seeds, folds, images=10):
    """A confirmation that has ended, whose first candidate is surely the best."""
    known = Estimate(Interval(0.6, 0, 0.6, 0.6), Interval(0, 0, 0, 0), 1.0, 0.0)
    done = seeds * (folds or 1)
    two = [Candidate(n, {}, 0.6, done, failed=0, passed_over=False, estimate=known) for n in (3, 4)]
    ended = (2 * done, 2 * done, seeds, folds, images)
    return Confirmation("s", "s-confirm", *ended, two, None, [], 0, None, "")


@pytest.mark.parametrize(
    ("seeds", "folds", "wins_with"),
    [(4, None, 5), (5, None, None), (1, 2, 3), (2, 2, 3), (3, 2, None), (1, 4, 2), (1, 5, None)],
)
def test_too_few_reruns_for_a_winner_are_said_with_the_number_that_is_enough(seeds, folds, wins_with):
    known = leading(seeds, folds)
    if wins_with is None:
        assert known.winner
        assert len(verdict(known)) == 1
        return
    assert known.winner is None
    line = verdict(known)[-1]
    assert line == no_winner(seeds, folds, 10)
    assert f"with {seeds * (folds or 1)} reruns" in line
    assert line.endswith(f"--seeds {wins_with}")
    assert leading(wins_with, folds).winner
    assert not leading(wins_with - 1, folds).winner


@pytest.mark.parametrize(
    ("folds", "advice"), [(None, "and --folds judges by those of train too"), (6, "10 or more")]
)
def test_too_few_images_of_an_attribute_for_a_winner_are_said(folds, advice):
    assert leading(5, folds).winner
    known = leading(5, folds, images=9)
    assert known.winner is None
    assert known.choice
    line = verdict(known)[-1]
    assert line.startswith("with 9 images of an attribute none can be declared the best; ")
    assert line.endswith(advice)

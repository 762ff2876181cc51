"""What is said of scores, against references that are computed in another way."""

import numpy as np
import pytest
from sklearn.metrics import recall_score

from search import bootstrap
from search.bootstrap import churn, compare, flattery, hits, of_hits, of_mean, per_class_accuracy
from trainer.predictions import Predictions

SIZES = (3, 2)


@pytest.fixture
def labels():
    random = np.random.default_rng(12345)  # no run's seed
    return np.stack([random.integers(0, size, 600) for size in SIZES], 1)


def guesses(labels, accuracy, seed):
    """Predicted classes that are right about so often."""
    random = np.random.default_rng(seed)
    wrong = np.stack([random.integers(0, size, len(labels)) for size in SIZES], 1)
    return np.where(random.random(labels.shape) < accuracy, labels, wrong)


def runs_of(labels, accuracy, seeds, first=0):
    return {
        seed: (guesses(labels, accuracy, first + seed) == labels).astype(float) for seed in range(seeds)
    }


def test_the_score_is_the_mean_recall(labels):
    classes = guesses(labels, 0.6, 0)
    expected = np.concatenate(
        [recall_score(labels[:, k], classes[:, k], average=None) for k in range(len(SIZES))]
    ).mean()
    assert per_class_accuracy(classes == labels, labels, SIZES) == pytest.approx(expected)
    few = np.where(labels == 2, 0, labels)  # an attribute without images does not count
    assert per_class_accuracy(few == few, few, SIZES) == 1.0


def test_hits_are_of_the_last_five_epochs():
    labels = np.array([[0], [1]], dtype=np.uint8)
    classes = np.array([[[1], [0]]] * 3 + [[[0], [0]]] * 2 + [[[0], [1]]] * 2, dtype=np.uint8)
    predictions = Predictions(labels, classes, np.zeros(classes.shape, dtype=np.float16))
    assert hits(predictions).tolist() == [[4 / 5], [2 / 5]]


def test_the_images_part_equals_a_bootstrap_that_draws(labels, monkeypatch):
    """Images drawn with replacement within each attribute, the same for both candidates."""
    monkeypatch.setattr(bootstrap, "PRIOR_IMAGES", 0)
    pair = np.stack([runs_of(labels, 0.7, 1)[0], runs_of(labels, 0.5, 1, 9)[0]])
    pair[1] = np.where(np.random.default_rng(3).random(labels.shape) < 0.6, pair[0], pair[1])
    random = np.random.default_rng(0)
    replicates = np.zeros((4000, 2))
    for k, size in enumerate(SIZES):
        for value in range(size):
            members = np.flatnonzero(labels[:, k] == value)
            drawn = random.choice(members, (4000, len(members)))
            replicates += pair[:, drawn, k].mean(2).T / sum(SIZES)
    attributes = bootstrap.attribute_index(labels, SIZES)
    ours = bootstrap._image_covariance(pair, attributes, SIZES)
    assert ours == pytest.approx(np.cov(replicates.T), rel=0.12)
    assert abs(np.cov(replicates.T)[0, 1]) > 1e-5  # so the pairing is part of it


def test_two_images_that_are_right_are_no_proof():
    """An attribute with two images has the variance of its category, not none."""
    labels = np.array([[0]] * 100 + [[1]] * 2)
    right = np.array([[1.0], [0.0]] * 50 + [[1.0]] * 2)
    interval = of_hits(right, labels, (2,))
    # Half of the first are right: a variance of 1/4 for each of the 2 images, and half the weight.
    assert interval.error == pytest.approx(np.sqrt(0.25 / 2) / 2, rel=0.1)


def test_candidates_that_do_not_differ_tie_and_a_better_one_wins(labels):
    same = compare([runs_of(labels, 0.7, 5, 10 * n) for n in range(3)], labels, SIZES)
    assert max(one.best for one in same) < 0.95
    assert sum(one.best for one in same) == pytest.approx(1)
    assert all(one.behind.low < 0 < one.behind.high for one in same if one.behind.error)
    better = compare(
        [runs_of(labels, 0.6, 5), runs_of(labels, 0.75, 5, 10), runs_of(labels, 0.6, 5, 20)],
        labels,
        SIZES,
    )
    assert better[1].best > 0.99
    assert better[1].behind.value == better[1].behind.error == 0
    assert better[0].behind.low > 0


def test_the_same_evidence_gives_the_same_answer_and_seeds_may_be_missing(labels):
    full, short = runs_of(labels, 0.7, 5), runs_of(labels, 0.6, 5, 10)
    gaps = {seed: short[seed] for seed in (0, 3)}
    assert compare([full, gaps], labels, SIZES) == compare([full, gaps], labels, SIZES)
    [alone] = compare([full], labels, SIZES)
    assert alone.best == 1
    assert alone.score.low < alone.score.value < alone.score.high


def test_what_seeds_do_to_all_and_to_one_is_told_apart_though_some_are_missing():
    """Known effects: the variances come out as they went in, on average."""
    random, found = np.random.default_rng(0), []
    has = np.ones((5, 5), dtype=bool)
    has[2:, 2:] = False  # three candidates were given up after two seeds
    for shared, own in ((0.03, 0.0), (0.0, 0.03)):
        spreads = []
        for _ in range(300):
            scores = 0.6 + random.normal(0, shared, 5) + random.normal(0, own, (5, 5))
            moves = bootstrap._seeds(np.where(has, scores, np.nan), 0.0, random)
            # Of the first two, which have all seeds: of one, and of their difference.
            spreads.append([np.quantile(m, 0.84) for m in (moves[:, 0], moves[:, 0] - moves[:, 1])])
        found.append(np.mean(spreads, 0) * np.sqrt(5))
    (all_one, all_pair), (one_one, one_pair) = found
    assert all_one == pytest.approx(0.03, rel=0.25)
    assert all_pair < 0.002  # what all share is in no difference
    assert one_pair == pytest.approx(0.03 * np.sqrt(2), rel=0.25)
    assert one_one == pytest.approx(0.03, rel=0.35)


def test_seeds_that_shift_all_of_a_candidate_widen_its_interval(labels):
    steady = [runs_of(labels, 0.7, 5, 10 * n) for n in range(3)]
    levels = enumerate((0.5, 0.8, 0.6, 0.9, 0.7))
    one = {s: runs_of(labels, level, 1, s)[0] for s, level in levels}
    shaky = [one, one, one]
    # So that the seeds do not do the same to all.
    shaky[1] = dict(zip(range(5), [*shaky[1].values()][::-1], strict=True))
    narrow, wide = (compare(runs, labels, SIZES)[0].score.error for runs in (steady, shaky))
    assert wide > 2 * narrow
    assert churn(steady, labels, SIZES) > 0


def test_flattery_is_what_the_best_of_many_equals_has_too_much(labels):
    """All configurations are equal, so whatever is above the mean is luck."""
    runs = [*runs_of(labels, 0.7, 60).values()]
    scores = [per_class_accuracy(run, labels, SIZES) for run in runs]
    luck = flattery(runs, labels, SIZES, 0.0)
    assert 0.4 < luck / (max(scores) - np.mean(scores)) < 1  # never too much, if anything
    assert 0 < flattery(runs, labels, SIZES, 0.5 * np.var(scores)) < luck  # some of it is the seeds'
    assert flattery(runs, labels, SIZES, 2 * np.var(scores)) == 0  # all of it is
    assert flattery(runs[:1], labels, SIZES, 0.0) == 0
    # Of configurations that differ much, the best is not the best by luck.
    spread = [runs_of(labels, level, 1, n)[0] for n, level in enumerate(np.linspace(0, 1, 12))]
    assert abs(flattery(spread, labels, SIZES, 0.0)) < 0.1 * luck


def test_intervals_of_one_run_cover_the_truth(labels):
    """95 % of the runs' intervals hold the accuracy that they were drawn with."""
    truth = 0.6 + 0.4 * np.mean([1 / size for size in SIZES for _ in range(size)])
    covered = []
    for seed in range(400):
        classes = guesses(labels, 0.6, 100 + seed)
        known = of_hits(classes == labels, labels, SIZES)
        covered.append(known.low < truth < known.high)
    assert 0.92 < np.mean(covered) < 0.98
    assert of_mean(np.array([0.0, 1.0] * 50)).error == pytest.approx(0.05, rel=0.01)

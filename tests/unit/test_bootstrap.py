"""What is said of scores, against references that are computed in another way."""

import tracemalloc

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import recall_score

from dashboards.wilson import Z, wilson
from search.confirm import intervals
from search.confirm.intervals import (
    compare,
    hits,
    of_counts,
    of_hits,
    of_mean,
    per_class_accuracy,
    seed_flips,
    selection_bias,
)
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
    unknown = np.full(classes.shape, np.nan, dtype=np.float16)  # of a network that has diverged
    right = hits(
        Predictions(labels, classes, unknown, np.zeros(7, np.int32), np.array([0, 1], np.int32))
    )
    assert right.tolist() == [[4 / 5], [2 / 5]]
    check(of_hits(right, labels, (2,)))


def redrawn(labels, runs):
    """Scores of runs [n, images, categories] on images drawn within attributes, alike for all."""
    random = np.random.default_rng(0)
    replicates = np.zeros((4000, len(runs)))
    for k, size in enumerate(SIZES):
        for value in range(size):
            members = np.flatnonzero(labels[:, k] == value)
            drawn = random.choice(members, (4000, len(members)))
            replicates += runs[:, drawn, k].mean(2).T / sum(SIZES)
    return replicates


def test_the_images_part_equals_a_bootstrap_that_draws(labels, monkeypatch):
    """Images drawn with replacement within each attribute, the same for both candidates."""
    monkeypatch.setattr(intervals, "PRIOR_IMAGES", 0)
    pair = np.stack([runs_of(labels, 0.7, 1)[0], runs_of(labels, 0.5, 1, 9)[0]])
    pair[1] = np.where(np.random.default_rng(3).random(labels.shape) < 0.6, pair[0], pair[1])
    replicates = redrawn(labels, pair)
    attributes = intervals.attribute_index(labels, SIZES)
    ours = intervals._image_covariance(pair, attributes, SIZES)
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


def test_counts_of_each_attribute_tell_what_the_images_do(labels):
    labels = labels.copy()
    labels[:50, 1] = -1  # unknown
    right = guesses(labels, 0.7, seed=3) == labels
    places = [(column, value) for column, size in enumerate(SIZES) for value in range(size)]
    counts = [int((labels[:, column] == value).sum()) for column, value in places]
    found = [int(right[labels[:, column] == value, column].sum()) for column, value in places]
    expected = of_hits(right, labels, SIZES)
    for name, value in vars(of_counts(found, counts, SIZES)).items():
        assert value == pytest.approx(getattr(expected, name), abs=1e-12)


def test_a_candidate_is_within_so_many_points_of_the_best(labels):
    """One that leads for sure is the best; one that is surely behind is so by its distance or more."""
    near, far = compare([runs_of(labels, 0.9, 5), runs_of(labels, 0.5, 5, first=50)], labels, SIZES)
    assert near.within == 0
    assert far.within > far.behind.value
    assert far.within < far.behind.high  # one-sided
    # Equal candidates are no proof that other images would not tell them apart.
    equal = runs_of(labels, 0.7, 5)
    for one in compare([equal, equal], labels, SIZES):
        assert 0 < one.within < 0.02


def nearness(truths, weights=None):
    """How far each candidate is behind the best at most, with 95 %, by draws of true scores."""
    behind = truths.max(1, keepdims=True) - truths
    if weights is None:
        return np.quantile(behind, 0.95, axis=0)
    order = np.argsort(behind, axis=0)
    last = (np.cumsum(weights[order], axis=0) < 0.95 * weights.sum()).sum(0)
    return np.sort(behind, axis=0)[last, range(behind.shape[1])]


def test_a_sample_of_candidates_has_steins_prior():
    """The same from draws without a prior, weighted by its density: 1 over the variance of five."""
    random = np.random.default_rng(0)
    # In part the candidates vary together, and some vary more.
    factor = random.normal(0, 0.01, (5, 5)) + 0.02 * np.eye(5)
    means, noise = np.array([0.5, 0.51, 0.525, 0.53, 0.54]), factor @ factor.T
    moves = random.multivariate_normal(np.zeros(5), noise, 100_000)
    flat = means - moves
    weights = 1 / flat.var(1)
    known = nearness(intervals._as_a_sample(means, moves, noise, random))
    assert known == pytest.approx(nearness(flat, weights), rel=0.03)
    assert (known < 0.9 * nearness(flat)).all()


def test_a_sample_of_three_candidates_or_without_noise_stays_as_it_is():
    random = np.random.default_rng(0)
    means, moves = np.array([0.0, 1.0, 2.0]), random.normal(0, 1, (1000, 3))
    assert (intervals._as_a_sample(means, moves, np.eye(3), random) == means - moves).all()
    means = np.arange(5.0)
    assert (
        intervals._as_a_sample(means, np.zeros((9, 5)), np.zeros((5, 5)), random)
        == np.tile(means, (9, 1))
    ).all()


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_what_is_named_of_a_sample_is_within_what_is_said(spread):
    """Known true scores, drawn anew each time, with errors that are as large as 1."""
    random = np.random.default_rng(1)
    holds, said = [], []
    for _ in range(600):
        truth = random.normal(0, spread, 5)
        means = truth + random.normal(0, 1, 5)
        moves = random.normal(0, 1, (1000, 5))
        within = nearness(intervals._as_a_sample(means, moves, np.eye(5), random))
        named = within.argmin()
        holds.append(truth.max() - truth[named] <= within[named])
        said.append((within[named], nearness(means - moves).min()))
    assert np.mean(holds) > 0.93
    if spread <= 1:  # else the noise is too small to matter
        assert np.less(*np.median(said, 0))  # so the sample says more than each candidate by itself


def test_many_candidates_on_many_folds_need_no_memory_for_each_pair(labels):
    folds = np.arange(len(labels)) % 100
    runs = on_folds(labels, [0.7] * 30, folds)
    tracemalloc.start()
    compare(runs, labels, SIZES, folds)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < intervals.REPLICATES * len(runs) * 100 * 8 / 4


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
        spreads, of_pair = [], []
        for _ in range(300):
            scores = 0.6 + random.normal(0, shared, 5) + random.normal(0, own, (5, 5))
            gains = np.hstack([np.diag(1 / has.sum(1)), np.zeros((5, 5))])
            table = intervals._Table(None, None, np.where(has, scores, np.nan), gains, 0.0, 0.0)
            moves, covariance = intervals._trainings(table, random)
            # Of the first two, which have all seeds: of one, and of their difference.
            spreads.append([np.quantile(m, 0.84) for m in (moves[:, 0], moves[:, 0] - moves[:, 1])])
            of_pair.append(np.trace(covariance[:2, :2]) - 2 * covariance[0, 1])
        found.append(np.mean(spreads, 0) * np.sqrt(5))
        assert 5 * np.mean(of_pair) == pytest.approx(2 * own**2, rel=0.1, abs=0.002**2)
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
    assert seed_flips(steady, labels, SIZES) > 0


def test_selection_bias_is_what_the_best_of_many_equals_has_too_much(labels):
    """All configurations are equal, so whatever is above the mean is luck."""
    runs = [*runs_of(labels, 0.7, 60).values()]
    scores = [per_class_accuracy(run, labels, SIZES) for run in runs]
    luck = selection_bias(runs, labels, SIZES, 0.0)
    assert 0.4 < luck / (max(scores) - np.mean(scores)) < 1  # never too much, if anything
    assert (
        0 < selection_bias(runs, labels, SIZES, 0.5 * np.var(scores)) < luck
    )  # some of it is the seeds'
    assert selection_bias(runs, labels, SIZES, 2 * np.var(scores)) == 0  # all of it is
    assert selection_bias(runs[:1], labels, SIZES, 0.0) == 0
    # Of configurations that differ much, the best is not the best by luck.
    spread = [runs_of(labels, level, 1, n)[0] for n, level in enumerate(np.linspace(0, 1, 12))]
    assert abs(selection_bias(spread, labels, SIZES, 0.0)) < 0.1 * luck


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


def test_intervals_cover_the_truth_near_1_and_with_few_images():
    """Where the interval of a normal distribution held it 65 % and 74 % of the time."""
    random = np.random.default_rng(0)
    counts = (20, 10, 5, 3, 2)
    labels = np.repeat(np.arange(len(counts)), counts)[:, np.newaxis]
    whole, classes = [], []
    for _ in range(1000):
        known = of_mean((random.random(100) < 0.99).astype(float))
        whole.append(known.low <= 0.99 <= known.high)
        known = of_hits(random.random(labels.shape) < 0.95, labels, (len(counts),))
        classes.append(known.low <= 0.95 <= known.high)
    assert 0.9 < np.mean(whole) < 0.98
    assert 0.9 < np.mean(classes) < 0.98


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.02, 0.5, 2 / 3, 0.98, 1.0])
@pytest.mark.parametrize("images", [0.4, 1, 2, 17.5, 1000, 1e9])
def test_wilsons_limits_are_the_truths_that_are_z_errors_away(share, images):
    """(share - p)^2 = z^2 p (1 - p) / images, solved as a polynomial."""
    for z in (1.0, Z):
        roots = np.roots([1 + z**2 / images, -2 * share - z**2 / images, share**2])
        assert wilson(share, images, z) == pytest.approx(sorted(roots.real), abs=1e-7)
    assert pytest.approx(1.959964, abs=1e-6) == Z


def classes_of(labels):
    """Predictions that are odd, each the same for all images of an attribute."""
    return {
        "all right": labels,
        "all wrong": (labels + 1) % SIZES,
        "always the first": np.zeros_like(labels),
        "one wrong": np.where(np.arange(len(labels))[:, np.newaxis] == 0, (labels + 1) % SIZES, labels),
    }


def sets_of_labels():
    yield "one image", np.array([[2, 1]])
    yield "two images", np.array([[0, 1], [0, 0]])
    yield "one class", np.array([[1, 0]] * 7)
    yield "a class with one image", np.array([[0, 0]] * 30 + [[1, 1]])
    yield "many", np.stack([np.arange(300) % size for size in SIZES], 1)


ODD = [
    pytest.param(labels, classes == labels, id=f"{name}, {kind}")
    for name, labels in sets_of_labels()
    for kind, classes in classes_of(labels).items()
]


def check(interval, least=0.0):
    figures = np.array([interval.value, interval.error, interval.low, interval.high])
    assert np.isfinite(figures).all()
    assert least <= interval.low <= interval.value <= interval.high <= 1
    assert interval.high - interval.low > 1e-3
    assert 0 < interval.error < interval.high - interval.low


@pytest.mark.parametrize(("labels", "right"), ODD)
def test_an_interval_of_few_images_or_of_none_wrong_can_be_true(labels, right):
    with np.errstate(all="raise"):
        known = of_hits(right, labels, SIZES)
        check(known)
        assert known.value == per_class_accuracy(right, labels, SIZES)
        check(of_mean(right.mean(1)))
        for column in right.T:
            known = of_mean(column.astype(float))
            check(known)
            same = binomtest(int(column.sum()), len(column)).proportion_ci(0.95, method="wilson")
            assert (known.low, known.high) == pytest.approx(same, abs=1e-9)


def test_without_a_wrong_image_each_attribute_tells_what_it_has_images_for():
    """4 and 20 images weigh alike: a quarter of 1/4 + 1/20 of an image's variance is 1 / 13.3 of it."""
    labels = np.array([[0]] * 4 + [[1]] * 20)
    known = of_hits(labels == labels, labels, (2,))
    assert (known.low, known.high) == (pytest.approx((40 / 3) / (40 / 3 + Z**2)), 1)


@pytest.mark.parametrize(("labels", "right"), ODD)
def test_intervals_of_candidates_can_be_true(labels, right):
    always = right.astype(float)
    pair = [dict.fromkeys(range(5), run) for run in (always, always)]
    other = dict.fromkeys(range(5), 1 - always)
    mixed = {seed: always if seed % 2 else 1 - always for seed in range(5)}
    with np.errstate(all="raise"):
        for runs in (pair[:1], pair, [*pair, other], [*pair, mixed], [mixed, other]):
            known = compare(runs, labels, SIZES)
            leader = max(range(len(known)), key=lambda index: known[index].score.value)
            for index, one in enumerate(known):
                check(one.score)
                if index != leader:
                    check(one.behind, -1.0)
            assert known[leader].behind == intervals.Interval(0, 0, 0, 0)
            assert sum(one.best for one in known) == pytest.approx(1)
            if len(runs) > 1 and runs[0] is pair[0]:
                assert known[0].best == known[1].best


def test_no_candidates_have_no_estimates(labels):
    assert compare([], labels, SIZES) == []
    assert selection_bias([], labels, SIZES, 0.0) == 0


def test_candidates_that_are_equal_share_the_probability(labels):
    """Their runs vary, so that only the distance between them is without any."""
    runs = runs_of(labels, 0.7, 5)
    first, second, third = compare([runs, dict(runs), runs_of(labels, 0.69, 5, 10)], labels, SIZES)
    assert first.best == second.best
    assert first.best + second.best + third.best == pytest.approx(1)
    assert second.behind.value == 0
    # 3.84 / (n + 3.84): 600 images, of which each attribute of the two categories has a third or half.
    counts = np.concatenate([np.bincount(column) for column in labels.T])
    limit = Z**2 / (25 / (1 / counts).sum() + Z**2)
    assert (second.behind.low, second.behind.high) == pytest.approx((-limit, limit))


def test_one_image_proves_no_distance():
    """Right and wrong on all of n images: 1 - 2 (1 - p), with Wilson's p for n of n, is what is left."""
    for n in (1, 50):
        labels = np.zeros((n, 1), dtype=int)
        runs = [dict.fromkeys(range(5), np.full((n, 1), right)) for right in (1.0, 0.0)]
        _, wrong = compare(runs, labels, (1,))
        low = binomtest(n, n).proportion_ci(0.95, method="wilson").low
        assert (wrong.behind.value, wrong.behind.high) == (1, 1)
        assert wrong.behind.low == pytest.approx(1 - 2 * (1 - low))


def on_folds(labels, accuracies, folds, missing=(), first=0, shift=None):
    """Candidates with one seed. Each lacks its folds in `missing`; `shift` is [candidates, folds]."""
    runs = []
    for index, accuracy in enumerate(accuracies):
        random = np.random.default_rng(first + index)
        level = accuracy + (0 if shift is None else shift[index][folds][:, np.newaxis])
        right = (random.random(labels.shape) < level).astype(float)
        left_out = missing[index] if index < len(missing) else ()
        runs.append({(k, 7): right[folds == k] for k in np.unique(folds) if k not in left_out})
    return runs


def all_images(run, folds):
    """The hits of one seed [images, categories], as if it were one run; NaN in folds that it lacks."""
    hits = np.full((len(folds), len(SIZES)), np.nan)
    for (fold, _), judged in run.items():
        hits[folds == fold] = judged
    return hits


def test_without_folds_the_numbers_are_those_of_before(labels):
    """Written down before there were folds."""
    full, short = runs_of(labels, 0.7, 5), runs_of(labels, 0.65, 5, 10)
    first, second = compare([full, {seed: short[seed] for seed in (0, 1, 2)}], labels, SIZES)
    score = (0.8168267248727936, 0.005062643506366378, 0.8070049535412038, 0.8265804374616599)
    behind = (0.032215524349918034, 0.008834385231277815, 0.014427878678961031, 0.049815238415085575)
    assert tuple(vars(first.score).values()) == pytest.approx(score, rel=1e-9)
    assert tuple(vars(second.behind).values()) == pytest.approx(behind, rel=1e-9)
    assert (first.best, second.within) == pytest.approx((0.9998, 0.047005670197001546), rel=1e-9)


def test_folds_that_are_complete_are_a_bootstrap_of_all_images(labels, monkeypatch):
    """Images are drawn within attributes; nothing else varies, as fold and seed change no level."""
    monkeypatch.setattr(intervals, "PRIOR_IMAGES", 0)
    folds = np.arange(len(labels)) % 6
    runs = on_folds(labels, (0.7, 0.68), folds)
    table = intervals._by_fold(runs, labels, SIZES, folds)
    plain = [all_images(one, folds) for one in runs]
    assert table.hits == pytest.approx(np.stack(plain))
    replicates = redrawn(labels, np.stack(plain))
    known = compare(runs, labels, SIZES, folds)
    assert known[0].score.value == pytest.approx(per_class_accuracy(plain[0], labels, SIZES))
    assert known[0].score.error > 0.9 * replicates[:, 0].std()


def test_the_images_part_of_a_folds_score_is_known():
    """Where training changes no level, the scores of folds vary as their images say."""
    labels = np.stack([np.arange(1200) % size for size in SIZES], 1)
    folds, found, said = np.arange(1200) // 6 % 6, [], []
    for first in range(300):
        table = intervals._by_fold(
            on_folds(labels, (0.7, 0.6, 0.8), folds, first=3 * first), labels, SIZES, folds
        )
        scores = table.scores - table.scores.mean(1, keepdims=True)
        between = scores.mean(0)
        found.append([((scores - between) ** 2).sum() / 10, between.var(ddof=1)])
        said.append([table.own, table.shared + table.own / 3])
    assert np.mean(said, 0) == pytest.approx(np.mean(found, 0), rel=0.1)


def test_trainings_that_differ_by_fold_widen_the_interval(labels):
    """Known shifts of single networks: their variance beyond the images' comes out, divided by six."""
    folds, random, ratios = np.arange(len(labels)) % 6, np.random.default_rng(0), []
    for first in range(60):
        shift = random.normal(0, 0.1, (4, 6))
        table = intervals._by_fold(
            on_folds(labels, [0.5] * 4, folds, (), 4 * first, shift), labels, SIZES, folds
        )
        moves, _ = intervals._trainings(table, np.random.default_rng(first))
        ratios.append(np.quantile(moves[:, 0] - moves[:, 1], 0.84) ** 2 / (2 * 0.1**2))
    assert np.mean(ratios) == pytest.approx(1 / 6, rel=0.15)


def test_who_lacks_a_hard_fold_is_not_better_for_it_and_who_lacks_an_easy_one_not_worse(labels):
    """By the definition: the others' mean, and the paired difference to it where both have judged."""
    folds = np.arange(len(labels)) % 6
    hard = np.array([[0.25] * 3 + [-0.25] * 3] * 3)
    for left_out in ((3, 4, 5), (0, 1, 2)):
        runs = on_folds(labels, (0.6, 0.6, 0.55), folds, ((), (), left_out), 0, hard)
        known = compare(runs, labels, SIZES, folds)
        here = ~np.isin(folds, left_out)
        *others, third = [all_images(one, folds) for one in runs]

        def mean(run, mask):
            return per_class_accuracy(run[mask], labels[mask], SIZES)

        every = np.ones(len(labels), bool)
        paired = mean(third, here) - np.mean([mean(run, here) for run in others])
        expected = np.mean([mean(run, every) for run in others]) + paired
        assert known[2].score.value == pytest.approx(expected, abs=0.005)
        assert abs(mean(third, here) - expected) > 0.1
        assert known[2].behind.error > known[1 if known[0].behind.error == 0 else 0].behind.error


def test_folds_may_be_incomplete_in_any_pattern(labels):
    """What no one has judged yet does not count, and a second seed may have judged some folds only."""
    folds = np.arange(len(labels)) % 6
    runs = on_folds(labels, (0.7, 0.7, 0.6), folds, ((2, 3, 4, 5), (1, 3, 4, 5), (2, 3, 4, 5)))
    begun = np.isin(folds, (0, 1, 2))
    assert compare(runs, labels, SIZES, folds) == compare(runs, labels[begun], SIZES, folds[begun])
    again = on_folds(labels, (0.7, 0.7, 0.6), folds, ((1, 2, 3, 4, 5),) * 3, first=9)
    both = [one | {(0, 8): more[0, 7]} for one, more in zip(runs, again, strict=True)]
    unknown = np.where((folds == 2)[:, np.newaxis], -1, labels)
    for one in compare(runs, unknown, SIZES, folds):
        check(one.score)
    assert seed_flips(runs, labels, SIZES, folds) == 0
    # Each fold may have a seed of its own.
    apart = [{(fold, fold): hits for (fold, _), hits in one.items()} for one in runs]
    assert compare(apart, labels, SIZES, folds) == compare(runs, labels, SIZES, folds)
    assert seed_flips(both, labels, SIZES, folds) > 0
    for one in compare(both, labels, SIZES, folds):
        check(one.score)


@pytest.mark.parametrize(("labels", "right"), ODD)
def test_intervals_on_folds_can_be_true(labels, right):
    if len(labels) < 2:
        return
    folds = np.arange(len(labels)) % 2
    hits = (right.astype(float), 1 - right.astype(float), right.astype(float))
    runs = [{(k, 0): one[folds == k] for k in (0, 1)} for one in hits]
    with np.errstate(all="raise"):
        known = compare(runs, labels, SIZES, folds)
        compare(runs[:1], labels, SIZES, folds)
    for one in known:
        check(one.score)
    assert sum(one.best for one in known) == pytest.approx(1)
    assert known[0].best == known[2].best

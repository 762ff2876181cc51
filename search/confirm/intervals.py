"""How sure one can be of scores: a bootstrap over images, crossed with seeds.

A score has two kinds of noise. Another validation set would have other images. That noise is the same
for all seeds, and partly for all candidates. So each replicate draws the same images for everybody. And
another seed would have trained another network. docs/confirm.md tells of the simulation with a known
truth on which these intervals were measured.

Where the images do not vary, the bootstrap sees no noise. There an interval is as wide as Wilson's for
so many images (dashboards.wilson).

An image whose label in a category is unknown counts nowhere in that category.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dashboards.wilson import LEVEL, Z, effective_images, wilson
from search.score import LAST, PRIOR_IMAGES
from trainer.predictions import UNKNOWN, Predictions

REPLICATES = 10_000
GRID = 1000  # points at which a density is known
ONE_SIGMA = statistics.NormalDist().cdf(-1)
ROUNDING = 1e-15  # a smaller variance comes from the arithmetic


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; `error` is half the width of the 68 % one.

    It stays within what is possible: [0, 1] for a score, [-1, 1] for a difference.
    """

    value: float
    error: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """What is known of one candidate's true score."""

    score: Interval
    behind: Interval  # how far it is behind the highest score; 0 without a width for that one itself
    best: float  # the probability of being the best candidate; equal candidates share it
    within: float  # how far it is behind the best candidate at most, with 95 %


def hits(predictions: Predictions) -> np.ndarray:
    """How often the last five epochs were right: a share for each image and category, float.

    It is 0 where the label is unknown.
    """
    right = predictions.classes[-LAST:] == predictions.labels
    return np.asarray(right.mean(0))


def attribute_index(labels: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The labels [images, categories] as indices into all attributes. -1 and UNKNOWN become -1."""
    starts = np.cumsum([0, *sizes[:-1]])
    return np.where(labels.astype(np.uint8) == UNKNOWN, -1, labels + starts)


def _present(attributes: np.ndarray) -> np.ndarray:
    """Those of the indices that occur, ascending."""
    return np.unique(attributes[attributes >= 0])


def class_means(values: np.ndarray, attributes: np.ndarray, n_attributes: int) -> np.ndarray:
    """The mean of values [images, categories] over the images of each attribute; NaN without any."""
    bins = attributes.ravel() + 1  # bin 0 has what is unknown
    counts = np.bincount(bins, minlength=n_attributes + 1)[1:]
    sums = np.bincount(bins, values.ravel(), n_attributes + 1)[1:]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def per_class_accuracy(values: np.ndarray, labels: np.ndarray, sizes: Sequence[int]) -> float:
    """The challenge's metric of hits [images, categories]. Attributes without images do not count."""
    means = class_means(values, attribute_index(labels, sizes), sum(sizes))
    return float(np.nanmean(means))


# Hits [images, categories] of each candidate by rerun: a seed, or (fold, seed) with the fold's images.
Runs = Sequence[Mapping[Any, np.ndarray]]


def compare(
    runs: Runs, labels: np.ndarray, sizes: Sequence[int], folds: np.ndarray | None = None
) -> list[Estimate]:
    """Estimate the true scores of candidates from their runs.

    All candidates have the same seeds, but one may lack some. `labels` [images, categories] are the
    truth. Without `folds` each candidate has at least two seeds. With them, `folds` [images] says which
    fold an image is in. Each candidate has judged a fold, and together they have judged two. The true
    scores are then those of trainings with these images, less one fold. Each rerun should have a seed of
    its own, since what one seed does to all folds is in no difference between them.

    `behind` and `best` take each candidate by itself. `within` is about the highest of several scores,
    which is too high as an estimate, so it takes the candidates as a sample: see `_as_a_sample`.
    """
    if not runs:
        return []
    random = np.random.default_rng(0)  # the same evidence gives the same answer
    table = _by_seed(runs, labels, sizes) if folds is None else _by_fold(runs, labels, sizes, folds)
    means = np.array([per_class_accuracy(own, table.labels, sizes) for own in table.hits]).clip(0, 1)
    attributes = attribute_index(table.labels, sizes)
    covariance = _image_covariance(table.hits, attributes, sizes)
    moves = random.multivariate_normal(np.zeros(len(means)), covariance, REPLICATES)
    trained, training_covariance = _trainings(table, random)
    moves += trained
    leader = int(means.argmax())
    variances = np.diag(covariance)
    # Whether the difference of two candidates does not vary with the images.
    same = variances[:, np.newaxis] + variances - 2 * covariance < ROUNDING
    equal = same & np.isclose(means[:, np.newaxis], means, rtol=0, atol=1e-9)
    best = np.bincount((means + moves).argmax(1), minlength=len(runs)) / REPLICATES
    best = equal @ best / equal.sum(1)  # equal candidates share the probability
    images = effective_images(np.bincount(attributes[attributes >= 0]).tolist())
    truths = _as_a_sample(means, moves, covariance + training_covariance, random)
    within = np.quantile(truths.max(1, keepdims=True) - truths, LEVEL, axis=0)
    estimates = []
    for index, mean in enumerate(means.tolist()):
        score = _interval(mean, moves[:, index], 0.0)
        if variances[index] < ROUNDING:
            score = _wider(score, _share(mean, 0.0, images))
        distance = float(means[leader]) - mean
        behind = _interval(distance, moves[:, leader] - moves[:, index], -1.0)
        if same[leader, index] and index != leader:
            behind = _wider(behind, _unseen(distance, images))
        rivals = np.flatnonzero(same[index])  # itself too
        unseen = [_unseen(float(means[i]) - mean, images).high for i in rivals if i != index]
        estimates.append(
            Estimate(score, behind, float(best[index]), max(float(within[index]), *unseen, 0))
        )
    return estimates


def _as_a_sample(
    means: np.ndarray, moves: np.ndarray, noise: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Draw the candidates' true scores, but for a constant of each draw: [replicates, candidates].

    `moves` are the replicates of the errors, and `noise` is their covariance. Means are drawn nearer to
    each other, by as much as noise explains how they differ. For that the true scores are a sample of a
    normal distribution (Berger and Deely's model for rankings, JASA 83, 1988). Its variance is unknown,
    and uniform a priori. So intervals hold the truth about as often as they say (Morris, JASA 78, 1983).
    For the scores themselves that is Stein's harmonic prior (Annals of Statistics 9, 1981). Up to three
    candidates do not tell how much they differ, and nothing is drawn nearer.
    """
    centre = np.eye(len(means)) - 1 / len(means)
    variances, directions = np.linalg.eigh(centre @ noise @ centre)
    variances = variances.clip(0)
    noisy = variances > ROUNDING  # not so are the average, and candidates that are equal
    if noisy.sum() < 3:
        return np.asarray(means - moves)
    differences = (means - means.mean()) @ directions
    share = (np.arange(GRID) + 0.5) / GRID  # of the noise in the variance of a mean
    spread = variances[noisy].mean() * (1 - share) / share  # the true scores' variance
    total = spread[:, np.newaxis] + variances[noisy]
    log_density = -(np.log(total) + differences[noisy] ** 2 / total).sum(1) / 2 - 2 * np.log(share)
    density = np.exp(log_density - log_density.max())
    drawn = random.choice(spread, (len(moves), 1), p=density / density.sum())
    kept = drawn / (drawn + variances)
    return np.asarray((kept * differences - np.sqrt(kept) * (moves @ directions)) @ directions.T)


def selection_bias(
    runs: Sequence[np.ndarray], labels: np.ndarray, sizes: Sequence[int], seed_variance: float
) -> float:
    """How much of the highest score of many runs is probably luck with these images.

    `runs` are hits [images, categories], one run of each configuration. `seed_variance` comes from
    `seed_flips` of reruns: that part of the variance is not the images'. This is the bootstrap of a
    maximum. With images drawn anew another run may come first, and what the draw gave to it is luck.
    Luck that all runs share does not change who is first, and does not count.
    """
    if len(runs) < 2:
        return 0.0  # there was no choice
    scores = np.array([per_class_accuracy(run, labels, sizes) for run in runs])
    covariance = _image_covariance(np.stack(runs).astype(float), attribute_index(labels, sizes), sizes)
    centre = np.eye(len(runs)) - 1 / len(runs)
    covariance = centre @ covariance @ centre
    variance = np.trace(covariance) / (len(runs) - 1)
    if variance <= seed_variance:
        return 0.0
    random = np.random.default_rng(0)
    moves = random.multivariate_normal(np.zeros(len(runs)), covariance, REPLICATES)
    first = (scores + moves).argmax(1)
    luck = moves[np.arange(REPLICATES), first].mean()
    return float(luck * (1 - seed_variance / variance))


def of_hits(right: np.ndarray, labels: np.ndarray, sizes: Sequence[int]) -> Interval:
    """The average per-class accuracy of one run's hits, with the noise of the images alone."""
    value = per_class_accuracy(right, labels, sizes)
    every = np.asarray(right, dtype=float)[np.newaxis]
    attributes = attribute_index(labels, sizes)
    variance = float(_image_covariance(every, attributes, sizes)[0, 0])
    return _share(value, variance, effective_images(np.bincount(attributes[attributes >= 0]).tolist()))


def of_counts(hits: Sequence[int], counts: Sequence[int], sizes: Sequence[int]) -> Interval:
    """`of_hits`, from each attribute's number of images and how many of them were right.

    Which images these are does not matter, as each category is resampled by itself.
    """
    categories = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    images = max(sum(counts[i] for i in category) for category in categories)
    labels = np.full((images, len(sizes)), -1)
    right = np.zeros(labels.shape, bool)
    for column, category in enumerate(categories):
        of_each = [counts[i] for i in category]
        labels[: sum(of_each), column] = np.repeat(np.arange(len(of_each)), of_each)
        start = 0
        for i in category:
            right[start : start + hits[i], column] = True
            start += counts[i]
    return of_hits(right, labels, sizes)


def of_mean(values: np.ndarray) -> Interval:
    """The mean of independent values in [0, 1], one for each image."""
    return _share(float(values.mean()), float(values.var()) / len(values), len(values))


def _share(value: float, variance: float, most: float) -> Interval:
    """Wilson's interval for as many images as give a share this variance.

    Where nothing varies, that number is unknown. Then it is taken as `most`.
    """
    images = most if variance < ROUNDING else value * (1 - value) / variance
    low, high = wilson(value, images)
    inner, outer = wilson(value, images, 1.0)
    return Interval(value, (outer - inner) / 2, low, high)


def _unseen(distance: float, images: float) -> Interval:
    """The interval of a distance that is the same on all images of an attribute.

    Images that were not seen may differ: up to Wilson's limit of a share of 0. All of them may speak for
    the one candidate, or for the other.
    """
    error, share = (wilson(0.0, images, z)[1] for z in (1.0, Z))
    return Interval(
        distance, error, distance - share * (1 + distance), distance + share * (1 - distance)
    )


def _wider(first: Interval, second: Interval) -> Interval:
    """The interval that holds both. They have the same value."""
    low, high = min(first.low, second.low), max(first.high, second.high)
    return Interval(first.value, max(first.error, second.error), low, high)


def _interval(value: float, deviations: np.ndarray, least: float) -> Interval:
    """The basic bootstrap interval: the truth, if the estimate errs as the replicates do.

    The truth is between `least` and 1.
    """
    limits = np.quantile(value - deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = np.clip(limits, least, 1.0)
    # Not the standard deviation: Student's t with one degree of freedom has none.
    inner, outer = np.quantile(deviations, [ONE_SIGMA, 1 - ONE_SIGMA])
    return Interval(float(value), float(outer - inner) / 2, float(low), float(high))


def _image_covariance(average: np.ndarray, attributes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """How the scores would move with other images: their covariance [candidates, candidates].

    It equals that of a bootstrap that draws images class by class, the same ones for all candidates. The
    score is linear in the images, so nothing has to be drawn. Few images say little about how much their
    attribute varies. So its variance is mixed with its category's, as if k = PRIOR_IMAGES images had
    shown that before.
    """
    total = np.zeros((len(average), len(average)))
    present = len(_present(attributes))
    for category in range(len(sizes)):
        column = attributes[:, category]
        # Sums of squared deviations from each attribute's mean, by attribute.
        squares = []
        for attribute in _present(column):
            values = average[:, column == attribute, category]
            deviations = values - values.mean(1, keepdims=True)
            squares.append((values.shape[1], deviations @ deviations.T))
        freedom = sum(n - 1 for n, _ in squares)
        pooled = sum(squared for _, squared in squares) / max(freedom, 1)
        for n, squared in squares:
            variance = (squared + PRIOR_IMAGES * pooled) / (n - 1 + PRIOR_IMAGES)
            total += variance / (n * present**2)
    return total


def seed_flips(
    runs: Runs, labels: np.ndarray, sizes: Sequence[int], folds: np.ndarray | None = None
) -> float:
    """The part of a score's variance over seeds that comes from single images changing sides.

    The mean over seeds carries this part into the images' variance, so it must not count twice. Where a
    whole attribute gets better or worse, the seed did that: it is not in this part. With `folds` it is
    the part in the score of one fold, or 0 if no fold has two seeds.
    """
    if folds is not None:
        parts = []
        for fold in np.unique(folds):
            judged = [{seed: run for (k, seed), run in one.items() if k == fold} for one in runs]
            if several := [by_seed for by_seed in judged if len(by_seed) > 1]:
                parts.append(seed_flips(several, labels[folds == fold], sizes))
        return float(np.mean(parts)) if parts else 0.0
    attributes = attribute_index(labels, sizes)
    present = len(_present(attributes))
    total = 0.0
    for category, column in enumerate(attributes.T):
        for attribute in _present(column):
            has_it = column == attribute
            n = int(has_it.sum())
            if n < 2:
                continue  # one image cannot be told from its attribute
            for by_seed in runs:
                right = np.stack([run[has_it, category] for run in by_seed.values()])  # [seeds, images]
                flips = right - right.mean(0) - right.mean(1, keepdims=True) + right.mean()
                freedom = (len(right) - 1) * (n - 1)
                total += float((flips**2).sum()) / freedom / (n * present**2) / len(runs)
    return total


@dataclass(frozen=True)
class _Table:
    """Scores of candidates by columns. A column is a seed, or a fold with the mean of its reruns."""

    hits: np.ndarray  # [candidates, images, categories], as if each candidate had judged all images
    labels: np.ndarray  # [images, categories]
    scores: np.ndarray  # [candidates, columns], NaN where there is none; but for a constant of each row
    # [candidates, candidates + columns]: the score of candidate j in column k has in the mean of
    # candidate i the weight gains[i, j] + gains[i, candidates + k].
    gains: np.ndarray
    own: float  # the part of a score's variance over columns that is the images' and one candidate's
    shared: float  # the part that is the images' and all candidates'


def _by_seed(runs: Runs, labels: np.ndarray, sizes: Sequence[int]) -> _Table:
    """Each run has judged all images."""
    seeds = sorted({seed for by_seed in runs for seed in by_seed})
    scores = np.full((len(runs), len(seeds)), np.nan)
    for index, by_seed in enumerate(runs):
        for seed, run in by_seed.items():
            scores[index, seeds.index(seed)] = per_class_accuracy(run, labels, sizes)
    average = np.stack([np.mean([*by_seed.values()], 0) for by_seed in runs])
    own_means = np.diag(1 / np.array([len(by_seed) for by_seed in runs]))
    gains = np.hstack([own_means, np.zeros(scores.shape)])
    return _Table(average, labels, scores, gains, seed_flips(runs, labels, sizes), 0.0)


def _by_fold(runs: Runs, labels: np.ndarray, sizes: Sequence[int], folds: np.ndarray) -> _Table:
    """Each run has judged a fold. Images that nobody has judged yet do not count."""
    names = sorted({fold for one in runs for fold, _ in one})
    seen = np.isin(folds, names)
    members = [np.flatnonzero(folds[seen] == fold) for fold in names]
    average = np.zeros((len(runs), int(seen.sum()), len(sizes)))
    counts = np.zeros((len(runs), len(names)), int)
    for index, one in enumerate(runs):
        for (fold, _), run in one.items():
            k = names.index(fold)
            counts[index, k] += 1
            average[index, members[k]] += (run - average[index, members[k]]) / counts[index, k]
    has = counts > 0
    gains = _least_squares(has)
    hits = np.empty_like(average)
    for k, here in enumerate(members):
        weights = (gains[:, : len(runs)] + gains[:, [len(runs) + k]]) * has[:, k]
        hits[:, here] = len(names) * np.tensordot(weights, average[:, here], 1)
    attributes = attribute_index(labels[seen], sizes)
    # Folds differ in their attributes. So a score is what exceeds the candidate's usual accuracy.
    n_of = np.bincount(attributes[attributes >= 0], minlength=sum(sizes))
    known = attributes >= 0
    share = known / np.maximum(n_of, 1)[attributes] / np.count_nonzero(n_of)  # of an image in a score
    usual = np.stack([class_means(one, attributes, sum(sizes))[attributes] for one in hits])
    excess = np.where(known, average - usual, 0.0)
    scores, parts = np.full(has.shape, np.nan), []
    for k, here in enumerate(members):
        judges = has[:, k]
        whole = max(share[here].sum(), ROUNDING)  # 0 if no label is known here
        scores[judges, k] = (share[here] * excess[:, here][judges]).sum((1, 2)) / whole
        covariance = _image_covariance(average[:, here][judges], attributes[here], sizes)
        n, variance = len(covariance), float(np.trace(covariance)) / len(covariance)
        shared = (float(covariance.sum()) / n - variance) / (n - 1) if n > 1 else variance
        parts.append((variance - shared, shared, n > 1))
    # A fold with one judge does not tell what its images do to one from what they do to all.
    own, shared, _ = np.mean([part for part in parts if part[2]] or parts, 0).tolist()
    return _Table(hits, labels[seen], scores, gains, own, shared)


def _normal_matrix(has: np.ndarray) -> np.ndarray:
    """X'X of the design X that has a row for each score, with a 1 for its candidate and its column."""
    return np.block([[np.diag(has.sum(1)), has], [has.T, np.diag(has.sum(0))]]).astype(float)


def _least_squares(has: np.ndarray) -> np.ndarray:
    """How the candidates' means depend on the scores that there are: see `_Table.gains`.

    A fold that is hard for all is not the fault of those who judged it. So a candidate that lacks folds
    is compared in those that it has, as in any incomplete table of two factors (Yates, Empire Journal of
    Experimental Agriculture 1, 1933). `has` [candidates, folds] says which there are.
    """
    candidates, folds = has.shape
    mean = np.hstack([np.eye(candidates), np.full((candidates, folds), 1 / folds)])
    return np.asarray(mean @ np.linalg.pinv(_normal_matrix(has), hermitian=True))


def _trainings(table: _Table, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """How the candidates' scores would move with other trainings: [replicates, candidates].

    The second is the covariance of that, as estimated [candidates, candidates].

    Least squares tell what a column does to all candidates from what it does to one. The latter's
    variance is taken as the same for all candidates, since the few columns of one say little. What folds
    owe to the training images that they share is in no difference between them, and not in here
    (Bengio and Grandvalet, JMLR 5, 2004).
    """
    candidates, columns = table.scores.shape
    has = ~np.isnan(table.scores)
    design = _normal_matrix(has)
    sums = np.concatenate([np.nansum(table.scores, 1), np.nansum(table.scores, 0)])
    effects = np.linalg.pinv(design, hermitian=True) @ sums
    of_candidates, of_columns = effects[:candidates, np.newaxis], effects[candidates:]
    freedom = int(has.sum()) - int(np.linalg.matrix_rank(design, hermitian=True))
    residual = float(np.nansum((table.scores - of_candidates - of_columns) ** 2))
    single = residual / freedom if freedom else 0.0
    between = float(np.var(of_columns, ddof=1)) if columns > 1 else 0.0
    shared = between - single * float(np.mean(1 / has.sum(0))) - table.shared
    if freedom:
        single -= table.own
    else:  # the two cannot be told apart
        shared -= table.own
    moves, covariance = np.zeros((REPLICATES, candidates)), np.zeros((candidates, candidates))
    to_all = table.gains @ design[:, candidates:]  # what a column's shift does to each candidate's mean
    for unit, variance, known in (
        (to_all @ to_all.T, shared, max(columns - 1, 1)),
        (table.gains @ design @ table.gains.T, single, max(freedom, 1)),
    ):
        part = max(variance, 0.0) * unit
        # Student's t: the variance is an estimate. A replicate has one scale for all candidates.
        scale = np.sqrt(known / random.chisquare(known, (REPLICATES, 1)))
        moves += scale * random.multivariate_normal(np.zeros(candidates), part, REPLICATES)
        covariance += part
    return moves, covariance

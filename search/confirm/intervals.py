"""How sure one can be of scores: a bootstrap over images, crossed with seeds.

A score has two kinds of noise. Another validation set would have other images; it is the same for all
seeds and partly for all candidates, so images are resampled in pairs: each replicate draws the same ones
for everybody. And another seed would have trained another network. docs/confirm.md has the simulation
with known truth that these intervals were measured on.

What no image contradicts, images alone do not prove: where nothing varies, an interval is as wide as so
many images allow (dashboards.wilson).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dashboards.wilson import LEVEL, Z, wilson
from search.score import LAST, PRIOR_IMAGES
from trainer.predictions import Predictions

REPLICATES = 10_000
ONE_SIGMA = statistics.NormalDist().cdf(-1)
ROUNDING = 1e-15  # a variance below it is that of the arithmetic


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; `error` is half the width of the 68 % one.

    The interval is within what can be (a score's in [0, 1], a difference's in [-1, 1]) and has a width.
    """

    value: float
    error: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """What is known of one candidate's true score."""

    score: Interval
    behind: Interval  # how far it is behind the highest score; of that itself 0, without a width
    best: float  # the probability of being the best candidate; those that are equal share it


def hits(predictions: Predictions) -> np.ndarray:
    """The share of the last five epochs that is right: float [images, categories]."""
    right = predictions.classes[-LAST:] == predictions.labels
    return np.asarray(right.mean(0))


def attribute_index(labels: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The labels [images, categories] as indices into all attributes."""
    starts = np.cumsum([0, *sizes[:-1]])
    return np.asarray(labels + starts)


def class_means(values: np.ndarray, attributes: np.ndarray, n_attributes: int) -> np.ndarray:
    """The mean of values [images, categories] over the images of each attribute; NaN without any."""
    counts = np.bincount(attributes.ravel(), minlength=n_attributes)
    sums = np.bincount(attributes.ravel(), values.ravel(), n_attributes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def per_class_accuracy(values: np.ndarray, labels: np.ndarray, sizes: Sequence[int]) -> float:
    """The challenge's metric of hits [images, categories]; attributes without images do not count."""
    means = class_means(values, attribute_index(labels, sizes), sum(sizes))
    return float(np.nanmean(means))


Runs = Sequence[Mapping[int, np.ndarray]]  # of each candidate by seed: hits [images, categories]


def compare(runs: Runs, labels: np.ndarray, sizes: Sequence[int]) -> list[Estimate]:
    """Estimate the true scores of candidates from their runs; of no candidates, nothing.

    The seeds are the same for all, but a candidate may lack some; it has two at least. `labels`
    [images, categories] are the truth.
    """
    if not runs:
        return []
    random = np.random.default_rng(0)  # the same evidence gives the same answer
    seeds = sorted({seed for some in runs for seed in some})
    scores = np.full((len(runs), len(seeds)), np.nan)
    for index, some in enumerate(runs):
        for seed, run in some.items():
            scores[index, seeds.index(seed)] = per_class_accuracy(run, labels, sizes)
    means = np.nanmean(scores, 1)
    average = np.stack([np.mean([*some.values()], 0) for some in runs])  # over seeds
    attributes = attribute_index(labels, sizes)
    covariance = _image_covariance(average, attributes, sizes)
    moves = random.multivariate_normal(np.zeros(len(means)), covariance, REPLICATES)
    moves += _seeds(scores, seed_flips(runs, labels, sizes), random)
    leader = int(means.argmax())
    own = np.diag(covariance)
    same = own[:, np.newaxis] + own - 2 * covariance < ROUNDING  # their difference does not vary
    equal = same & np.isclose(means[:, np.newaxis], means, rtol=0, atol=1e-9)
    best = np.bincount((means + moves).argmax(1), minlength=len(runs)) / REPLICATES
    best = equal @ best / equal.sum(1)  # the first of equals is not better than the others
    images = _worth(attributes)
    estimates = []
    for index, mean in enumerate(means.tolist()):
        score = _interval(mean, moves[:, index], 0.0)
        if own[index] < ROUNDING:
            score = _wider(score, _share(mean, 0.0, images))
        distance = float(means[leader]) - mean
        behind = _interval(distance, moves[:, leader] - moves[:, index], -1.0)
        if same[leader, index] and index != leader:
            behind = _wider(behind, _unseen(distance, images))
        estimates.append(Estimate(score, behind, float(best[index])))
    return estimates


def selection_bias(
    runs: Sequence[np.ndarray], labels: np.ndarray, sizes: Sequence[int], seed_variance: float
) -> float:
    """How much of the highest score of many runs is expected to be the luck of having these images.

    `runs` are hits [images, categories], one run of each configuration. `seed_variance` is what
    `seed_flips` says of reruns: what another seed would change is not the images' doing. The bootstrap
    of a maximum: with images drawn anew another run comes first, and what the draw gave to it is luck.
    Luck that all runs share has no part in who is first, and counts as none.
    """
    if len(runs) < 2:
        return 0.0  # it was chosen from nothing
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
    """The average per-class accuracy of one run's hits, with the noise of its images only."""
    value = per_class_accuracy(right, labels, sizes)
    every = np.asarray(right, dtype=float)[np.newaxis]
    attributes = attribute_index(labels, sizes)
    variance = float(_image_covariance(every, attributes, sizes)[0, 0])
    return _share(value, variance, _worth(attributes))


def of_mean(values: np.ndarray) -> Interval:
    """The mean of independent values in [0, 1], one for each image."""
    return _share(float(values.mean()), float(values.var()) / len(values), len(values))


def _share(value: float, variance: float, most: float) -> Interval:
    """Wilson's interval, with as many images as a share of this variance is worth.

    Where they do not vary, that is unknown; it is then taken as `most`.
    """
    images = most if variance < ROUNDING else value * (1 - value) / variance
    low, high = wilson(value, images)
    inner, outer = wilson(value, images, 1.0)
    return Interval(value, (outer - inner) / 2, low, high)


def _unseen(distance: float, images: float) -> Interval:
    """The distance of two whose difference is the same on all images of an attribute.

    Of what was not seen there may be a share up to Wilson's limit of 0, and all of it speak for either.
    """
    error, share = (wilson(0.0, images, z)[1] for z in (1.0, Z))
    return Interval(
        distance, error, distance - share * (1 + distance), distance + share * (1 - distance)
    )


def _wider(one: Interval, other: Interval) -> Interval:
    """What is in either, of the same value."""
    low, high = min(one.low, other.low), max(one.high, other.high)
    return Interval(one.value, max(one.error, other.error), low, high)


def _worth(attributes: np.ndarray) -> float:
    """How many images tell as much of a share as these, [images, categories], of the average one.

    The average over C attributes that have n_c images, all of one accuracy p, has the variance
    p (1 - p) sum(1 / n_c) / C^2.
    """
    counts = np.bincount(attributes.ravel())
    counts = counts[counts > 0]
    return float(len(counts) ** 2 / (1 / counts).sum())


def _interval(value: float, deviations: np.ndarray, least: float) -> Interval:
    """The basic bootstrap interval: where the truth lies, if the estimate errs as the replicates do.

    The truth is between `least` and 1.
    """
    limits = np.quantile(value - deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = np.clip(limits, least, 1.0)
    # Not the standard deviation: Student's t with one degree of freedom has none.
    inner, outer = np.quantile(deviations, [ONE_SIGMA, 1 - ONE_SIGMA])
    return Interval(float(value), float(outer - inner) / 2, float(low), float(high))


def _image_covariance(average: np.ndarray, attributes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """How the scores move together with other images: covariance [candidates, candidates].

    It is what a bootstrap has that draws images class by class, the same for all candidates, each
    attribute as often as it occurs; the score is linear in the images, so no draw is needed. Two images
    say nothing about how their attribute varies, so its variance is mixed with its category's, as if
    that had been seen on k = PRIOR_IMAGES images before.
    """
    total = np.zeros((len(average), len(average)))
    present = len(np.unique(attributes))
    for category in range(len(sizes)):
        column = attributes[:, category]
        # Sums of squared deviations from each attribute's mean, by attribute.
        squares = []
        for attribute in np.unique(column):
            values = average[:, column == attribute, category]
            deviations = values - values.mean(1, keepdims=True)
            squares.append((values.shape[1], deviations @ deviations.T))
        pooled = sum(own for _, own in squares) / max(len(column) - len(squares), 1)
        for n, own in squares:
            variance = (own + PRIOR_IMAGES * pooled) / (n - 1 + PRIOR_IMAGES)
            total += variance / (n * present**2)
    return total


def seed_flips(runs: Runs, labels: np.ndarray, sizes: Sequence[int]) -> float:
    """The part of a score's variance over seeds that is images changing sides one by one.

    The mean over seeds carries it into the images' part, so it must not be counted again. An attribute
    that does better or worse as a whole is the seed's doing, and not in it.
    """
    present = len(np.unique(attribute_index(labels, sizes)))
    total = 0.0
    for category in range(len(sizes)):
        for value in np.unique(labels[:, category]):
            mine = labels[:, category] == value
            n = int(mine.sum())
            if n < 2:
                continue  # one image cannot be told from its attribute
            for some in runs:
                right = np.stack([run[mine, category] for run in some.values()])  # [seeds, images]
                own = right - right.mean(0) - right.mean(1, keepdims=True) + right.mean()
                freedom = (len(right) - 1) * (n - 1)
                total += float((own**2).sum()) / freedom / (n * present**2) / len(runs)
    return total


def _seeds(scores: np.ndarray, seed_variance: float, random: np.random.Generator) -> np.ndarray:
    """How the mean scores move with other seeds: [replicates, candidates].

    `scores` are [candidates, seeds], NaN where a run is missing. What a seed does to all candidates and
    what it does to one are kept apart (least squares); the variance of the latter is taken as the same
    for all candidates, since a few seeds of one say little.
    """
    candidates, seeds = scores.shape
    rows, columns = np.nonzero(~np.isnan(scores))
    values = scores[rows, columns]
    design = np.hstack([np.eye(candidates)[rows], np.eye(seeds)[columns]])
    effects, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(values) - int(rank)
    own = float(((values - design @ effects) ** 2).sum()) / freedom if freedom else 0.0
    runs_of_seed = np.bincount(columns)
    shared = float(np.var(effects[candidates:], ddof=1)) - own * float(np.mean(1 / runs_of_seed))
    if freedom:
        own -= seed_variance
    else:  # the two cannot be told apart
        shared -= seed_variance

    def draw(shape: tuple[int, ...], variance: float, freedom: int) -> np.ndarray:
        """Student's t, since the variance is estimated: one scale for all draws of a replicate."""
        scale = np.sqrt(max(variance, 0.0) * freedom / random.chisquare(freedom, REPLICATES))
        return random.standard_normal((REPLICATES, *shape)) * scale.reshape(-1, *[1] * len(shape))

    has = ~np.isnan(scores)
    moves = draw((1, seeds), shared, seeds - 1) + draw(has.shape, own, max(freedom, 1))
    return np.asarray((moves * has).sum(2) / has.sum(1))

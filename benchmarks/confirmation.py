"""How far the intervals and the winner of `atelier confirm` can be trusted: studies with known truth.

    python -m benchmarks.confirmation [--studies 400] [--folds 6] [--seeds 1] [--spread 1]

Each simulated study has TRIALS configurations with known true scores. Its validation set has the class
counts of FashionDataset. Its noise is as large as on real runs (docs/confirm.md):

- Images are hard for every network, or for one.
- Seeds shift a network's accuracies.
- The images that a network learns from shift them too.
- Predictions of images change from training to training.

The search trains each configuration once. The five that look best are confirmed on fresh seeds, or on
folds of all images, by the code that `atelier confirm` runs.
"""

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from search.confirm.evidence import DROPPED, LEAST_RERUNS, WINNING_IMAGES, WINS
from search.confirm.intervals import Interval, compare, per_class_accuracy, seed_flips, selection_bias

SIZES = (7, 3, 3, 4, 6, 3)
# Validation images of each attribute in FashionDataset.
COUNTS = (
    *(192, 175, 65, 77, 13, 458, 20),
    *(301, 168, 531),
    *(100, 173, 727),
    *(387, 173, 2, 438),
    *(56, 146, 680, 16, 10, 92),
    *(129, 70, 801),
)
IMAGES = 1000
TRIALS, TOP, SEEDS = 40, 5, 5
BLOCKS = 6  # of all images, each as large as the validation set; a run learns from all but one
# On the scale of a probit. A prediction is right if its terms have a positive sum.
SPREAD, ATTRIBUTE_SPREAD = 0.06, 0.06  # between configurations, in all attributes together and in each
HARD_FOR_ALL, HARD_FOR_ONE, CHURN = 0.98, 0.15, 0.12  # of images; the squares add up to 1
SEED, ATTRIBUTE_SEED = 0.005, 0.01  # a seed's effect on all attributes together and on each
SHARED_SEED = 0.012  # a seed's effect on all configurations
LEARNED, SHARED_LEARNED = 0.007, 0.012  # the effect of the images learned from, on one and on all
ADDED_UP = 0.7  # the part of these variances that is a sum over images: who shares them shares it


class SimulatedStudy:
    """Configurations with known true scores, and noisy runs of them.

    A part of what training images do is the sum of what each block does. So trainings are alike in as
    far as they share blocks.
    """

    def __init__(self, random: np.random.Generator, spread: float, blocks: int) -> None:
        self._random = random
        self.labels = np.concatenate([_labels(random) for _ in range(blocks)])
        base = norm.ppf(np.clip(random.normal(0.6, 0.15, len(COUNTS)), 0.2, 0.9))
        # A few are bad, many are close to the best.
        overall = -random.exponential(spread * SPREAD, (TRIALS, 1))
        levels = base + overall + random.normal(0, spread * ATTRIBUTE_SPREAD, (TRIALS, len(COUNTS)))
        self._levels = levels
        effects = [
            random.normal(0, LEARNED, (TRIALS, BLOCKS)) + random.normal(0, SHARED_LEARNED, BLOCKS)
            for _ in range(2)
        ]
        of_block = effects[0] * math.sqrt(ADDED_UP / (BLOCKS - 1))
        # By the block that is left out.
        self._learned = of_block.sum(1, keepdims=True) - of_block + effects[1] * math.sqrt(1 - ADDED_UP)
        # The images' noise has variance 1, so a level's true accuracy has a closed form.
        seeds = SEED**2 + ATTRIBUTE_SEED**2 + SHARED_SEED**2
        learned = LEARNED**2 + SHARED_LEARNED**2
        self.truth_elsewhere = norm.cdf(levels / math.sqrt(1 + seeds + learned)).mean(1)
        # Of trainings with these images: all but the first block, or each block left out once.
        here = self._learned[:, :blocks].mean(1)
        self.truth = norm.cdf((levels + here[:, np.newaxis]) / math.sqrt(1 + seeds)).mean(1)
        self._hard = random.normal(0, HARD_FOR_ALL, self.labels.shape)
        self._drawn: dict[tuple[int, ...], np.ndarray] = {}

    def _fixed(self, scale: float, shape: tuple[int, ...], *of: int) -> np.ndarray:
        """Noise that is drawn once for what it is of."""
        if of not in self._drawn:
            self._drawn[of] = self._random.normal(0, scale, shape)
        return self._drawn[of]

    def run(self, trial: int, seed: int, block: int = 0) -> np.ndarray:
        """Train a configuration on all blocks but one. Returns its hits on that one."""
        images = slice(block * IMAGES, (block + 1) * IMAGES)
        # What a seed does to one configuration it does on all folds, as they begin with the same head.
        levels = self._levels[trial] + self._learned[trial, block]
        levels = levels + self._fixed(SHARED_SEED, (1,), 0, seed, block)
        levels += self._fixed(SEED, (1,), 1, trial, seed)
        levels += self._fixed(ATTRIBUTE_SEED, (len(COUNTS),), 2, trial, seed)
        noise = self._random.normal(0, CHURN, (IMAGES, len(SIZES)))
        noise += self._fixed(HARD_FOR_ONE, noise.shape, 3, trial, block)
        attributes = self.labels[images] + np.cumsum([0, *SIZES[:-1]])
        return (levels[attributes] + self._hard[images] + noise > 0).astype(float)


def _labels(random: np.random.Generator) -> np.ndarray:
    columns, start = [], 0
    for size in SIZES:
        columns.append(random.permutation(np.repeat(np.arange(size), COUNTS[start : start + size])))
        start += size
    return np.stack(columns, 1)


def confirm(
    random: np.random.Generator, spread: float, n_folds: int, seeds: int
) -> dict[str, float | list[bool]]:
    """Do one search and its confirmation, and compare them with the truth."""
    blocks = n_folds or 1
    study = SimulatedStudy(random, spread, blocks)
    searched = [study.run(trial, 0) for trial in range(TRIALS)]
    searched_labels = study.labels[:IMAGES]
    searched_scores = np.array([per_class_accuracy(run, searched_labels, SIZES) for run in searched])
    top = np.argsort(-searched_scores)[:TOP]
    truth, elsewhere = study.truth[top], study.truth_elsewhere[top]
    folds = np.repeat(np.arange(n_folds), IMAGES) if n_folds else None
    runs: list[dict[Any, np.ndarray]] = [{} for _ in top]
    alive, spent = set(range(TOP)), 0
    for number in range(seeds * blocks):
        if number >= LEAST_RERUNS:
            interim = compare(runs, study.labels, SIZES, folds)
            alive = {index for index in alive if interim[index].best >= DROPPED}
        seed, block = 1 + number, number % blocks  # of each rerun, so that folds do not share its luck
        for index in sorted(alive):
            runs[index][(block, seed) if n_folds else seed] = study.run(top[index], seed, block)
            spent += 1
    estimates = compare(runs, study.labels, SIZES, folds)
    means = np.array([estimate.score.value for estimate in estimates])
    leader = int(means.argmax())
    others = [i for i in range(TOP) if i != leader]
    won = estimates[leader].best >= WINS and min(COUNTS) * blocks >= WINNING_IMAGES
    errors = means - truth
    spreads = [
        np.std([per_class_accuracy(run, study.labels, SIZES) for run in by_seed.values()], ddof=1)
        for by_seed in runs
        if not n_folds and len(by_seed) > 1
    ]
    named = min(range(TOP), key=lambda i: estimates[i].within)
    flips = seed_flips(runs, study.labels, SIZES, folds)
    # The folds repeat the luck with the images of one block of them.
    luck = selection_bias(searched, searched_labels, SIZES, flips) / blocks
    return {
        "score covered": [
            _holds(estimate.score, true_score)
            for estimate, true_score in zip(estimates, truth, strict=True)
        ],
        "difference covered": [_holds(estimates[i].behind, truth[leader] - truth[i]) for i in others],
        "winner declared": won,
        "within holds": bool(truth.max() - truth[named] <= estimates[named].within),
        "within": estimates[named].within,
        "distance of the named one": truth.max() - truth[named],
        "exported at least as good as the naive one": truth[named] >= truth[0],
        "gain of the exported one": truth[named] - truth[0],
        "declared winner at least as good": truth[leader] >= truth[0] if won else math.nan,
        "declared winner is the best": truth[leader] == truth.max() if won else math.nan,
        "score covered, other training images": [
            _holds(estimate.score, true_score)
            for estimate, true_score in zip(estimates, elsewhere, strict=True)
        ],
        "difference covered, other training images": [
            _holds(estimates[i].behind, elsewhere[leader] - elsewhere[i]) for i in others
        ],
        "within holds, other training images": bool(
            elsewhere.max() - elsewhere[named] <= estimates[named].within
        ),
        "declared winner is the best, other training images": (
            elsewhere[leader] == elsewhere.max() if won else math.nan
        ),
        "leader at least as good": truth[leader] >= truth[0],
        "leader's gain": truth[leader] - truth[0],
        "optimism": searched_scores[top[0]] - truth[0],
        "reported optimism": searched_scores[top[0]] - means[0] + luck,
        "of it by the images": luck,
        "error of a score": float(abs(errors).mean()),
        "error of a difference": float(abs(errors[leader] - np.delete(errors, leader)).mean()),
        "spread over seeds": float(np.mean(spreads)) if spreads else math.nan,
        "reruns spent": spent / (TOP * seeds * blocks),
    }


def _holds(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument(
        "--spread", type=float, default=1.0, help="of the configurations, as a multiple of the real one"
    )
    parser.add_argument(
        "--folds", type=int, default=0, help="of all images; 0 for the validation images alone"
    )
    parser.add_argument(
        "--seeds", type=int, help=f"of each candidate on each image; {SEEDS}, or 1 with folds"
    )
    options = parser.parse_args()
    random = np.random.default_rng(0)
    seeds = options.seeds or (1 if options.folds else SEEDS)
    results = [confirm(random, options.spread, options.folds, seeds) for _ in range(options.studies)]
    means = {key: _mean([result[key] for result in results]) for key in results[0]}
    for name, (mean, error) in means.items():
        print(f"{name:<50}{mean:8.4f} +- {error:.4f}")
    median = float(np.median([result["within"] for result in results]))
    print(f"{'median of within':<50}{median:8.4f}")
    ratio = means["reported optimism"][0] / means["optimism"][0]
    print(f"{'reported / true optimism':<50}{ratio:8.4f}")
    print(
        json.dumps(
            {name: mean for name, (mean, _) in means.items()}
            | {"optimism ratio": ratio, "median of within": median}
        )
    )


def _mean(values: Sequence[float | list[bool]]) -> tuple[float, float]:
    """Mean and standard error over studies."""
    by_study = np.array([np.mean(value) for value in values])
    by_study = by_study[~np.isnan(by_study)]  # some studies have no such value
    if not len(by_study):
        return math.nan, math.nan
    return float(by_study.mean()), float(by_study.std(ddof=1) / math.sqrt(len(by_study)))


if __name__ == "__main__":
    main()

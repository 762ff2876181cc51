"""How far the intervals and the winner of `atelier confirm` can be trusted: studies with known truth.

    python -m benchmarks.confirmation [--studies 400] [--spread 1]

Each simulated study has TRIALS configurations with known true scores. Its validation set has the class
counts of FashionDataset. Its noise is as large as on real runs (docs/confirm.md):

- Images are hard for every network, or for one.
- Seeds shift a network's accuracies.
- Predictions of images change from seed to seed.

The search trains each configuration once. The five that look best are confirmed on five fresh seeds, by
the code that `atelier confirm` runs.
"""

import argparse
import json
import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import norm

from search.confirm.evidence import DROPPED, LEAST_RERUNS, WINS
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
# On the scale of a probit. A prediction is right if its terms have a positive sum.
SPREAD, ATTRIBUTE_SPREAD = 0.06, 0.06  # between configurations, in all attributes together and in each
HARD_FOR_ALL, HARD_FOR_ONE, CHURN = 0.98, 0.15, 0.12  # of images; the squares add up to 1
SEED, ATTRIBUTE_SEED = 0.005, 0.01  # a seed's effect on all attributes together and on each
SHARED_SEED = 0.012  # a seed's effect on all configurations


class SimulatedStudy:
    """Configurations with known true scores, and noisy runs of them."""

    def __init__(self, random: np.random.Generator, spread: float) -> None:
        self._random = random
        self.labels = _labels(random)
        self._attributes = self.labels + np.cumsum([0, *SIZES[:-1]])
        base = norm.ppf(np.clip(random.normal(0.6, 0.15, len(COUNTS)), 0.2, 0.9))
        # A few are bad, many are close to the best.
        overall = -random.exponential(spread * SPREAD, (TRIALS, 1))
        self._levels = (
            base + overall + random.normal(0, spread * ATTRIBUTE_SPREAD, (TRIALS, len(COUNTS)))
        )
        # The images' noise has variance 1, so a level's true accuracy has a closed form.
        seeds = SEED**2 + ATTRIBUTE_SEED**2 + SHARED_SEED**2
        self.truth = norm.cdf(self._levels / math.sqrt(1 + seeds)).mean(1)
        shape = self.labels.shape
        self._hard = random.normal(0, HARD_FOR_ALL, shape)
        self._hard_for = random.normal(0, HARD_FOR_ONE, (TRIALS, *shape))
        self._shared = random.normal(0, SHARED_SEED, SEEDS + 1)

    def run(self, trial: int, seed: int) -> np.ndarray:
        """Train a configuration with a seed. Returns its hits [images, categories]."""
        random = self._random
        shift = self._shared[seed] + random.normal(0, SEED)
        levels = self._levels[trial] + shift + random.normal(0, ATTRIBUTE_SEED, len(COUNTS))
        flips = random.normal(0, CHURN, self.labels.shape)
        levels = levels[self._attributes]
        return (levels + self._hard + self._hard_for[trial] + flips > 0).astype(float)


def _labels(random: np.random.Generator) -> np.ndarray:
    columns, start = [], 0
    for size in SIZES:
        columns.append(random.permutation(np.repeat(np.arange(size), COUNTS[start : start + size])))
        start += size
    return np.stack(columns, 1)


def confirm(study: SimulatedStudy, random: np.random.Generator) -> dict[str, float | list[bool]]:
    """Do one search and its confirmation, and compare them with the truth."""
    searched = [study.run(trial, 0) for trial in range(TRIALS)]
    searched_scores = np.array([per_class_accuracy(run, study.labels, SIZES) for run in searched])
    top = np.argsort(-searched_scores)[:TOP]
    truth = study.truth[top]
    runs: list[dict[int, np.ndarray]] = [{} for _ in top]
    alive = set(range(TOP))
    for seed in range(1, SEEDS + 1):
        if seed > LEAST_RERUNS:
            interim = compare(runs, study.labels, SIZES)
            alive = {index for index in alive if interim[index].best >= DROPPED}
        for index in sorted(alive):
            runs[index][seed] = study.run(top[index], seed)
    estimates = compare(runs, study.labels, SIZES)
    means = np.array([estimate.score.value for estimate in estimates])
    leader = int(means.argmax())
    others = [i for i in range(TOP) if i != leader]
    won = estimates[leader].best >= WINS
    errors = means - truth
    spreads = [
        np.std([per_class_accuracy(run, study.labels, SIZES) for run in by_seed.values()], ddof=1)
        for by_seed in runs
    ]
    named = min(range(TOP), key=lambda i: estimates[i].within)
    flips = seed_flips(runs, study.labels, SIZES)
    luck = selection_bias(searched, study.labels, SIZES, flips)
    return {
        "score covered": [
            _holds(estimate.score, true_score)
            for estimate, true_score in zip(estimates, truth, strict=True)
        ],
        "difference covered": [_holds(estimates[i].behind, truth[leader] - truth[i]) for i in others],
        "winner declared": won,
        "within holds": bool(truth.max() - truth[named] <= estimates[named].within),
        "within": estimates[named].within,
        "exported at least as good as the naive one": truth[named] >= truth[0],
        "gain of the exported one": truth[named] - truth[0],
        "declared winner at least as good": truth[leader] >= truth[0] if won else math.nan,
        "leader at least as good": truth[leader] >= truth[0],
        "leader's gain": truth[leader] - truth[0],
        "optimism": searched_scores[top[0]] - truth[0],
        "reported optimism": searched_scores[top[0]] - means[0] + luck,
        "of it by the images": luck,
        "error of a score": float(abs(errors).mean()),
        "error of a difference": float(abs(errors[leader] - np.delete(errors, leader)).mean()),
        "spread over seeds": float(np.mean(spreads)),
        "seeds spent": sum(map(len, runs)) / (TOP * SEEDS),
    }


def _holds(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument(
        "--spread", type=float, default=1.0, help="of the configurations, as a multiple of the real one"
    )
    options = parser.parse_args()
    random = np.random.default_rng(0)
    results = [confirm(SimulatedStudy(random, options.spread), random) for _ in range(options.studies)]
    means = {key: _mean([result[key] for result in results]) for key in results[0]}
    for name, (mean, error) in means.items():
        print(f"{name:<42}{mean:8.4f} +- {error:.4f}")
    ratio = means["reported optimism"][0] / means["optimism"][0]
    print(f"{'reported / true optimism':<42}{ratio:8.4f}")
    print(json.dumps({name: mean for name, (mean, _) in means.items()} | {"optimism ratio": ratio}))


def _mean(values: Sequence[float | list[bool]]) -> tuple[float, float]:
    """Mean and standard error over studies."""
    by_study = np.array([np.mean(value) for value in values])
    by_study = by_study[~np.isnan(by_study)]  # some studies have no such value
    if not len(by_study):
        return math.nan, math.nan
    return float(by_study.mean()), float(by_study.std(ddof=1) / math.sqrt(len(by_study)))


if __name__ == "__main__":
    main()

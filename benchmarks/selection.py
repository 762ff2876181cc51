"""Which score picks the configuration that does best, and what confirmation adds, on unseen images.

    python -m benchmarks.selection STUDY... [--draws 400]

Each STUDY is a search by random sampling without a pruner, whose trials were rerun on fresh seeds, as
benchmarks/selection.toml says.

So no decision has seen a validation image, and the images can be cut into halves, by image and alike in
their attributes, as often as one likes. One half plays the validation set: some trials are searched and
the leaders confirmed on it. The other half, with the fresh seeds, is the truth.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import sqlalchemy as sa
from scipy.stats import spearmanr

from search.confirm.evidence import attribute_sizes, predictions_of
from search.confirm.intervals import attribute_index, class_means, compare, hits, per_class_accuracy
from search.confirm.plan import SUFFIX, TOP
from search.score import KINDS, epoch_value, score
from storage import database
from storage.status import read_status
from storage.studies import StudyEntry, study_entry
from trainer.predictions import Predictions


@dataclass(frozen=True)
class Trial:
    """A trial of a search, and its reruns on fresh seeds."""

    searched: Predictions
    reruns: list[Predictions]


def read_trials(engine: sa.Engine, name: str) -> tuple[StudyEntry, list[Trial]]:
    """A search's record, and its complete trials that were rerun."""
    reruns: dict[int, list[Predictions]] = defaultdict(list)
    found = {}
    for study in (name, name + SUFFIX):
        entry = study_entry(engine, study)
        if entry is None:
            raise SystemExit(f"no study {study!r} in the database")
        found[study] = entry
    again = found[name + SUFFIX]
    for row in read_status(engine, again.study_id, again.name).completed():
        reruns[row.params["candidate"]].append(predictions_of(again, row.number))
    search = found[name]
    return search, [Trial(predictions_of(search, n), some) for n, some in reruns.items()]


def half(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A mask of half the images: of two that are alike in their attributes, one."""
    order = random.permutation(len(labels))
    # Rare attributes first, so that they are shared out evenly.
    counts = [np.bincount(column)[column] for column in labels.T]
    rarest = np.min(counts, 0)
    order = order[np.lexsort([*labels[order].T, np.argmin(counts, 0)[order], rarest[order]])]
    mask = np.zeros(len(labels), dtype=bool)
    pairs = len(labels) // 2
    mask[order[np.arange(pairs) * 2 + random.integers(0, 2, pairs)]] = True
    return mask


class Half:
    """The scores that trials would have had, had only some images been there."""

    def __init__(self, entry: StudyEntry, labels: np.ndarray, mask: np.ndarray) -> None:
        self.sizes, self.mask, self.labels = attribute_sizes(entry), mask, labels[mask]
        self._attributes = attribute_index(self.labels, self.sizes)
        images = np.bincount(self._attributes.ravel(), minlength=sum(self.sizes))
        self._table = [row | {"images": int(n)} for row, n in zip(entry.attributes, images, strict=True)]
        self._images = images

    def metric(self, predictions: Predictions) -> float:
        """Average per-class accuracy, the mean of the last five epochs."""
        return per_class_accuracy(hits(predictions)[self.mask], self.labels, self.sizes)

    def scores(self, predictions: Predictions) -> dict[str, float]:
        """Every kind of score."""
        epochs = [
            self._epoch(classes[self.mask], log_probs[self.mask])
            for classes, log_probs in zip(predictions.classes, predictions.log_probs, strict=True)
        ]
        return {
            kind: score([epoch_value(epoch, kind, self._table) for epoch in epochs], kind)
            for kind in KINDS
        }

    def _epoch(self, classes: np.ndarray, log_probs: np.ndarray) -> Any:
        n = sum(self.sizes)
        means = class_means((classes == self.labels).astype(float), self._attributes, n)
        losses = -class_means(log_probs.astype(float), self._attributes, n)
        return SimpleNamespace(
            val_accuracy=float(np.nanmean(means)),
            val_hits=np.nan_to_num(means * self._images),
            val_log_loss=float(np.nanmean(losses)),
        )


def measure(
    trials: list[Trial], entry: StudyEntry, mask: np.ndarray
) -> tuple[dict[str, tuple[float, float, float]], dict[str, tuple[float, float]]]:
    """One search on the images of the mask, judged by the others.

    Returns by kind of score its pick's true score, how far that is behind the best one, and the rank
    correlation of score and truth; and by kind of estimate what it says of its trial and the truth.
    """
    labels = trials[0].searched.labels
    seen, unseen = Half(entry, labels, mask), Half(entry, labels, ~mask)
    truth = np.array([np.mean([unseen.metric(run) for run in trial.reruns]) for trial in trials])
    scores = [seen.scores(trial.searched) for trial in trials]
    picks = {}
    for kind in KINDS:
        values = np.array([row[kind] for row in scores])
        pick = truth[values.argmax()]
        picks[kind] = (pick, truth.max() - pick, float(spearmanr(values, truth).statistic))
    values = np.array([row["mean-last-5"] for row in scores])
    top = np.argsort(-values)[:TOP]
    known = compare(
        [dict(enumerate(hits(run)[mask] for run in trials[i].reruns)) for i in top],
        seen.labels,
        seen.sizes,
    )
    leader = max(range(len(known)), key=lambda i: known[i].score.value)
    return picks, {
        "naive: the search's maximum": (values[top[0]], truth[top[0]]),
        "the same trial, confirmed": (known[0].score.value, truth[top[0]]),
        "the leader, confirmed": (known[leader].score.value, truth[top[leader]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("study", nargs="+")
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--trials", type=int, default=40, help="of each draw's search")
    options = parser.parse_args()
    engine = database.connect()
    entries, trials = [], []
    for name in options.study:
        entry, some = read_trials(engine, name)
        entries.append(entry)
        trials += some
    if len({entry.dataset for entry in entries}) > 1:
        raise SystemExit("the studies are of different datasets")
    random = np.random.default_rng(0)
    results = []
    for _ in range(options.draws):
        chosen = random.choice(len(trials), min(options.trials, len(trials)), replace=False)
        mask = half(trials[0].searched.labels, random)
        results.append(measure([trials[i] for i in chosen], entries[0], mask))
    print(
        f"{len(trials)} trials; {options.draws} draws of {options.trials} and half the images; percent"
    )
    print(f"{'score':<28}{'its pick':>9}{'behind':>9}{'rank correlation':>18}")
    for kind in KINDS:
        pick, behind, correlation = np.mean([picks[kind] for picks, _ in results], 0)
        print(f"{kind:<28}{100 * pick:9.2f}{100 * behind:9.2f}{correlation:18.3f}")
    print(f"{'estimate':<28}{'said':>9}{'true':>9}{'too high by':>18}")
    for name in results[0][1]:
        said, true = np.mean([estimates[name] for _, estimates in results], 0)
        print(f"{name:<28}{100 * said:9.2f}{100 * true:9.2f}{100 * (said - true):18.2f}")


if __name__ == "__main__":
    main()

"""Which score picks the configuration that does best, and what confirmation adds, on unseen images.

    python -m benchmarks.selection STUDY [--halves 200]

STUDY is a search by random sampling without a pruner, all of whose trials were rerun on fresh seeds:

    atelier search STUDY.toml
    atelier confirm STUDY --top TRIALS --seeds 2

So no decision has seen a validation image, and the images can be cut into halves, by image and alike in
their attributes, as often as one likes. One half plays the validation set: scores are taken, leaders
confirmed on it. The other half, with the fresh seeds, is the truth.
"""

import argparse
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from dashboards.status import read_status
from search.bootstrap import attribute_index, class_means, compare, hits, per_class_accuracy
from search.confirmation import SUFFIX, TOP, attribute_sizes
from search.score import KINDS, epoch_value, score
from storage import database
from storage.ledger import StudyEntry, study_entry
from storage.runs import RunFolder
from trainer.predictions import Predictions


def complete(engine: Any, name: str) -> tuple[StudyEntry, dict[int, Any], dict[int, Predictions]]:
    """A study's entry, complete trials and their predictions, by number."""
    entry = study_entry(engine, name)
    if entry is None:
        raise SystemExit(f"no study {name!r} in the database")
    rows = read_status(engine, entry.study_id, name).trials
    folder = RunFolder(entry.name, entry.created)
    trials = {row.number: row for row in rows if row.state == "complete"}
    return entry, trials, {n: Predictions.load(folder.predictions(n)) for n in trials}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--halves", type=int, default=200)
    options = parser.parse_args()
    engine = database.connect()
    entry, trials, searched = complete(engine, options.study)
    _, again, rerun = complete(engine, options.study + SUFFIX)
    seeds = defaultdict(list)
    for number, row in again.items():
        seeds[row.params["candidate"]].append(rerun[number])
    numbers = [number for number in trials if number in seeds]
    labels = searched[numbers[0]].labels
    random = np.random.default_rng(0)
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    estimates: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(options.halves):
        mask = half(labels, random)
        seen, unseen = Half(entry, labels, mask), Half(entry, labels, ~mask)
        truth = np.array([np.mean([unseen.metric(run) for run in seeds[n]]) for n in numbers])
        scores = [seen.scores(searched[n]) for n in numbers]
        for kind in KINDS:
            values = np.array([row[kind] for row in scores])
            pick = truth[values.argmax()]
            found[kind].append((pick, truth.max() - pick, float(spearmanr(values, truth).statistic)))
        values = np.array([row["mean-last-5"] for row in scores])
        top = np.argsort(-values)[:TOP]
        runs = [[hits(run)[mask] for run in seeds[numbers[i]]] for i in top]
        known = compare(runs, seen.labels, seen.sizes)
        leader = top[known.leader]
        estimates["naive"].append((values[top[0]], truth[top[0]]))
        estimates["confirmed"].append((known.scores[known.leader].value, truth[leader]))
        estimates["confirmed, the naive winner"].append((known.scores[0].value, truth[top[0]]))
    print(f"{len(numbers)} configurations, {options.halves} halves; percent")
    print(f"{'score':<28}{'its pick':>9}{'behind':>9}{'+-':>6}{'rank correlation':>18}")
    for kind, rows in found.items():
        pick, behind, correlation = np.mean(rows, 0)
        error = np.std([row[1] for row in rows]) / np.sqrt(options.halves)
        print(f"{kind:<28}{100 * pick:9.2f}{100 * behind:9.2f}{100 * error:6.2f}{correlation:18.3f}")
    print(f"{'estimate':<28}{'said':>9}{'true':>9}{'too high by':>13}")
    for name, pairs in estimates.items():
        said, true = np.mean(pairs, 0)
        print(f"{name:<28}{100 * said:9.2f}{100 * true:9.2f}{100 * (said - true):13.2f}")


if __name__ == "__main__":
    main()

"""Which score picks the configuration that does best on unseen images, and what confirmation adds.

    python -m benchmarks.selection STUDY... [--draws 400]

Each STUDY is a search by random sampling without a pruner. Its trials were rerun on fresh seeds, as
benchmarks/selection.toml says.

So no decision has seen a validation image. The images are cut into two halves with similar attributes,
differently in each draw. The first half is the validation set: some trials are searched and the leaders
confirmed on it. The other half, with the fresh seeds, is the truth.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import sqlalchemy as sa
from scipy.stats import spearmanr

from dashboards.predictions import attribute_sizes, predictions_of
from search.confirm.intervals import attribute_index, class_means, compare, hits, per_class_accuracy
from search.confirm.plan import SUFFIX, TOP
from search.score import KINDS, epoch_value, score
from storage import database
from storage.status import read_status
from storage.studies import StudyEntry, study_entry
from trainer.predictions import Predictions


@dataclass(frozen=True)
class Trial:
    """The predictions of a trial of a search, and of its reruns on fresh seeds."""

    searched: Predictions
    reruns: list[Predictions]


def read_trials(engine: sa.Engine, name: str) -> tuple[StudyEntry, list[Trial]]:
    """A search's record, and its trials that were rerun to the end."""
    reruns: dict[int, list[Predictions]] = defaultdict(list)
    entries = {}
    for study in (name, name + SUFFIX):
        entry = study_entry(engine, study)
        if entry is None:
            raise SystemExit(f"no study {study!r} in the database")
        entries[study] = entry
    rerun_study = entries[name + SUFFIX]
    for row in read_status(engine, rerun_study.study_id, rerun_study.name).completed():
        reruns[row.params["candidate"]].append(predictions_of(rerun_study, row.number))
    search = entries[name]
    return search, [Trial(predictions_of(search, number), runs) for number, runs in reruns.items()]


def half(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A mask of half the images. It has one of each pair with similar attributes."""
    order = random.permutation(len(labels))
    # Rare attributes come first, so that both halves get the same number.
    counts = [np.bincount(column)[column] for column in labels.T]
    rarest = np.min(counts, 0)
    order = order[np.lexsort([*labels[order].T, np.argmin(counts, 0)[order], rarest[order]])]
    mask = np.zeros(len(labels), dtype=bool)
    pairs = len(labels) // 2
    mask[order[np.arange(pairs) * 2 + random.integers(0, 2, pairs)]] = True
    return mask


class Half:
    """The scores that trials would have had with only some of the validation images."""

    def __init__(self, entry: StudyEntry, labels: np.ndarray, mask: np.ndarray) -> None:
        self.sizes, self.mask, self.labels = attribute_sizes(entry), mask, labels[mask]
        self._attributes = attribute_index(self.labels, self.sizes)
        images = np.bincount(self._attributes.ravel(), minlength=sum(self.sizes))
        self._table = [row | {"images": int(n)} for row, n in zip(entry.attributes, images, strict=True)]
        self._images = images

    def metric(self, predictions: Predictions) -> float:
        """Average per-class accuracy, as a mean over the last five epochs."""
        return per_class_accuracy(hits(predictions)[self.mask], self.labels, self.sizes)

    def scores(self, predictions: Predictions) -> dict[str, float]:
        """The trial's score of every kind."""
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
    """Do one search on the images of the mask, and judge it by the other images.

    First returns three numbers for each kind of score: the true score of its pick, how far that is
    behind the best, and the rank correlation of score and truth. Then returns two numbers for each kind
    of estimate: the estimate for a trial, and the truth.
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
    confirmed = compare(
        [dict(enumerate(hits(run)[mask] for run in trials[i].reruns)) for i in top],
        seen.labels,
        seen.sizes,
    )
    leader = max(range(len(confirmed)), key=lambda i: confirmed[i].score.value)
    return picks, {
        "naive: the search's maximum": (values[top[0]], truth[top[0]]),
        "the same trial, confirmed": (confirmed[0].score.value, truth[top[0]]),
        "the leader, confirmed": (confirmed[leader].score.value, truth[top[leader]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("study", nargs="+")
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--trials", type=int, default=40, help="that the search of each draw has")
    options = parser.parse_args()
    engine = database.connect()
    entries, trials = [], []
    for name in options.study:
        entry, study_trials = read_trials(engine, name)
        entries.append(entry)
        trials += study_trials
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

"""Rules of a study's files: predictions and checkpoints, and what may be left when it has ended."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from search.verify.evidence import Evidence, Found
from storage.outcome import Outcome
from trainer.predictions import Predictions

CHECKPOINT = re.compile(
    r"attempt-(\d+)-(?:epoch-(\d+)-step-\d+\.pt(?:\.sha256|\.damaged)?|predictions-\d+-(\d+)\.npz)"
)


class Checkpoint(NamedTuple):
    """A file of a checkpoint, by its name."""

    trial: int
    attempt: int
    epochs: int  # that the run had finished
    path: Path


def _checkpoints(evidence: Evidence) -> Iterator[Checkpoint]:
    for path in sorted(evidence.runs.path.glob("trial-*/attempt-*")):
        folder, name = re.fullmatch(r"trial-(\d+)", path.parent.name), CHECKPOINT.fullmatch(path.name)
        if folder and name:
            epochs = int(name[2]) if name[2] else int(name[3]) + 1
            yield Checkpoint(int(folder[1]), int(name[1]), epochs, path)


def predictions_are_of_the_epochs_on_record(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        if trial.outcome != Outcome.COMPLETE or any(row.val_hits is None for row in trial.epochs):
            continue
        try:
            predictions = Predictions.load(evidence.runs.predictions(trial.number))
        except FileNotFoundError:  # `atelier db prune` keeps those of the best only
            continue
        except ValueError as error:
            yield trial.number, f"has damaged predictions: {error}"
            continue
        right = (predictions.classes == predictions.labels).sum((1, 2))
        recorded = [sum(row.val_hits) for row in trial.epochs]
        # An epoch that was trained again elsewhere may have other predictions than its record.
        differs = [
            row.again is None and one != other
            for row, one, other in zip(trial.epochs, right, recorded, strict=False)
        ]
        if len(right) != len(recorded) or any(differs):
            yield trial.number, "has the predictions of another run"


def a_complete_trial_has_its_predictions(evidence: Evidence) -> Found:
    for trial in evidence.trials:
        path = evidence.runs.predictions(trial.number)
        if trial.outcome == Outcome.COMPLETE and not path.exists():
            yield trial.number, f"has no predictions in {path}"


def a_checkpoint_is_of_an_attempt_on_record(evidence: Evidence) -> Found:
    """So are its epochs: it is written after their record."""
    trials = {trial.number: trial for trial in evidence.trials}
    for number, attempt, epochs, path in _checkpoints(evidence):
        trial = trials.get(number)
        if trial is None:
            yield None, f"has {path}, and no trial {number}"
        elif not 0 < attempt <= max((row.number for row in trial.attempts), default=0):
            yield number, f"has {path}, which no attempt on record wrote"
        elif epochs > len(trial.epochs):
            yield number, f"has {path}, of epochs that are not on record"


def an_older_checkpoint_is_whole(evidence: Evidence) -> Found:
    """The newest one may be damaged: then it is set aside when its trial goes on."""
    unfinished = {trial.number for trial in evidence.trials if trial.is_unfinished}
    whole: dict[int, list[Path]] = {}
    for one in _checkpoints(evidence):
        if one.path.suffix == ".sha256" and one.trial in unfinished:
            whole.setdefault(one.trial, []).append(one.path)
    for number, digests in whole.items():
        for digest in digests[:-1]:
            path = digest.with_suffix("")
            try:
                stated, data = digest.read_bytes().split()[:1], path.read_bytes()
            except FileNotFoundError:  # it has just been replaced by a newer one
                continue
            if stated != [hashlib.sha256(data).hexdigest().encode()]:
                yield number, f"has {path}, which is damaged"


def nothing_is_left(evidence: Evidence) -> Found:
    """Checkpoints of trials that ended, and predictions of none."""
    for one in _checkpoints(evidence):
        yield one.trial, f"has ended and left {one.path}"
    wanted = {evidence.runs.predictions(trial.number) for trial in evidence.trials}
    for path in sorted(evidence.runs.predictions(0).parent.glob("trial-*")):
        if path not in wanted:
            yield None, f"has {path}, which belongs to no trial"

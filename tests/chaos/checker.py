"""What must hold when a study has ended, whatever happened on the way.

Read from the tables as they lie in PostgreSQL and from the files, not through the code that wrote them;
only the training, which gives the reference of each curve, is the project's own.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from search.replay import Replayed
from search.score import score
from search.study_config import StudyConfig
from storage.outcome import RESTORED
from storage.paths import RunFolder, artifacts, image_cache
from storage.ranks import REDUCTION_FACTOR
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.metrics import EpochResult
from trainer.predictions import Predictions
from trainer.workspace import Workspace

ENDS = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


@dataclass
class Trial:
    """One trial with all that is on record of it."""

    trial_id: int  # Optuna's
    number: int
    state: str
    params: dict[str, Any] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    told: list[tuple[int, float]] = field(default_factory=list)  # Optuna's intermediate values
    attempts: list[Any] = field(default_factory=list)
    epochs: list[Any] = field(default_factory=list)


@dataclass
class Evidence:
    """A study that has ended."""

    file: StudyConfig
    max_trials: int
    trials: list[Trial]
    workers: list[Any]
    runs: RunFolder


class Reference:
    """A run of one configuration, trained as far as it is asked for."""

    def __init__(self, config: TrainConfig, workspace: Workspace, stream: list[int]) -> None:
        self._epochs = train(config, workspace, stream_epochs=stream)
        self._results: list[EpochResult] = []
        # After those that are given, it goes on through the next ones.
        beyond = range(stream[-1] + 1 if stream else 0, sys.maxsize)
        self._stream = [*stream, *beyond[: config.epochs]][: config.epochs]

    def begins_with(self, stream: list[int]) -> bool:
        """Whether it goes through these epochs of the stream first."""
        return self._stream[: len(stream)] == stream

    def first(self, epochs: int) -> list[EpochResult]:
        """So many, or all that there are."""
        self._results += itertools.islice(self._epochs, max(epochs - len(self._results), 0))
        return self._results[:epochs]


class References:
    """What each configuration learns, alone and undisturbed, through given epochs of the stream.

    `cache` is the folder for prepared images; that of the home, if unset, which must then stay.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache
        self._workspaces: dict[str, Workspace] = {}
        self._known: dict[str, list[Reference]] = {}

    def curve(self, file: StudyConfig, trial: Trial) -> list[EpochResult]:
        """As many epochs as are on record, if a run has so many."""
        config = file.config(trial.params)
        stream = [row.stream_epoch for row in trial.epochs]
        known = self._known.setdefault(config.model_dump_json(), [])
        reference = next((one for one in known if one.begins_with(stream)), None)
        if reference is None:
            reference = Reference(config, self._workspace(file), stream)
            known.append(reference)
        return reference.first(len(stream))

    def _workspace(self, file: StudyConfig) -> Workspace:
        key = file.shared.model_dump_json()
        if key not in self._workspaces:
            self._workspaces[key] = Workspace(file.shared, self._cache or image_cache())
        return self._workspaces[key]


def gather(connection: sa.Connection, file: StudyConfig) -> Evidence:
    """Read a study from the database, whatever constraints its tables have or have lost."""

    def rows(query: str) -> list[Any]:
        return list(connection.execute(sa.text(query), {"name": file.study.name}))

    study = "(SELECT study_id FROM public.studies WHERE study_name = :name)"
    own = f"WHERE trial_id IN (SELECT trial_id FROM public.trials WHERE study_id = {study})"
    trials = {
        row.trial_id: Trial(row.trial_id, row.number, row.state)
        for row in rows(f"SELECT * FROM public.trials WHERE study_id = {study} ORDER BY number")
    }
    space = file.distributions()
    for row in rows(f"SELECT * FROM public.trial_params {own}"):
        value = space[row.param_name].to_external_repr(row.param_value)
        trials[row.trial_id].params[row.param_name] = value
    for row in rows(f"SELECT * FROM public.trial_values {own}"):
        trials[row.trial_id].values.append(row.value)
    for row in rows(f"SELECT * FROM public.trial_intermediate_values {own} ORDER BY step"):
        trials[row.trial_id].told.append((row.step, row.intermediate_value))
    for row in rows(f"SELECT * FROM atelier.attempt {own} ORDER BY number"):
        trials[row.trial_id].attempts.append(row)
    for row in rows(f"SELECT * FROM atelier.epoch {own} ORDER BY epoch"):
        trials[row.trial_id].epochs.append(row)
    [entry] = rows(f"SELECT * FROM atelier.study WHERE study_id = {study}")
    runs = RunFolder(file.study.name, entry.created)
    workers = rows("SELECT * FROM atelier.worker")
    return Evidence(file, entry.max_trials, list(trials.values()), workers, runs)


def the_budget_is_kept(evidence: Evidence, _: References) -> Iterator[str]:
    numbers = [trial.number for trial in evidence.trials]
    if numbers != list(range(evidence.max_trials)):
        yield f"{evidence.max_trials} trials were allowed, there are {numbers}"


def every_trial_has_ended_well(evidence: Evidence, _: References) -> Iterator[str]:
    for trial in evidence.trials:
        if trial.state not in ("COMPLETE", "PRUNED"):
            reasons = [row.reason for row in trial.attempts if row.outcome in ("error", "failed")]
            yield f"trial {trial.number} is {trial.state}: {reasons}"
        elif len(trial.values) != 1:
            yield f"trial {trial.number} has the values {trial.values}"


def nobody_held_what_another_held(evidence: Evidence, _: References) -> Iterator[str]:
    for trial in evidence.trials:
        if [row.number for row in trial.attempts] != list(range(1, len(trial.attempts) + 1)):
            yield f"trial {trial.number} has the attempts {[row.number for row in trial.attempts]}"
        for row in trial.attempts:
            if row.released is None:
                yield f"trial {trial.number} is still held, by attempt {row.number}"
        for one, other in zip(trial.attempts, trial.attempts[1:], strict=False):
            if one.released is None or other.claimed < one.released:
                yield f"trial {trial.number}: attempt {other.number} began before {one.number} had ended"
            if (
                one.outcome == "lost"
                and other.claimed < one.lease_until
                and not _was_seen(evidence, one, other)
            ):
                yield f"trial {trial.number}: {other.number} did not wait for the lease of {one.number}"


def _was_seen(evidence: Evidence, one: Any, other: Any) -> bool:
    """Whether somebody on its machine could see that the holder had ended, before the other claim.

    That need not be who claimed: the one who saw it may have withdrawn a claim of its own.
    """
    if one.reason == RESTORED:
        return True
    processes = {worker.id: worker.process for worker in evidence.workers}
    machine, _, _ = processes[one.worker_id].rsplit(":", 2)  # pid and start follow
    return any(
        worker.process.startswith(machine + ":")
        and worker.id != one.worker_id
        and worker.started <= other.claimed
        for worker in evidence.workers
    )


def each_attempt_ended_once(evidence: Evidence, _: References) -> Iterator[str]:
    for trial in evidence.trials:
        outcomes = [row.outcome for row in trial.attempts]
        if outcomes[-1:] != [ENDS.get(trial.state)] or set(outcomes[:-1]) & set(ENDS.values()):
            yield f"trial {trial.number} is {trial.state}, its attempts {outcomes}"


def each_epoch_is_on_record_once(evidence: Evidence, _: References) -> Iterator[str]:
    wanted = evidence.file.epochs
    for trial in evidence.trials:
        numbers = [row.epoch for row in trial.epochs]
        if numbers != list(range(len(numbers))):
            yield f"trial {trial.number} has the epochs {numbers}"
        if trial.state == "COMPLETE" and len(numbers) != wanted:
            yield f"trial {trial.number} is complete after {len(numbers)} of {wanted} epochs"
        attempts = [row.attempt for row in trial.epochs]
        if attempts != sorted(attempts) or not set(attempts) <= {row.number for row in trial.attempts}:
            yield f"trial {trial.number} has epochs of the attempts {attempts}"


def optuna_was_told_the_same(evidence: Evidence, _: References) -> Iterator[str]:
    for trial in evidence.trials:
        known = [(row.epoch, row.value) for row in trial.epochs]
        if trial.told != known:
            yield f"trial {trial.number}: Optuna has {trial.told}, the epochs say {known}"
        values = [value for _, value in known]
        if trial.state == "COMPLETE" and trial.values != [score(values, evidence.file.study.score)]:
            yield f"trial {trial.number} has the score {trial.values}, its epochs {values}"


def the_best_at_each_rung_went_on(evidence: Evidence, _: References) -> Iterator[str]:
    """Of a search whose trials wait at rungs: none that belongs to the best third waited to the end."""
    if evidence.file.study.strategy != "promote":
        return
    for rung in evidence.file.rungs():
        been = [trial for trial in evidence.trials if len(trial.epochs) > rung]
        for trial in been:
            better = sum(one.epochs[rung].value > trial.epochs[rung].value for one in been)
            if len(trial.epochs) == rung + 1 and better < len(been) // REDUCTION_FACTOR:
                yield f"trial {trial.number} waits at epoch {rung}, {better} of {len(been)} are better"


def each_curve_is_that_of_an_undisturbed_run(evidence: Evidence, known: References) -> Iterator[str]:
    for trial in evidence.trials:
        for row, result in zip(trial.epochs, known.curve(evidence.file, trial), strict=False):
            if differing := Replayed(row._mapping, result).differing:
                yield f"trial {trial.number}, epoch {row.epoch}: {', '.join(differing)} differ"


def each_complete_trial_has_its_predictions(evidence: Evidence, _: References) -> Iterator[str]:
    for trial in evidence.trials:
        if trial.state == "COMPLETE":
            path = evidence.runs.predictions(trial.number)
            try:
                predictions = Predictions.load(path)
            except (OSError, ValueError) as error:
                yield f"trial {trial.number} has no predictions: {error}"
                continue
            right = (predictions.classes == predictions.labels).sum((1, 2))
            if [*right] != [sum(row.val_hits) for row in trial.epochs]:
                yield f"trial {trial.number} has the predictions of another run"


def nothing_is_left_on_disk(evidence: Evidence, _: References) -> Iterator[str]:
    for folder in (evidence.runs.path, artifacts(), image_cache()):
        for path in sorted(folder.rglob("*")):
            if path.name.startswith(".") or path.suffix == ".damaged" or path.match("trial-*/*.pt*"):
                yield f"{path.relative_to(folder.parent)} is left"
    wanted = {evidence.runs.predictions(trial.number).name for trial in evidence.trials}
    for path in sorted(evidence.runs.predictions(0).parent.glob("*")):
        if path.name not in wanted:
            yield f"{path.name} belongs to no trial"


RULES = (
    the_budget_is_kept,
    every_trial_has_ended_well,
    nobody_held_what_another_held,
    each_attempt_ended_once,
    each_epoch_is_on_record_once,
    optuna_was_told_the_same,
    the_best_at_each_rung_went_on,
    each_curve_is_that_of_an_undisturbed_run,
    each_complete_trial_has_its_predictions,
    nothing_is_left_on_disk,
)


def violations(evidence: Evidence, references: References) -> list[str]:
    """What does not hold; empty if all is well."""
    return [f"{rule.__name__}: {found}" for rule in RULES for found in rule(evidence, references)]

"""What to try next: Optuna's samplers, told where to begin, and shown what unfinished trials promise."""

import copy
import math
import warnings
import zlib
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import takewhile
from statistics import fmean
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, QMCSampler
from optuna.trial import FrozenTrial, TrialState

STARTUP_TRIALS = 10

# In a worker's log it would say nothing to anybody.
warnings.filterwarnings("ignore", "QMCSampler is experimental", ExperimentalWarning)


class StartupSampler(BaseSampler):
    """Begins with the given points and a Sobol sequence, then asks another sampler.

    Trial n gets the n-th point, whichever worker claims it. The sequence is the study's own: it is
    scrambled by the study's name.
    """

    def __init__(
        self,
        space: Mapping[str, BaseDistribution],
        inner: BaseSampler,
        first: Sequence[Mapping[str, Any]] = (),
        startup: float = STARTUP_TRIALS,
    ) -> None:
        """`first` are parameters, not always all of them; `startup` counts them too."""
        self._space, self._inner, self.first = dict(space), inner, first
        self._startup = max(startup, len(first))

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All of the space, in every trial."""
        return self._space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if trial.number < self._startup:
            point = dict(next(iter(self.first[trial.number : trial.number + 1]), {}))
            if search_space.keys() <= point.keys():
                return point  # without the sequence, for which scipy would be imported
            sequence = _Sequence(trial.number, seed=zlib.crc32(study.study_name.encode()))
            return sequence.sample_relative(study, trial, search_space) | point
        return whole_sample(self._inner, study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)


def whole_sample(
    sampler: BaseSampler,
    study: optuna.Study,
    trial: FrozenTrial,
    search_space: Mapping[str, BaseDistribution],
) -> dict[str, Any]:
    """All parameters at once: what the sampler leaves out of its relative ones, independently."""
    known = sampler.infer_relative_search_space(study, trial)
    params = sampler.sample_relative(study, trial, known)
    for name in search_space.keys() - params.keys():
        params[name] = sampler.sample_independent(study, trial, name, search_space[name])
    return params


class _Sequence(QMCSampler):
    """One point of a scrambled Sobol sequence, by its number.

    Optuna's own counts the points in the study's attributes, where two workers may get the same.
    """

    def __init__(self, number: int, seed: int) -> None:
        super().__init__(scramble=True, seed=seed)
        self._number = number

    def _find_sample_id(self, study: optuna.Study, search_space: object) -> int:
        return self._number


class ImputedStudy(optuna.Study):
    """A study as its sampler sees it: a trial that has passed a rung counts as complete.

    Its score is the one that it promises: its value at the last rung that it has passed, and from there
    the mean gain of those that went further, rung by rung. Most trials of a good search never end, and
    Optuna's samplers learn from complete trials alone (gp), or rank the others last (tpe).
    """

    def __init__(
        self,
        study_name: str,
        storage: optuna.storages.BaseStorage,
        sampler: BaseSampler,
        rungs: Sequence[int],
    ) -> None:
        super().__init__(study_name, storage, sampler)
        self._rungs = rungs

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        trials = promising(self._storage.get_all_trials(self._study_id, deepcopy=False), self._rungs)
        return [trial for trial in trials if states is None or trial.state in states]


def promising(trials: Sequence[FrozenTrial], rungs: Sequence[int]) -> list[FrozenTrial]:
    """The trials; those that have passed a rung, and did not complete, with the score they promise."""
    marks = [_marks(trial, rungs) for trial in trials]
    gains = [_mean_gain(marks, step) for step in range(len(rungs))]
    return [
        _complete(trial, reached[-1] + sum(gains[len(reached) - 1 :]))
        if reached and not _has_score(trial)
        else trial
        for trial, reached in zip(trials, marks, strict=True)
    ]


def _marks(trial: FrozenTrial, rungs: Sequence[int]) -> list[float]:
    """The values at the rungs that it has passed, while they are numbers; and its score if complete."""
    values = (trial.intermediate_values.get(rung, math.nan) for rung in rungs)
    marks = [*takewhile(math.isfinite, values)]
    if trial.state == TrialState.COMPLETE and len(marks) == len(rungs):
        marks.append(trial.values[0])
    return marks


def _mean_gain(marks: Iterable[Sequence[float]], step: int) -> float:
    gains = [one[step + 1] - one[step] for one in marks if len(one) > step + 1]
    return fmean(gains) if gains else 0.0


def _has_score(trial: FrozenTrial) -> bool:
    """Complete, failed, or ended by something else than its value: out of memory, a loss not finite."""
    if trial.state in (TrialState.RUNNING, TrialState.PRUNED) and trial.intermediate_values:
        last = trial.intermediate_values[max(trial.intermediate_values)]
        return trial.values is not None and trial.values != [last]
    return True


def _complete(trial: FrozenTrial, score: float) -> FrozenTrial:
    seen = copy.copy(trial)
    seen.state, seen.values = TrialState.COMPLETE, [score]
    return seen

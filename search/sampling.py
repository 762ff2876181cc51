"""What to try next: Optuna's samplers, told where to begin and shown what unfinished trials promise."""

import copy
import math
import warnings
import zlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import takewhile
from statistics import fmean
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from search.study_config import Plan, Spec, StudyConfig, WholeRange

STARTUP_TRIALS = 10

# The warning would help nobody who reads a worker's log.
warnings.filterwarnings("ignore", "QMCSampler is experimental", ExperimentalWarning)


def distributions(config: StudyConfig) -> dict[str, BaseDistribution]:
    """A study's parameters as Optuna's distributions."""

    def distribution(spec: Spec) -> BaseDistribution:
        if isinstance(spec, list):
            return CategoricalDistribution(spec)
        if isinstance(spec, WholeRange):
            return IntDistribution(int(spec.low), int(spec.high))
        return FloatDistribution(spec.low, spec.high, log=spec.log)

    return {name: distribution(spec) for name, spec in config.parameters().items()}


def make_sampler(config: StudyConfig, first: Sequence[Mapping[str, Any]]) -> BaseSampler:
    """The study's sampler. It begins with the parameters `first`, unless all trials are planned."""
    if config.plan is not None:
        return PlannedSampler(config.plan)
    # Without seeds: workers with the same seed would try the same trials.
    makers: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: TPESampler(n_startup_trials=1),
        "gp": lambda: GPSampler(n_startup_trials=1),
        "random": RandomSampler,
        "qmc": RandomSampler,  # never asked
    }
    startup = {"random": 0, "qmc": math.inf}.get(config.study.sampler, STARTUP_TRIALS)
    inner = makers[config.study.sampler]()
    return StartupSampler(distributions(config), inner, first, startup)


class PlannedSampler(BaseSampler):
    """Samples nothing: each trial's parameters follow from its number."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._plan(trial.number)[param_name]


class StartupSampler(BaseSampler):
    """Begins with the given points, goes on with a Sobol sequence, then asks another sampler.

    Trial n gets the n-th point, whichever worker claims it. Each study has another sequence, which is
    scrambled by the study's name.
    """

    def __init__(
        self,
        space: Mapping[str, BaseDistribution],
        inner: BaseSampler,
        first: Sequence[Mapping[str, Any]] = (),
        startup: float = STARTUP_TRIALS,
    ) -> None:
        """`first` are the given points; the sequence fills in parameters that they lack.

        The other sampler begins after `startup` trials, which include the given points.
        """
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
        if trial.number >= self._startup:
            return whole_sample(self._inner, study, trial, search_space)
        given = dict(self.first[trial.number]) if trial.number < len(self.first) else {}
        if search_space.keys() <= given.keys():
            return given  # without the sequence, for which scipy would be imported
        sequence = _SobolPoint(trial.number, seed=zlib.crc32(study.study_name.encode()))
        return sequence.sample_relative(study, trial, search_space) | given

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
    """All parameters at once. What the sampler does not sample together, it samples independently."""
    together = sampler.infer_relative_search_space(study, trial)
    params = sampler.sample_relative(study, trial, together)
    for name in search_space.keys() - params.keys():
        params[name] = sampler.sample_independent(study, trial, name, search_space[name])
    return params


class _SobolPoint(QMCSampler):
    """One point of a scrambled Sobol sequence, by its number.

    Optuna's own sampler counts the points in the study's attributes. Two workers may get the same one.
    """

    def __init__(self, number: int, seed: int) -> None:
        super().__init__(scramble=True, seed=seed)
        self._number = number

    def _find_sample_id(self, study: optuna.Study, search_space: object) -> int:
        return self._number


class ImputedStudy(optuna.Study):
    """A study as its sampler sees it: a trial that has reached a rung counts as complete.

    Most trials of a good search never complete. Optuna's samplers learn from complete trials alone (gp),
    or rank the others last (tpe). `imputed` says with which score such a trial is shown.
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
        """What samplers call to learn of the other trials."""
        trials = imputed(self._storage.get_all_trials(self._study_id, deepcopy=False), self._rungs)
        return [trial for trial in trials if states is None or trial.state in states]


def imputed(trials: Sequence[FrozenTrial], rungs: Sequence[int]) -> list[FrozenTrial]:
    """The trials; those that have reached a rung but did not complete are shown as complete.

    These include trials that were paused or pruned at a rung, but none that ended for another reason.
    Such a trial gets its value at the last rung that it has reached. To this is added, rung by rung,
    what the trials that went further have gained on average from there to their score.
    """
    marks = [_marks(trial, rungs) for trial in trials]
    gains = [_mean_gain(marks, step) for step in range(len(rungs))]
    shown = []
    for trial, reached in zip(trials, marks, strict=True):
        if reached and _may_be_imputed(trial):
            promised = reached[-1] + sum(gains[len(reached) - 1 :])
            shown.append(_as_complete(trial, promised))
        else:
            shown.append(trial)
    return shown


def _marks(trial: FrozenTrial, rungs: Sequence[int]) -> list[float]:
    """Its values at the rungs, up to the first that it lacks; then its score, if it is complete."""
    values = (trial.intermediate_values.get(rung, math.nan) for rung in rungs)
    marks = [*takewhile(math.isfinite, values)]
    if trial.state == TrialState.COMPLETE and len(marks) == len(rungs):
        marks.append(trial.values[0])
    return marks


def _mean_gain(marks: Iterable[Sequence[float]], step: int) -> float:
    """By how much trials have gained on average between this mark and the next."""
    gains = [reached[step + 1] - reached[step] for reached in marks if len(reached) > step + 1]
    return fmean(gains) if gains else 0.0


def _may_be_imputed(trial: FrozenTrial) -> bool:
    """Whether it runs, waits, or was pruned for its value.

    A trial that ended for another reason, out of memory or with a loss that is not finite, has another
    score than the value of its last epoch.
    """
    if trial.state not in (TrialState.RUNNING, TrialState.PRUNED) or not trial.intermediate_values:
        return False
    last = trial.intermediate_values[max(trial.intermediate_values)]
    return trial.values is None or trial.values == [last]


def _as_complete(trial: FrozenTrial, score: float) -> FrozenTrial:
    """A copy, so that what Optuna has on record stays."""
    shown = copy.copy(trial)
    shown.state, shown.values = TrialState.COMPLETE, [score]
    return shown

"""What users do in the middle of a search, each as an actor of its own; and what is still true then."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import optuna
import sqlalchemy as sa
from optuna.trial import TrialState

from search.sampling import distributions
from search.verify.ends import the_budget_of_gpu_hours_is_kept, the_budget_of_trials_is_used_up
from search.verify.evidence import Evidence
from search.verify.rules import UNDISTURBED, Finding, Holds, rules_for, violations
from storage import database, studies
from storage.optuna_storage import DATABASE_ERRORS, with_engine
from storage.outcome import Outcome
from storage.tables import STUDIES
from tests.simulation.scheduler import Actor

if TYPE_CHECKING:
    from tests.simulation.faults import Fault
    from tests.simulation.simulation import Simulation

# These count the trials that a user has changed too.
OF_ALL_TRIALS = (the_budget_of_trials_is_used_up, the_budget_of_gpu_hours_is_kept)
# What a user is told: of the database, of a study or trial that is gone, of a trial that has ended.
ERRORS = (*DATABASE_ERRORS, optuna.exceptions.OptunaError, KeyError, ValueError)
ENDS = (TrialState.FAIL, TrialState.PRUNED, TrialState.COMPLETE)
ADDED = "added"  # the user attribute of trials that were trained elsewhere
MORE_SECONDS = 100.0  # by which a user raises the GPU-hours
# Parameters to enqueue that the study does not have.
FOREIGN = ({"lr": 0.5, "batch_size": 32}, {"lr": 0.01, "batch_size": 48}, {"momentum": 0.9})

Action = Callable[["Account"], None]


class Users:
    """What the users of a simulation have done."""

    def __init__(self, sim: "Simulation") -> None:
        self._sim = sim
        self.at_work = 0
        self.deletions = 0
        self.touched: set[int] = set()  # trials that a user may have ended, by Optuna's ids
        self.told: dict[int, tuple[str, list[float]]] = {}  # their ends, once they are surely so

    def log_in(self, fault: "Fault", action: Action, then: Action | None = None) -> bool:
        """Let a user do something, and afterwards something that must succeed.

        Half of the time nobody else goes on until it is done, sleeps or waits.
        """
        self.at_work += 1

        def live() -> None:
            account = Account(self._sim, fault)
            account.attempt(action)
            while then is not None and not account.attempt(then):
                self._sim.scheduler.sleep(10)
            self.at_work -= 1

        user = self._sim.scheduler.spawn(self._sim.site, f"user {fault}", live)
        if fault.at % 2:  # the same however the faults are shrunk
            self._sim.scheduler.hurried = user
        return True

    def forget(self) -> None:
        """Forget trials that the database does not have, since others may get their ids."""
        present = {number for (number,) in self._sim.database.ask("SELECT trial_id FROM public.trials")}
        self.touched &= present
        self.told = {number: end for number, end in self.told.items() if number in present}

    def violations(self, evidence: Evidence) -> list[str]:
        """What must hold of a study that has ended, whatever users have done to it."""
        enqueued, added = self._enqueued(), self._added()
        changed = self.touched | enqueued.keys() | added
        numbers = {trial.number for trial in evidence.trials if trial.trial_id in changed}

        if not changed and not self.deletions:
            return [f"{one.rule}: {one}" for one in violations(evidence, UNDISTURBED, self._sim.curve)]
        found = violations(evidence, Holds.ENDED, self._sim.curve)
        own = replace(evidence, trials=[one for one in evidence.trials if one.number not in numbers])
        for rule in rules_for(evidence, UNDISTURBED):
            if rule.holds is UNDISTURBED:
                judged = _without_surplus(evidence, added) if rule.check in OF_ALL_TRIALS else own
                found += [Finding(rule.name, number, text, "") for number, text in rule.check(judged)]
        words = self._broken_words(evidence, enqueued)
        return [*(f"{one.rule}: {one}" for one in found), *words]

    def _enqueued(self) -> dict[int, dict[str, Any]]:
        """The parameters of trials that were enqueued, by Optuna's ids."""
        rows = self._sim.database.ask(
            "SELECT trial_id, value_json FROM public.trial_system_attributes WHERE key = 'fixed_params'"
        )
        return {trial_id: json.loads(value) for trial_id, value in rows}

    def _added(self) -> set[int]:
        """The trials that were trained elsewhere, by Optuna's ids. They use up the budget too."""
        rows = self._sim.database.ask(
            "SELECT trial_id FROM public.trial_user_attributes WHERE key = %s", ADDED
        )
        return {trial_id for (trial_id,) in rows}

    def _broken_words(self, evidence: Evidence, enqueued: dict[int, dict[str, Any]]) -> Iterator[str]:
        """Where a user did not get what the user asked for."""
        has_hours = evidence.max_gpu_seconds is not None
        for trial in evidence.trials:
            if trial.state == "WAITING":
                continue
            told, given = self.told.get(trial.trial_id), enqueued.get(trial.trial_id)
            if told is not None and told != (trial.state, trial.values):
                yield f"users: trial {trial.number} was told {told}, is {trial.state} {trial.values}"
            was_cut = has_hours and trial.state == "PRUNED" and trial.outcome != Outcome.PRUNED
            if given is None or trial.trial_id in self.touched or (was_cut and not trial.epochs):
                continue  # spent GPU-hours may end a trial before it has its parameters
            if self._sim.config.foreign(given) is not None:
                if trial.state != "FAIL":
                    yield f"users: trial {trial.number} is {trial.state} with the foreign {given}"
            elif not given.items() <= trial.params.items():
                yield f"users: trial {trial.number} has {trial.params}, enqueued was {given}"


def _without_surplus(evidence: Evidence, added: set[int]) -> Evidence:
    """Without added trials beyond the budget: nobody asks whether there is a place for them.

    As many trials that workers have begun too many go unseen.
    """
    begun = [trial for trial in evidence.trials if trial.state != "WAITING"]
    surplus = max(len(begun) - evidence.entry.max_trials, 0)
    left_out = sorted(added)[:surplus]
    return replace(
        evidence, trials=[trial for trial in evidence.trials if trial.trial_id not in left_out]
    )


class Account:
    """A user's session."""

    def __init__(self, sim: "Simulation", fault: "Fault") -> None:
        self.sim, self._fault = sim, fault
        self.engine: sa.Engine
        self.storage: Any

    def attempt(self, action: Action) -> bool:
        """Do something with the database. Returns whether there was no error."""
        try:
            with self._logged_in():
                action(self)
        except ERRORS as error:
            self.sim.history.add("user", self._fault, type(error).__name__)
            return False
        return True

    @contextmanager
    def _logged_in(self) -> Iterator[None]:
        self.storage, self.engine = with_engine(sa.make_url(self.sim.url), database.WORK)
        try:
            yield
        finally:
            self.storage._backend.scoped_session.remove()
            self.engine.dispose()

    def hit(self) -> None:
        """To be called when an action has taken effect."""
        self._fault.hits = True
        self.sim.history.add("user", self._fault, "done")

    @property
    def study(self) -> optuna.Study:
        return optuna.load_study(study_name=self.sim.config.study.name, storage=self.storage)


def act(sim: "Simulation", actor: Actor, fault: "Fault", chance: random.Random) -> bool:
    """How a user's fault is delivered: see tests/simulation/faults.py."""
    [action] = chance.choices([tell, stop, enqueue, add, delete], [10, 10, 10, 4, 2])
    return action(sim, actor, fault, chance)


def tell(sim: "Simulation", actor: Actor, fault: "Fault", chance: random.Random) -> bool:
    """A user ends a trial that a worker holds, as `Study.tell` or optuna-dashboard does."""
    held = actor.process.held()
    if not held:
        return False
    claim, state, by_number = chance.choice(held), chance.choice(ENDS), chance.random() < 0.5
    values = [round(chance.uniform(0, 2), 3)] if state == TrialState.COMPLETE else None

    def end(account: Account) -> None:
        sim.users.touched.add(claim.trial_id)
        if by_number:
            values_told = account.study.tell(claim.trial_number, values, state).values
        elif account.storage.set_trial_state_values(claim.trial_id, state, values):
            values_told = values
        else:
            return
        sim.users.told[claim.trial_id] = state.name, list(values_told or [])
        account.hit()

    return sim.users.log_in(fault, end)


def stop(sim: "Simulation", actor: Actor, fault: "Fault", chance: random.Random) -> bool:
    """A user stops the study, and takes that back after a while."""
    seconds = chance.uniform(10, 300)

    def ask(account: Account) -> None:
        studies.request_stop(account.engine, account.study._study_id)
        account.hit()
        sim.scheduler.sleep(seconds)

    def take_back(account: Account) -> None:
        entry = studies.study_entry(account.engine, sim.config.study.name)
        if entry is not None:
            studies.update_study(account.engine, entry.study_id, stop_requested=None)

    return sim.users.log_in(fault, ask, take_back)


def enqueue(sim: "Simulation", actor: Actor, fault: "Fault", chance: random.Random) -> bool:
    """A user enqueues a trial, sometimes one that the study cannot have, and may raise the budgets."""
    params: dict[str, Any] = {"lr": 10 ** chance.uniform(-4, -1), "batch_size": chance.choice([32, 64])}
    if chance.random() < 0.3:
        params = chance.choice(FOREIGN)
    elif chance.random() < 0.3:
        del params["lr"]
    allows_more = chance.random() < 0.5

    def add(account: Account) -> None:
        study = account.study
        study.enqueue_trial(params)
        account.hit()
        entry = studies.study_entry(account.engine, sim.config.study.name)
        if allows_more and entry is not None:
            more = {
                "max_trials": entry.max_trials + 1,
                "max_gpu_seconds": STUDIES.c.max_gpu_seconds + MORE_SECONDS,  # none stays none
            }
            studies.update_study(account.engine, entry.study_id, **more)

    return sim.users.log_in(fault, add)


def add(sim: "Simulation", actor: Actor, fault: "Fault", chance: random.Random) -> bool:
    """A user adds a trial that was trained elsewhere."""
    trial = optuna.trial.create_trial(
        params={"lr": 10 ** chance.uniform(-4, -1), "batch_size": chance.choice([32, 64])},
        distributions=distributions(sim.config),
        value=chance.uniform(0, 2),
        user_attrs={ADDED: True},
    )

    def put(account: Account) -> None:
        account.study.add_trial(trial)
        account.hit()

    return sim.users.log_in(fault, put)


def delete(sim: "Simulation", actor: Actor, fault: "Fault", chance: random.Random) -> bool:
    """A user deletes the study while workers hold its trials."""

    def remove(account: Account) -> None:
        account.storage.delete_study(account.study._study_id)
        sim.users.deletions += 1
        account.hit()

    return sim.users.log_in(fault, remove)

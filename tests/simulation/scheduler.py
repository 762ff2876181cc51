"""Runs actors one at a time. A seed says who goes next, at every boundary.

An actor is a thread of a simulated process, as a greenlet. At a boundary it gives up its turn. The
scheduler goes on with any actor that can. If none can, the time moves on to where the next one wakes.
"""

import math
import random
from collections.abc import Callable
from typing import Any, cast

from greenlet import getcurrent, greenlet

BEGINNING = 1_900_000_000.0  # when a simulation begins, in seconds since 1970
LONGEST, MOST_TURNS = 4e5, 200_000  # seconds, or turns, after which a simulation counts as endless


class EndlessError(Exception):
    """Nobody can go on, or a simulation lasts too long."""


class Actor(greenlet):
    """A thread of a simulated process."""

    def __init__(self, hub: greenlet, process: Any, name: str, function: Callable[[], object]) -> None:
        super().__init__(self._live, hub)
        self.process, self.name, self._function = process, name, function
        self.connection: Any = None  # while it runs a statement
        self.statement = ""
        self.subject = "start"  # what it is about to do
        self.due = -math.inf  # when it goes on at the latest
        self.is_ready: Callable[[], bool] | None = None  # what it waits for
        self.is_deaf = False  # whether no signal reaches it: it waits in C code
        self.signals: list[Callable[[], object]] = []  # handlers to run before it goes on

    def _live(self) -> None:
        self.hear()
        self._function()

    def hear(self) -> None:
        """Run the handlers of signals that have come."""
        while self.signals:
            self.signals.pop(0)()

    def can_go_on(self, now: float) -> bool:
        if self.process.paused_until > now:
            return False
        if self.due <= now or (self.signals and not self.is_deaf):
            return True
        return self.is_ready is not None and self.is_ready()

    def wakes(self) -> float:
        """When it goes on if nobody wakes it before."""
        return math.inf if self.due == math.inf else max(self.due, self.process.paused_until)


def current() -> Actor | None:
    """The actor whose turn it is. None outside of the simulation."""
    this = getcurrent()
    return this if isinstance(this, Actor) else None


class Scheduler:
    """The actors, the time, and the order in which they take turns."""

    def __init__(self, seed: int) -> None:
        self._hub = getcurrent()
        self._random = random.Random(f"order {seed}")
        # The chance that an actor goes on at once. With 0 they change at nearly every boundary.
        self._stickiness = self._random.choice([0.0, 0.5, 0.8, 0.95])
        self.actors: list[Actor] = []
        self._gone: list[Actor] = []  # kept, so that Python does not run their `finally` blocks
        self.hurried: Actor | None = None  # takes all turns as long as it can
        self._errand: Callable[[], object] | None = None
        self.now = BEGINNING
        self.before_turn: Callable[[Actor], None] = lambda _: None
        # What happens as time passes, beside the actors: when next, and what does it.
        self.next_event: Callable[[], float] = lambda: math.inf
        self.on_event: Callable[[], None] = lambda: None

    def spawn(self, process: Any, name: str, function: Callable[[], object]) -> Actor:
        """An actor that begins when its turn comes."""
        actor = Actor(self._hub, process, name, function)
        self.actors.append(actor)
        return actor

    def park(self, actor: Actor) -> None:
        """Let an actor run not another line."""
        self.actors.remove(actor)
        self._gone.append(actor)

    def run(self, is_over: Callable[[], bool]) -> None:
        """Give turns until it is over. Raises EndlessError."""
        last: Actor | None = None
        turns = 0
        while not is_over():
            if (turns := turns + 1) > MOST_TURNS:
                raise EndlessError("it does not end")
            goes_on = last in self.actors and last.can_go_on(self.now)
            if self.hurried in self.actors and self.hurried.can_go_on(self.now):
                last = self.hurried
            elif not goes_on or self._random.random() >= self._stickiness:
                ready = [actor for actor in self.actors if actor.can_go_on(self.now)]
                if not ready:
                    self._move_on()
                    continue
                last = self._random.choice(ready)
            assert last is not None
            self.before_turn(last)
            if last in self.actors and last.can_go_on(self.now):
                last.is_ready, last.due = None, -math.inf
                last.switch()
                if last.dead and last in self.actors:
                    self.actors.remove(last)
            if self._errand is not None:
                errand, self._errand = self._errand, None
                errand()

    def _move_on(self) -> None:
        times = [actor.wakes() for actor in self.actors]
        times += [actor.process.paused_until for actor in self.actors]  # it may be ready by then
        due = min((time for time in times if time > self.now), default=math.inf)
        event = self.next_event()
        if min(due, event) > BEGINNING + LONGEST:
            raise EndlessError("nobody can go on" if due == math.inf else "it does not end")
        self.now = max(min(due, event), self.now)
        if event <= self.now:
            self.on_event()

    # The rest is for actors.

    def boundary(self, subject: str) -> None:
        """Give up the turn."""
        self._wait(subject, None, -math.inf)

    def outside(self, errand: Callable[[], object]) -> None:
        """Let something be done outside of all actors, before anyone goes on."""
        self._errand = errand
        self.boundary("errand")

    def sleep(self, seconds: float, subject: str = "sleep") -> None:
        """Go on after so many seconds."""
        self.wait_until(subject, lambda: False, seconds)

    def wait_until(
        self, subject: str, is_ready: Callable[[], bool], seconds: float | None, deaf: bool = False
    ) -> bool:
        """Go on when it is ready, or after so many seconds. Returns whether it is ready."""
        due = math.inf if seconds is None else self.now + max(seconds, 0.0)
        while True:
            self._wait(subject, is_ready, due, deaf)
            if is_ready() or due <= self.now:  # else it was a signal
                return is_ready()

    def _wait(
        self, subject: str, is_ready: Callable[[], bool] | None, due: float, deaf: bool = False
    ) -> None:
        actor = cast(Actor, getcurrent())
        actor.subject, actor.is_ready, actor.due, actor.is_deaf = subject, is_ready, due, deaf
        self._hub.switch()
        if not deaf:
            actor.hear()

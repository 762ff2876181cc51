"""Puts Python's threads, locks, clocks, signals and chance under the scheduler, for code in actors.

Outside of actors everything stays as it is. A thread that an actor starts is an actor too.
"""

import concurrent.futures.thread
import os
import queue
import random
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from greenlet import getcurrent
from numpy.random import bit_generator

from tests.simulation.scheduler import Scheduler, current

# A look at the clock is a boundary where one of these packages looks.
WATCHED = ("search", "storage", "trainer", "tenacity")


class _Waiter:
    """Stands for an actor among the waiters of a threading.Condition, which wakes it by `release`."""

    def __init__(self) -> None:
        self.is_woken = False

    def release(self) -> None:
        self.is_woken = True


class _Lock:
    """A lock that actors can wait for: they all run in one thread."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._is_held = scheduler, False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._is_held and blocking:
            seconds = None if timeout < 0 else timeout
            self._scheduler.wait_until("lock", lambda: not self._is_held, seconds)
        got, self._is_held = not self._is_held, True
        return got

    def release(self) -> None:
        self._is_held = False

    def locked(self) -> bool:
        return self._is_held

    def _at_fork_reinit(self) -> None:
        self._is_held = False

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class _Local:
    """Replaces threading.local: each actor has its own attributes."""

    def __init__(self) -> None:
        object.__setattr__(self, "_by_actor", {})

    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__":
            return object.__getattribute__(self, "_by_actor").setdefault(getcurrent(), {})
        try:
            return self.__dict__[name]
        except KeyError:
            return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self.__dict__[name]
        except KeyError:
            raise AttributeError(name) from None


def control(scheduler: Scheduler, seed: int) -> None:
    """Take over for the rest of this process."""
    _threads(scheduler)
    _clocks(scheduler)
    _chance(seed)
    _process()


def _inside(module: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Replace a function where an actor calls it."""
    real = getattr(module, name)

    def call(*arguments: Any, **named: Any) -> Any:
        return (real if current() is None else replacement)(*arguments, **named)

    setattr(module, name, call)


def _threads(scheduler: Scheduler) -> None:
    def start(thread: threading.Thread) -> None:
        actor = current()
        assert actor is not None
        actors[thread] = scheduler.spawn(actor.process, thread.name, thread.run)

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        scheduler.wait_until("join", lambda: actors[thread].dead, timeout)

    def wait(condition: threading.Condition, timeout: float | None = None) -> bool:
        if timeout is not None and timeout <= 0:
            return False
        state: Any = condition
        waiter = _Waiter()
        state._waiters.append(waiter)
        held = state._release_save()
        try:
            is_woken = scheduler.wait_until("wait", lambda: waiter.is_woken, timeout)
        finally:
            state._acquire_restore(held)
        if not is_woken and waiter in state._waiters:
            state._waiters.remove(waiter)
        return is_woken

    actors: dict[threading.Thread, Any] = {}
    _inside(threading.Thread, "start", start)
    _inside(threading.Thread, "join", join)
    _inside(threading.Condition, "wait", wait)
    # Each process has one of these; here an actor that is gone would hold it for all of them.
    concurrent.futures.thread._global_shutdown_lock = nullcontext()
    threading.Lock = lambda: _Lock(scheduler)
    threading.local = _Local
    queue.SimpleQueue = queue._PySimpleQueue  # waits in Python, not in C


def _clocks(scheduler: Scheduler) -> None:
    def look(subject: str, offset: Callable[[], float]) -> Callable[[], float]:
        def clock() -> float:
            module = sys._getframe(2).f_globals.get("__name__", "")
            if module.partition(".")[0] in WATCHED:
                scheduler.boundary(subject)
            return scheduler.now + offset()

        return clock

    _inside(time, "time", look("time of day", lambda: current().process.clock_offset))
    _inside(time, "monotonic", look("clock", lambda: 0.0))
    _inside(time, "perf_counter", look("clock", lambda: 0.0))
    _inside(time, "sleep", scheduler.sleep)


def _chance(seed: int) -> None:
    drawn = random.Random(f"uuids {seed}")
    uuid.uuid4 = lambda: uuid.UUID(int=drawn.getrandbits(128), version=4)
    random.seed(f"chance {seed}")
    bit_generator.randbits = drawn.getrandbits  # what NumPy's generators begin with


def _process() -> None:
    def handle(number: int, handler: Any) -> Any:
        handlers = current().process.handlers
        old, handlers[number] = handlers.get(number, signal.SIG_DFL), handler
        return old

    _inside(os, "getpid", lambda: current().process.pid)
    _inside(socket, "gethostname", lambda: current().process.host)
    _inside(signal, "signal", handle)

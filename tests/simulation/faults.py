"""What may go wrong at a boundary, and how one sees that it has hit.

A fault waits for the first boundary where it can be delivered. It hits if the worker holds a trial then,
or is inside a statement, and if it had an effect: an error was met, a clock was read, a worker was gone.
"""

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from tests.simulation import administrators, users
from tests.simulation.scheduler import Actor

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

LEASE = 120.0


@dataclass
class Fault:
    """A fault for a place's worker, at its n-th boundary or as soon after that as it can be."""

    kind: str
    place: int
    at: int
    hits: bool = False

    @cached_property
    def chance(self) -> random.Random:
        """Where its details are drawn from: the same wherever it is delivered."""
        return random.Random(f"details of {self}")

    @cached_property
    def aim(self) -> str:
        """What a statement has that this fault waits for; most commits are Optuna's."""
        return self.chance.choice(["", "", "WITH", "INSERT INTO atelier.epoch"])

    def __str__(self) -> str:
        return f"{self.kind}@{self.place}.{self.at}"

    @classmethod
    def parse(cls, text: str) -> "Fault":
        kind, _, where = text.partition("@")
        place, _, at = where.partition(".")
        return cls(kind, int(place), int(at))


# Delivers a fault to the actor. Returns whether it could; sets `hits` now or when the effect comes.
Delivery = Callable[["Simulation", Actor, Fault, random.Random], bool]


def is_busy(actor: Actor) -> bool:
    """Whether a fault would hit: its worker holds a trial, or is inside a statement."""
    return bool(actor.process.held()) or actor.connection is not None


def kill(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    fault.hits = True
    sim.machines.kill(actor.process, leaves_work=chance.random() < 0.5)
    return True


def cut(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """The connection is lost before a statement."""
    if not actor.subject.startswith("before"):
        return False
    fault.hits = True
    sim.database.lose(actor.connection)
    sim.database.settle()
    return True


def terminate(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """The server ends all of the worker's connections."""
    own = [one for one in sim.database.connections if one.process is actor.process]
    fault.hits = bool(own)
    sim.database.terminate(own)
    return fault.hits


def lose_answer(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """A commit is done, but the worker never hears of it."""
    if actor.subject != "before commit" or fault.aim not in actor.statement:
        return False
    fault.hits = actor.connection.loses_answer = True
    return True


def restart_server(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    fault.hits = True
    sim.database.crash(chance.choice([0.0, 5.0, 60.0]))
    return True


def make_read_only(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """A failover: all sessions end, and new ones are a standby's for a while."""
    if sim.is_read_only:
        return False
    fault.hits = sim.is_read_only = True
    sim.database.set_read_only(True)
    sim.database.terminate([one for one in sim.database.connections if one.process.place is not None])
    sim.later(chance.uniform(1, 90), sim.end_read_only)
    return True


def pause(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """The worker stands still past its lease, then goes on."""
    fault.hits = True
    actor.process.paused_until = sim.scheduler.now + LEASE + chance.choice([1.0, 30.0, 300.0])
    return True


def set_clock(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """The worker's clock jumps by up to a day. It hits when the worker looks."""
    process, offset = actor.process, chance.uniform(-86400, 86400)
    process.clock_offset = offset

    def look() -> None:
        if process.clock_offset == offset and process.held():
            fault.hits = True

    process.on_look = look
    return True


def damage(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """The newest checkpoint or its digest is spoilt, and the worker killed: now it is needed."""
    if actor.subject != "clock":  # to look for files at each boundary would take long
        return False
    for claim in actor.process.held():
        digest = sim.newest_digest(actor.process.worker.runs, claim.trial_number)
        if digest is not None and digest.with_suffix("").exists():
            fault.hits = True
            sim.machines.kill(actor.process)
            if chance.random() < 0.2:
                sim.disk.spoil(digest, 64)
            else:
                sim.disk.spoil(digest.with_suffix(""))
            return True
    return False


def lose_power(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """All machines stop at once, and files lose what was not synced."""
    lost = sim.disk.lose_power()
    if not lost:
        return False
    fault.hits = True
    for process in sim.machines.processes:
        if not process.is_gone:
            sim.machines.kill(process)
    return True


def fill_disk(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """No room is left for a while. It hits when somebody meets that."""

    def meet() -> None:
        fault.hits = True

    sim.disk.full_until, sim.disk.on_full = sim.scheduler.now + chance.uniform(5, 90), meet
    return True


def _signal(number: int, times: int = 1) -> Delivery:
    def deliver(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
        handler = actor.process.handlers.get(number)
        if actor.name != "main" or not callable(handler) or actor.is_deaf:
            return False
        fault.hits = True
        actor.signals += [lambda: handler(number, None)] * times
        return True

    return deliver


def end_time(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """The wall time is over soon."""
    stop = actor.process.worker and actor.process.worker.stop
    if not stop or stop.requested:
        return False
    fault.hits = True
    stop.deadline = min(
        stop.deadline, sim.scheduler.now + actor.process.clock_offset + chance.uniform(10, 120)
    )
    return True


def run_out_of_memory(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """The next step of a trial in this worker finds no memory."""

    def fail() -> None:
        fault.hits = True
        raise MemoryError("cannot allocate memory")

    actor.process.on_step = fail
    return True


def diverge(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """A trial's loss is not finite, in an epoch that nobody has begun."""
    return sim.let_diverge(actor.process, fault)


def _slurm(trouble: str) -> Delivery:
    def deliver(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
        if not sim.uses_slurm:
            return False

        def meet() -> None:
            fault.hits = True

        slurm = sim.machines.slurm
        slurm.trouble, slurm.on_trouble = trouble, meet
        slurm.trouble_until = sim.scheduler.now + chance.uniform(30, 400)
        return True

    return deliver


KINDS: dict[str, Delivery] = {
    "kill": kill,
    "cut": cut,
    "terminate": terminate,
    "lost-answer": lose_answer,
    "pause": pause,
    "clock": set_clock,
    "damage": damage,
    "power": lose_power,
    "disk-full": fill_disk,
    "sigterm": _signal(signal.SIGTERM),
    "sigusr2": _signal(signal.SIGUSR2),
    "ctrl-c-twice": _signal(signal.SIGINT, times=2),
    "wall-time": end_time,
    "out-of-memory": run_out_of_memory,
    "nan": diverge,
    "read-only": make_read_only,
    "slurm-silent": _slurm("silent"),
    "slurm-wrong": _slurm("wrong"),
    "slurm-strange": _slurm("strange"),
    "user-tells": users.tell,
    "user-stops": users.stop,
    "user-enqueues": users.enqueue,
    "user-deletes": users.delete,
    "restart": restart_server,
    "backup": administrators.back_up,
    "upgrade": administrators.upgrade,
}
# How often, against the others.
WEIGHTS = dict.fromkeys(KINDS, 1.0) | {
    "clock": 3.0,
    "out-of-memory": 3.0,
    "disk-full": 1.5,
    "slurm-silent": 2.0,
    "slurm-wrong": 2.0,
    "slurm-strange": 3.0,
    "restart": 0.1,
    "backup": 0.05,
    "upgrade": 0.05,
    "user-deletes": 0.05,
}


def deliver(sim: "Simulation", actor: Actor, fault: Fault) -> bool:
    """Try to deliver a fault at this boundary. Returns whether it could be."""
    return KINDS[fault.kind](sim, actor, fault, fault.chance)


def draw(seed: int, places: int, each: int) -> list[Fault]:
    """So many faults for each place's worker."""
    chance = random.Random(f"faults {seed}")
    faults = []
    for place in range(places):
        at = 0
        for _ in range(each):
            at += int(chance.expovariate(1 / 25)) + 1
            [kind] = chance.choices([*WEIGHTS], [*WEIGHTS.values()])
            faults.append(Fault(kind, place, at))
    return faults

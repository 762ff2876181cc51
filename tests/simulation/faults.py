"""What may go wrong at a boundary, and how one sees that it has hit.

A fault waits for the first boundary where its worker holds a trial or is inside a statement, and where
it can be delivered. It hits if it has an effect: an error was met, a clock was read, a worker was gone.
"""

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tests.simulation import administrators, users
from tests.simulation.scheduler import Actor

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

LEASE = 120.0
MOST = 100  # faults for a place
BETWEEN = (45, 85, 170)  # boundaries between two of them, on average
AIMS = ("", "WITH", "INSERT INTO", "UPDATE atelier", "DELETE")  # what a lost answer is of
NEAR = (40, 200, 1000)  # boundaries of a successor, in which it begins, has an epoch, ends


@dataclass
class Fault:
    """A fault for a place's worker, at its n-th boundary or as soon after that as it can be."""

    kind: str
    place: int
    at: int
    hits: bool = False

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


def kill_before_checkpoint(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """An epoch is recorded, and its checkpoint is not yet written, or not wholly."""
    return actor.name.startswith("writer") and kill(sim, actor, fault, chance)


def kill_before_record(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """A snapshot is taken, or a decision is due, and the epoch is not yet recorded."""
    return actor.name.startswith("recorder") and kill(sim, actor, fault, chance)


def kill_after_clear(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """A trial has ended, and its folder is just being removed."""

    def later() -> None:
        if not actor.process.is_gone:
            fault.hits = True
            sim.machines.kill(actor.process)

    sim.later(0.0, later)
    return True


def cut(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """The connection is lost before a statement."""
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
    if not actor.connection.last_statement.startswith(chance.choice(AIMS)):
        return False
    fault.hits = actor.connection.loses_answer = True
    return True


def restart_server(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    fault.hits = True
    sim.database.crash(chance.choice([0.0, 5.0, 60.0]))
    return True


def make_read_only(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """A failover: all sessions end, and new ones are a standby's for a while."""
    if sim.database.is_read_only:
        return False
    fault.hits = True
    sim.database.set_read_only(True)
    sim.database.terminate([one for one in sim.database.connections if one.process.place is not None])
    sim.later(chance.uniform(1, 90), lambda: sim.database.set_read_only(False))
    return True


def pause(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """The worker stands still past its lease, then goes on; maybe just as another has its trial."""
    fault.hits = True
    actor.process.paused_until = sim.scheduler.now + LEASE + chance.choice([1.0, 30.0, 300.0])
    if chance.random() < 0.5:
        sim.wake_beside_successor(actor.process, chance.randrange(chance.choice(NEAR)))
    elif chance.random() < 0.5:
        sim.wake_beside_claim(actor.process, chance.randrange(NEAR[0]))
    return True


def set_clock(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """The worker's clock jumps by up to a day, just as it looks."""
    fault.hits = True
    actor.process.clock_offset = chance.uniform(-86400, 86400)
    return True


def damage(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """The newest checkpoint or its digest is spoilt, and the worker killed: now it is needed."""
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
    """No room is left for a while."""
    fault.hits = True
    sim.disk.full_until = sim.scheduler.now + chance.uniform(5, 90)
    return True


def send_signal(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """SLURM's warning, a stop, or Ctrl-C pressed twice."""
    number = chance.choice([signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
    handler = actor.process.handlers.get(number)
    if actor.name != "main" or not callable(handler) or actor.is_deaf:
        return False
    fault.hits = True
    if number == signal.SIGTERM:
        sim.machines.slurm.note_cancel(actor.process)
    actor.process.met.add(number.name)
    actor.signals += [lambda: handler(number, None)] * (2 if number == signal.SIGINT else 1)
    return True


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
    """The step of a trial in this worker finds no memory."""
    fault.hits = actor.process.lacks_memory = True
    return True


def diverge(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """A trial's loss is not finite, in an epoch that nobody has begun."""
    return sim.let_diverge(actor.process, fault)


def confuse_slurm(sim: "Simulation", actor: Actor, fault: Fault, chance: random.Random) -> bool:
    """SLURM does not answer, or something wrong or strange."""
    fault.hits = True
    slurm = sim.machines.slurm
    slurm.trouble = chance.choice(["silent", "hidden", "wrong", "strange line", "strange state"])
    slurm.trouble_until = sim.scheduler.now + chance.uniform(30, 400)
    return True


class Kind(NamedTuple):
    """A kind of faults.

    `weight` is how often it is drawn, against the others. It can be delivered where a boundary's subject
    begins with `where`.
    """

    deliver: Delivery
    weight: float = 0.8
    where: str = ""


KINDS = {
    "kill": Kind(kill),
    "kill-unsaved": Kind(kill_before_checkpoint, 1.0, where="file open"),
    "kill-unrecorded": Kind(kill_before_record, 1.1, where="before"),
    "kill-cleared": Kind(kill_after_clear, 2.8, where="file rmdir"),
    "cut": Kind(cut, where="before"),
    "terminate": Kind(terminate),
    "lost-answer": Kind(lose_answer, 1.0, where="before commit"),
    "pause": Kind(pause),
    "clock": Kind(set_clock, 0.9, where="time of day"),
    "damage": Kind(damage, 1.2, where="clock"),  # to look for files at each boundary would take long
    "power": Kind(lose_power, 1.0, where="file"),
    "disk-full": Kind(fill_disk, 1.3, where="file write"),
    "signal": Kind(send_signal),
    "wall-time": Kind(end_time),
    "out-of-memory": Kind(run_out_of_memory, 1.0, where="step"),
    "nan": Kind(diverge, 1.5, where="step"),
    "read-only": Kind(make_read_only),
    "slurm": Kind(confuse_slurm, 8.0, where="slurm"),
    "user": Kind(users.act, 1.0),
    "restart": Kind(restart_server, 0.04),
    "backup": Kind(administrators.back_up, 0.06),
    "upgrade": Kind(administrators.upgrade, 0.04),
}


def deliver(sim: "Simulation", actor: Actor, fault: Fault) -> bool:
    """Try to deliver a fault at this boundary. Returns whether it could be."""
    kind = KINDS[fault.kind]
    if not actor.subject.startswith(kind.where):
        return False
    # The details are the same wherever it is delivered.
    return kind.deliver(sim, actor, fault, random.Random(f"details of {fault}"))


def draw(seed: int, places: int) -> list[Fault]:
    """Many faults for each place's worker."""
    chance = random.Random(f"faults {seed}")
    boundaries = chance.choice(BETWEEN)
    weights = [kind.weight for kind in KINDS.values()]
    faults = []
    for place in range(places):
        at = 0
        for kind in chance.choices([*KINDS], weights, k=MOST):
            at += int(chance.expovariate(1 / boundaries)) + 1
            faults.append(Fault(kind, place, at))
    return faults

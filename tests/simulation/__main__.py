"""Simulate searches in which much goes wrong, until so many faults have hit.

    python -m tests.simulation --faults 10000 [--first SEED] [--jobs N] [--plant NAME]
    python -m tests.simulation --seed SEED [--only FAULTS] [--plant NAME] [--trace FILE]
    python -m tests.simulation --plants [--faults 100000]

The second form repeats one simulation. A simulation that breaks a rule is shrunk to few faults, and the
command that repeats it is printed. The third form tells how many faults it takes to find each plant, and
how few are left of them.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any

from tests.simulation.faults import draw
from tests.simulation.plants import PLANTS
from tests.simulation.shrink import shrink

FEW = 5  # faults that one can look through
ELSEWHERE = 400  # simulations in which so few are tried
SHORT = 2500  # boundaries that a place comes to in a search with few faults

Task = dict[str, Any]
Answer = dict[str, Any]


class Job:
    """A process that runs simulations."""

    def __init__(self) -> None:
        # Python's hashes, and with them the order of sets, are to be the same each time.
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.simulation.job"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C ends it as its stdin ends, with its server
        )

    def run(self, task: Task) -> Answer:
        """Raises RuntimeError if the simulation itself is at fault."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer: Answer = json.loads(line) if line else {"error": "the job has ended"}
        if "error" in answer:
            raise RuntimeError(f"task {task}: {answer['error']}")
        return answer

    def close(self) -> None:
        self._process.communicate()  # at the end of its input it stops its server


class Pool:
    """Several jobs."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def answers(self, tasks: Iterator[Task]) -> Iterator[Answer]:
        """The answers as they come. Tasks are taken one by one, until nobody asks for answers."""
        done: SimpleQueue[tuple[Job, Any]] = SimpleQueue()

        def work(job: Job, task: Task) -> None:
            try:
                done.put((job, job.run(task)))
            except Exception as error:  # raised again where the answers are read
                done.put((job, error))

        running = 0
        idle = list(self._jobs)
        try:
            while True:
                while idle and (task := next(tasks, None)) is not None:
                    Thread(target=work, args=(idle.pop(), task)).start()
                    running += 1
                if not running:
                    return
                job, answer = done.get()
                running -= 1
                idle.append(job)
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            for _ in range(running):
                done.get()


@contextmanager
def pool(jobs: int) -> Iterator[Pool]:
    """So many jobs, which end with the `with` block."""
    with ExitStack() as stack:
        started = [Job() for _ in range(jobs)]
        for job in started:
            stack.callback(job.close)
        yield Pool(started)


def smallest(jobs: Pool, failed: Answer, plant: str | None) -> Answer:
    """A simulation with as few faults as still break a rule; of another seed, if that takes fewer."""
    small = _shrunk(jobs, failed, plant)
    if len(small["given"]) > FEW:
        tasks = itertools.islice(_with_few(small), ELSEWHERE)
        for answer in jobs.answers({**task, "plant": plant} for task in tasks):
            if answer["violations"]:
                return _shrunk(jobs, answer, plant)
    return small


def _shrunk(jobs: Pool, failed: Answer, plant: str | None) -> Answer:
    answers = {tuple(failed["delivered"]): failed}

    def fails(lists: list[list[str]]) -> list[bool]:
        tasks = [{"seed": failed["seed"], "faults": faults, "plant": plant} for faults in lists]
        for answer in jobs.answers(iter(tasks)):
            answers[tuple(answer["given"])] = answer
        return [bool(answers[tuple(faults)]["violations"]) for faults in lists]

    return answers[tuple(shrink(failed["delivered"], fails, at_once=len(jobs)))]


def _with_few(failed: Answer) -> Iterator[Task]:
    """Simulations with few faults of the same kinds, by seeds."""
    kinds = {fault.partition("@")[0] for fault in failed["given"]}
    for seed in itertools.count(1):
        fitting = [fault for fault in draw(seed, places=2) if fault.kind in kinds and fault.at < SHORT]
        few = random.Random(seed).sample(fitting, min(FEW, len(fitting)))
        yield {"seed": seed, "faults": [str(fault) for fault in sorted(few, key=lambda one: one.at)]}


def command(answer: Answer, plant: str | None) -> str:
    """The command that repeats a simulation."""
    planted = f" --plant {plant}" if plant else ""
    faults = ",".join(answer["given"])
    return f'python -m tests.simulation --seed {answer["seed"]} --only "{faults}"{planted}'


def tell(answer: Answer, plant: str | None) -> None:
    for line in answer["violations"]:
        print(line)
    print(command(answer, plant), flush=True)


def repeat(jobs: Pool, options: argparse.Namespace) -> bool:
    """One simulation. Returns whether all rules hold."""
    given = None if options.only is None else [text for text in options.only.split(",") if text]
    task = {"seed": options.seed, "faults": given, "plant": options.plant, "trace": options.trace}
    [answer] = jobs.answers(iter([task]))
    for name in ("digest", "trials", "ends", "explained", "faults", "boundaries", "seconds"):
        print(f"{name}: {answer[name]}")
    for line in answer["violations"]:
        print(line)
    return not answer["violations"]


@dataclass
class Tally:
    """What many simulations have shown."""

    simulations: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    trials: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)

    def add(self, answer: Answer) -> None:
        self.simulations += 1
        self.hits.update(fault.partition("@")[0] for fault in answer["faults"])
        self.trials.update(answer["trials"])
        self.ends.update(answer["ends"])


def hunt(jobs: Pool, first: int, faults: int, plant: str | None) -> tuple[Tally, Answer | None]:
    """Simulate from a seed on, until so many faults have hit or a rule is broken; and what breaks it."""
    tally = Tally()
    tasks = ({"seed": seed, "plant": plant} for seed in itertools.count(first))
    for answer in jobs.answers(tasks):
        tally.add(answer)
        if answer["violations"]:
            return tally, answer
        if tally.hits.total() >= faults:
            break
    return tally, None


def search(jobs: Pool, options: argparse.Namespace) -> bool:
    """Simulations, and what they have shown. Returns whether all rules hold."""
    tally, failed = hunt(jobs, options.first, options.faults, options.plant)
    if failed is not None:
        print(f"seed {failed['seed']} breaks rules after {tally.hits.total()} faults:")
        print(*failed["violations"], sep="\n", flush=True)
        print("fewest faults that do:")
        tell(smallest(jobs, failed, options.plant), options.plant)
        return False
    hits, trials, ends = tally.hits, tally.trials, dict(tally.ends)
    print(f"{hits.total()} faults hit in {tally.simulations} simulations: {dict(hits.most_common())}")
    print(f"{trials.total()} trials: {dict(trials)}; workers by exit code: {ends}; no violation")
    return True


def find_plants(jobs: Pool, options: argparse.Namespace) -> bool:
    """A row of a table for each plant. Returns whether all are found."""
    found = True
    for plant in PLANTS:
        tally, failed = hunt(jobs, options.first, options.faults, plant)
        if failed is None:
            found = False
            print(f"| `{plant}` | not in {tally.hits.total():,} | | |", flush=True)
        else:
            few = smallest(jobs, failed, plant)
            rule, _, _ = few["violations"][0].partition(":")
            print(f"| `{plant}` | {tally.hits.total():,} | {len(few['given'])} | `{rule}` |", flush=True)
    return found


def main() -> None:
    """Exit with 1 if a rule was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int)
    parser.add_argument("--only", help="the faults of this simulation; its own by default")
    parser.add_argument("--trace", help="write the history there")
    parser.add_argument("--plant", help="a weak spot of tests/simulation/plants.py")
    parser.add_argument("--plants", action="store_true", help="find all of them")
    options = parser.parse_args()
    with pool(1 if options.seed is not None else options.jobs) as jobs:
        run = find_plants if options.plants else search if options.seed is None else repeat
        sys.exit(not run(jobs, options))


if __name__ == "__main__":
    main()

"""Simulate searches in which much goes wrong, until so many faults have hit.

    python -m tests.simulation --faults 10000 [--first SEED] [--jobs N] [--plant NAME]
    python -m tests.simulation --seed SEED [--only FAULTS] [--plant NAME] [--trace FILE]

The second form repeats one simulation. A simulation that breaks a rule is shrunk to few faults, and the
command that repeats it is printed.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any

from tests.simulation.shrink import shrink

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
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Pool:
    """Several jobs."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs

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
    """The simulation with as few faults as still break a rule."""
    answers = {tuple(failed["delivered"]): failed}

    def fails(faults: list[str]) -> bool:
        [answer] = jobs.answers(iter([{"seed": failed["seed"], "faults": faults, "plant": plant}]))
        answers[tuple(faults)] = answer
        return bool(answer["violations"])

    return answers[tuple(shrink(failed["delivered"], fails))]


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


def search(jobs: Pool, options: argparse.Namespace) -> bool:
    """Simulations until so many faults have hit, or a rule is broken. Returns whether all rules hold."""
    hits: Counter[str] = Counter()
    trials: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    number = 0
    tasks = ({"seed": seed, "plant": options.plant} for seed in itertools.count(options.first))
    for answer in jobs.answers(tasks):
        number += 1
        hits.update(fault.partition("@")[0] for fault in answer["faults"])
        trials.update(answer["trials"])
        ends.update(answer["ends"])
        if answer["violations"]:
            print(f"seed {answer['seed']} breaks rules after {hits.total()} faults:")
            print(*answer["violations"], sep="\n", flush=True)
            print("fewest faults that do:")
            tell(smallest(jobs, answer, options.plant), options.plant)
            return False
        if hits.total() >= options.faults:
            break
    print(f"{hits.total()} faults hit in {number} simulations: {dict(hits.most_common())}")
    print(f"{trials.total()} trials: {dict(trials)}; workers by exit code: {dict(ends)}; no violation")
    return True


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
    options = parser.parse_args()
    with pool(1 if options.seed is not None else options.jobs) as jobs:
        holds = search(jobs, options) if options.seed is None else repeat(jobs, options)
    sys.exit(not holds)


if __name__ == "__main__":
    main()

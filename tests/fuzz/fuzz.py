"""Every target under a coverage-guided fuzzer, each in a process forked from one that has all imports.

    python -m tests.fuzz.fuzz --runs 100000 [--target NAME ...]

The inputs are shared out over the targets; the same command tries the same inputs, as long as the
readers are the same. Ends with 1 after a fault, and says where its input is: that belongs, with a name
that says what is wrong with it, into cases/TARGET/, where test_fuzz.py tries it for ever.
"""

import argparse
import ctypes
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.fuzz.instrumented import Readers

# What one input may take. libFuzzer counts the whole process, so its limit is what that began with, all
# imports included, and so much more.
SECONDS, MEGABYTES = 20, 250
LONGEST = 8192  # bytes of an input
SEED = 1


@dataclass(frozen=True)
class Outcome:
    """What became of one target."""

    name: str
    inputs: int
    megabytes: int  # at the peak, beyond what the process began with
    seconds: float
    fault: str | None  # what the process said of it


@dataclass(frozen=True)
class Attempt:
    """A target that is being tried in a process of its own."""

    name: str
    runs: int
    output: Path
    started: float

    def ended(self, status: int) -> Outcome:
        """What its process says, which has ended so."""
        said = self.output.read_text(errors="replace")
        inputs, before, peak = (
            int(found[1]) if (found := re.search(rf"stat::{what}:\s*(\d+)", said)) else 0
            for what in ("number_of_executed_units", "began_with_rss_mb", "peak_rss_mb")
        )
        lines = [line for line in said.splitlines() if not line.startswith(("INFO:", "WARNING:", "#"))]
        fault = "\n".join(lines) if status or inputs < self.runs else None
        seconds = time.monotonic() - self.started
        return Outcome(self.name, inputs, max(peak - before, 0), seconds, fault)


def begin(readers: Readers, name: str, runs: int, faults: Path) -> tuple[int, Attempt]:
    """Fork a process that tries so many inputs, beginning with the seeds and the cases.

    A fault's input is kept in `faults`.
    """
    options = [
        *(f"-runs={runs}", f"-seed={SEED}", f"-timeout={SECONDS}", f"-max_len={LONGEST}"),
        *(f"-artifact_prefix={faults}/{name}-", "-print_final_stats=1"),
    ]
    attempt = Attempt(name, runs, readers.folder / name / "said", time.monotonic())
    child = os.fork()
    if not child:
        _be_fuzzed(readers, name, options, attempt.output)
    return child, attempt


def _be_fuzzed(readers: Readers, name: str, options: list[str], output: Path) -> NoReturn:
    """The rest of a child's life."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    try:
        readers.try_inputs(name, options, MEGABYTES)
    except SystemExit:
        pass  # how atheris ends after a fault, which it has told
    except BaseException:  # nothing may leave this fork but by the exit below
        traceback.print_exc()
    sys.stderr.flush()
    # C's exit, in which libFuzzer keeps the input. Python's would also end what is the parent's to end.
    ctypes.CDLL(None).exit(1)
    raise AssertionError


def fuzz(readers: Readers, runs: Mapping[str, int], faults: Path) -> Iterator[Outcome]:
    """Try each target's number of inputs, one target for each core at a time."""
    waiting, working = list(runs), {}
    while waiting or working:
        while waiting and len(working) < len(os.sched_getaffinity(0)):
            name = waiting.pop(0)
            child, attempt = begin(readers, name, runs[name], faults)
            working[child] = attempt
        child, status = os.wait()
        yield working.pop(child).ended(status)


def show(outcome: Outcome) -> None:
    print(
        f"{outcome.name:<13}{outcome.inputs:>8,} inputs {outcome.seconds:>6.0f} s "
        f"{outcome.megabytes:>+5} MB  {'FAULT' if outcome.fault else 'no fault'}",
        flush=True,
    )
    if outcome.fault:
        print(outcome.fault, flush=True)


def shared_out(readers: Readers, names: Sequence[str], runs: int) -> dict[str, int]:
    """How many of the inputs each target gets."""
    shares = {name: readers.targets[name].share for name in names}
    return {name: -(-runs * share // sum(shares.values())) for name, share in shares.items()}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=100_000, help="inputs in all")
    parser.add_argument("--target", nargs="*", help="some of the table's; default: all")
    arguments = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        readers = Readers(Path(folder))
        names = arguments.target or list(readers.targets)
        if unknown := set(names) - readers.targets.keys():
            parser.error(f"no target {', '.join(unknown)}; there are {', '.join(readers.targets)}")
        readers.prepare(names)
        faults = Path(tempfile.mkdtemp(prefix="fuzz-"))
        for outcome in fuzz(readers, shared_out(readers, names, arguments.runs), faults):
            show(outcome)
            outcomes.append(outcome)
    faulty = [outcome.name for outcome in outcomes if outcome.fault]
    print(f"{sum(outcome.inputs for outcome in outcomes):,} inputs, {len(faulty)} faults")
    if faulty:
        print(f"of {', '.join(faulty)}; the inputs are in {faults}")
        return 1
    faults.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every target under a coverage-guided fuzzer, each in a process of its own.

    python -m tests.fuzz.fuzz --runs 100000 [--target NAME ...]

The inputs are shared out over the targets; the same command tries the same inputs, as long as the
readers are the same. Ends with 1 after a fault, and says where its input is: that belongs, with a name
that says what is wrong with it, into cases/TARGET/, where test_fuzz.py tries it for ever.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.targets import CASES, TARGETS

SECONDS, MEGABYTES = 20, 1024  # that one input may take
LONGEST = 8192  # bytes of an input
SEED = 1


@dataclass(frozen=True)
class Outcome:
    """What became of one target."""

    inputs: int
    megabytes: int  # at the peak
    seconds: float
    fault: str | None  # what the process said of it


def fuzz(name: str, runs: int, faults: Path) -> Outcome:
    """Try so many inputs, beginning with the seeds and the cases; a fault's is kept in `faults`."""
    command = [
        *(sys.executable, "-m", "tests.fuzz.one", name, f"-runs={runs}", f"-seed={SEED}"),
        *(f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-max_len={LONGEST}"),
        *(f"-artifact_prefix={faults}/{name}-", "-print_final_stats=1"),
    ]
    with tempfile.TemporaryDirectory() as corpus:  # the first one, to which libFuzzer adds
        known = [str(CASES / name)] if (CASES / name).is_dir() else []
        started = time.monotonic()
        result = subprocess.run([*command, corpus, *known], capture_output=True)
    said = (result.stdout + result.stderr).decode(errors="replace")
    inputs, megabytes = (
        int(found[1]) if (found := re.search(rf"stat::{what}:\s*(\d+)", said)) else 0
        for what in ("number_of_executed_units", "peak_rss_mb")
    )
    lines = [line for line in said.splitlines() if not line.startswith(("INFO:", "WARNING:", "#"))]
    fault = "\n".join(lines) if result.returncode or inputs < runs else None
    return Outcome(inputs, megabytes, time.monotonic() - started, fault)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=100_000, help="inputs in all")
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    arguments = parser.parse_args()
    faults = Path(tempfile.mkdtemp(prefix="fuzz-"))
    shares = sum(TARGETS[name].share for name in arguments.target)
    inputs, faulty = 0, []
    for name in arguments.target:
        outcome = fuzz(name, -(-arguments.runs * TARGETS[name].share // shares), faults)
        inputs += outcome.inputs
        print(
            f"{name:<13}{outcome.inputs:>8,} inputs {outcome.seconds:>6.0f} s "
            f"{outcome.megabytes:>5} MB  {'FAULT' if outcome.fault else 'no fault'}",
            flush=True,
        )
        if outcome.fault:
            faulty.append(name)
            print(outcome.fault, flush=True)
    print(f"{inputs:,} inputs, {len(faulty)} faults")
    if faulty:
        print(f"of {', '.join(faulty)}; the inputs are in {faults}")
        return 1
    faults.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -P -m atelier_command ...`, with an optimizer step that first sleeps for $STEP_SECONDS.

An epoch is then as long as a drill needs it, and the CPU is free for other drills. All else is the real
thing: curves, checkpoints, signals, leases, and the process that SLURM has started. Once there is a file
named `hurry` in the job's folder, no step sleeps any more.

With $WALL_SECONDS, SLURM ends the job so long after the imports, however long they took.
"""

import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import search.worker  # noqa: F401  # what takes long to import
from trainer.run import Run

train_step = Run.train_step


def slow_step(run, features, target):
    if not Path("hurry").exists():
        time.sleep(float(os.environ["STEP_SECONDS"]))
    return train_step(run, features, target)


Run.train_step = slow_step
if seconds := os.environ.get("WALL_SECONDS"):
    job = os.environ["SLURM_JOB_ID"]
    subprocess.run(["scontrol", "update", f"jobid={job}", f"EndTime=now+{seconds}"], check=True)
assert sys.argv[1:4] == ["-P", "-m", "atelier_command"], sys.argv
del sys.argv[1:4]
runpy.run_module("atelier_command", run_name="__main__", alter_sys=True)

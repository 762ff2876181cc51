"""One process of many simulations, with a PostgreSQL of its own: each simulation runs in a fork of it.

It reads a task a line, as JSON, and answers with a line. All forks begin alike, whatever ran before.
"""

import gc
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import scipy.stats  # noqa: F401

# Once, for all forks: elsewhere these are imported late.
import dashboards.note  # noqa: F401
import search.cli.preload  # noqa: F401
from storage import schema
from tests.simulation import plants
from tests.simulation.database import Server, share_what_never_changes
from tests.simulation.faults import Fault
from tests.simulation.simulation import Simulation


def main() -> None:
    """Do the tasks on stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    optuna.logging.disable_default_handler()  # it would tell of each lost connection
    logging.getLogger("optuna").addHandler(logging.NullHandler())
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="simulation.", dir=memory if memory.is_dir() else None))
    server = Server(root / "server")
    try:
        schema.head_revision()  # read once, for all
        share_what_never_changes()
        gc.freeze()
        gc.disable()  # a simulation is short, and its time would go there
        for line in sys.stdin:
            answers.write(json.dumps(_in_fork(server, root, json.loads(line))) + "\n")
            answers.flush()
    finally:
        server.stop()
        shutil.rmtree(root)


def _in_fork(server: Server, root: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Run one simulation; what goes wrong in the simulation itself is an "error"."""
    reading, writing = os.pipe()
    folder = root / "simulation"
    child = os.fork()
    if not child:
        try:
            answer = _simulate(server, folder, task)
        except BaseException:  # told to whoever asked
            answer = {"error": traceback.format_exc()}
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    server.drop_databases()
    shutil.rmtree(folder, ignore_errors=True)
    return task | (json.loads(text) if text else {"error": "the simulation's process was killed"})


def _simulate(server: Server, folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    begun = time.monotonic()
    if task.get("plant"):
        plants.plant(task["plant"])
    given = None if task.get("faults") is None else [Fault.parse(text) for text in task["faults"]]
    simulation = Simulation(server, folder, task["seed"], given, keep=task.get("trace") is not None)
    result = simulation.run()
    answer = asdict(result)
    lines = answer.pop("lines")
    if lines is not None:
        Path(task["trace"]).write_text("\n".join(lines))
    return answer | {"seconds": time.monotonic() - begun}


if __name__ == "__main__":
    main()

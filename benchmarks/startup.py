"""How long commands take to begin, compared with a Python that imports the same libraries.

    python -m benchmarks.startup            # --verbs: without the search

Each verb that needs no torch does its first work on a study of ten trials, and the dashboard begins to
answer. They are compared with `import optuna, sqlalchemy`. `atelier search` with two workers runs up to
its first optimizer step. It is compared with the import of torch, torchvision, timm and Optuna. Each
runs some times, in turns with what it is compared with. All use the embedded database of a temporary
folder. The figures are medians.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from storage import database
from storage.embedded import EmbeddedPostgres
from storage.studies import study_entry
from tests.conftest import free_port
from tests.studies import fill, predict
from trainer.dataset import read_dataset
from trainer.demo import write_demo

BASE = "import optuna, sqlalchemy"
RUNS, SEARCHES = 9, 5
ATELIER = [sys.executable, "-m", "atelier_command"]
DEMO = Path(__file__).parents[1] / "studies" / "demo.toml"
FIRST_STEP = "first optimizer step"  # what a worker's log says
STUDY = "startup"
VERBS = [
    "--help",
    f"status {STUDY}",
    f"trials {STUDY}",
    f"efficiency {STUDY}",
    f"logs {STUDY}",
    f"verify {STUDY}",
    f"export {STUDY} -o best.toml",
    f"stop {STUDY} --undo",
    "submit study.toml --dry-run",
    "db status",
    "user list",
    "data check data",
    f"trials {STUDY} --format csv",  # with pandas
    f"plot {STUDY} -o curves.html",
    f"plot {STUDY} -o curves.png",  # with Matplotlib
]
FAR = (
    "postgresql://atelier@db.example.org/atelier?sslmode=disable"  # a submit wants one that nodes reach
)


class Place:
    """A folder with a dataset and a database, in which commands are timed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.environment = os.environ | {"PYTHONPATH": os.getcwd(), "ATELIER_HOME": str(self.home)}

    def seconds(self, command: list[str], **environment: str) -> float:
        """The seconds until the command has ended."""
        started = time.perf_counter()
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment | environment, capture_output=True, text=True
        )
        if done.returncode not in (0, 1 if "verify" in command else 0):  # the trials are made up
            sys.exit(f"{' '.join(command)}: {done.stderr}")
        return time.perf_counter() - started

    def seconds_to_answer(self) -> float:
        """The seconds until the dashboard takes connections. It is ended then."""
        port, started = free_port(), time.perf_counter()
        command = [*ATELIER, "dashboard", "--port", str(port)]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.01)
        else:
            sys.exit(f"{' '.join(command)} ended with {process.returncode}")
        seconds = time.perf_counter() - started
        process.terminate()
        process.wait()
        return seconds

    def seconds_to_first_step(self, name: str) -> float:
        """The seconds until a worker of a new search has made a step. The search is stopped then."""
        command = [*ATELIER, "search", str(DEMO), "--data", "data", "--set", f"study.name={name}"]
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        logs = self.home / "runs"
        while not any(FIRST_STEP in log.read_text() for log in logs.glob(f"{name}-*/logs/*.log")):
            if process.poll() is not None:
                sys.exit(f"{' '.join(command)} ended with {process.returncode}")
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        process.terminate()
        process.wait()
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--verbs", action="store_true", help="without the search")
    verbs_only = parser.parse_args().verbs
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name))
        place.folder.chmod(0o755)
        write_demo(place.folder / "data")
        (place.folder / "study.toml").write_text(DEMO.read_text() + "\n[slurm.tuning]\n")
        show(BASE, verbs(place))
        if not verbs_only:
            show("import torch, torchvision, timm, optuna", search(place))


def verbs(place: Place) -> dict[str, float]:
    os.environ["ATELIER_HOME"] = str(place.home)
    server = EmbeddedPostgres(place.home)
    server.start()
    enter_study(place.folder)
    timed: dict[str, Callable[[], float]] = {
        BASE: lambda: place.seconds([sys.executable, "-c", BASE]),
        "atelier dashboard": place.seconds_to_answer,
    }
    for verb in VERBS:
        named = {"ATELIER_DATABASE_URL": FAR} if verb.startswith("submit") else {}
        timed[f"atelier {verb}"] = partial(place.seconds, [*ATELIER, *verb.split()], **named)
    medians = in_turns(timed, RUNS)
    server.stop()
    return medians


def search(place: Place) -> dict[str, float]:
    place.seconds_to_first_step("warm")  # prepares the images
    libraries = "import torch, torchvision, timm, optuna"
    return in_turns(
        {
            libraries: lambda: place.seconds([sys.executable, "-c", libraries]),
            "atelier search, to its first step": lambda: place.seconds_to_first_step(uuid.uuid4().hex),
        },
        SEARCHES,
    )


def in_turns(timed: dict[str, Callable[[], float]], runs: int) -> dict[str, float]:
    """Measure all in turns. Returns the median seconds of each."""
    rounds = [{name: measure() for name, measure in timed.items()} for _ in range(runs)]
    return {name: statistics.median(times[name] for times in rounds) for name in timed}


def show(base: str, timed: dict[str, float]) -> None:
    for name, seconds in timed.items():
        print(f"{name:<42}{seconds:6.2f} s  {seconds / timed[base]:5.2f} of {base}", flush=True)


def enter_study(folder: Path) -> None:
    """A study of ten trials, with what the best ones predicted."""
    engine, data = database.connect(), folder / "data"
    fill(engine, ["complete"] * 4 + ["pruned"] * 6, epochs=10, name=STUDY, data=data)
    entry = study_entry(engine, STUDY)
    for trial in range(4):
        predict(entry, trial, read_dataset(data), seed=trial)
    engine.dispose()


if __name__ == "__main__":
    main()

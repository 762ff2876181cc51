"""How long commands take to begin, compared with a Python that imports the same libraries.

    python benchmarks/startup.py

The login node's commands are compared with `import torch`. `atelier search` with two workers runs up to
its first optimizer step. It is compared with the import of torch, torchvision, timm and Optuna. Each
runs five times, in turns with what it is compared with. All use the embedded database of a temporary
folder. The figures are medians.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from storage import database, schema
from storage.embedded import EmbeddedPostgres
from trainer.demo import write_demo

STUDY = """
[study]
name = "startup"
max_trials = 1
[space]
lr = [1e-3]
[train]
data = "data"
weights = "none"
[slurm.tuning]
"""
RUNS = 5
ATELIER = [sys.executable, "-m", "atelier_command"]
DEMO = Path(__file__).parents[1] / "studies" / "demo.toml"
FIRST_STEP = "first optimizer step"  # what a worker's log says


class Place:
    """A folder with a dataset and a database, in which commands are timed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.environment = os.environ | {"PYTHONPATH": os.getcwd(), "ATELIER_HOME": str(self.home)}

    def seconds(self, command: list[str], **environment: str) -> float:
        """The seconds until the command has ended."""
        started = time.perf_counter()
        subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | environment,
            check=True,
            capture_output=True,
        )
        return time.perf_counter() - started

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
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name))
        place.folder.chmod(0o755)
        write_demo(place.folder / "data")
        (place.folder / "study.toml").write_text(STUDY)
        show("import torch", login_node(place))
        place.seconds_to_first_step("warm")  # prepares the images
        timed = in_turns(
            {
                "import torch, torchvision, timm, optuna": lambda: place.seconds(
                    [sys.executable, "-c", "import torch, torchvision, timm, optuna"]
                ),
                "atelier search, to its first step": lambda: place.seconds_to_first_step(
                    uuid.uuid4().hex
                ),
            }
        )
        show("import torch, torchvision, timm, optuna", timed)


def login_node(place: Place) -> dict[str, float]:
    os.environ["ATELIER_HOME"] = str(place.home)
    server = EmbeddedPostgres(place.home)
    server.start()
    enter_study(place.folder)
    far = "postgresql://atelier@db.example.org/atelier?sslmode=disable"
    timed = in_turns(
        {
            "import torch": lambda: place.seconds([sys.executable, "-c", "import torch"]),
            "atelier status": lambda: place.seconds([*ATELIER, "status", "startup"]),
            "atelier submit --dry-run": lambda: place.seconds(
                [*ATELIER, "submit", "study.toml", "--dry-run"], ATELIER_DATABASE_URL=far
            ),
            "atelier --help": lambda: place.seconds([*ATELIER, "--help"]),
        }
    )
    server.stop()
    return timed


def in_turns(timed: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Measure all in turns. Returns the median seconds of each."""
    rounds = [{name: measure() for name, measure in timed.items()} for _ in range(RUNS)]
    return {name: statistics.median(times[name] for times in rounds) for name in timed}


def show(base: str, timed: dict[str, float]) -> None:
    for name, seconds in timed.items():
        print(f"{name:<42}{seconds:6.2f} s  {seconds / timed[base]:5.2f} of {base}", flush=True)


def enter_study(folder: Path) -> None:
    from search.study import open_study
    from search.toml_file import load_study_file
    from trainer.dataset import read_dataset

    engine = database.connect()
    file = load_study_file(folder / "study.toml")
    open_study(file, engine, schema.open_storage(engine), read_dataset(folder / "data"))
    engine.dispose()


if __name__ == "__main__":
    main()

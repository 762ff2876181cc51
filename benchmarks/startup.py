"""How long the login node's commands take, beside a Python that imports torch.

    python benchmarks/startup.py

Each command runs five times on the embedded database of a folder of its own; the figures are medians.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from storage import database
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


def median_seconds(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    atelier = [sys.executable, "-m", "search"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_demo(folder / "data", train=50, val=20, test=0)
        (folder / "study.toml").write_text(STUDY)
        os.environ["ATELIER_HOME"] = str(folder / "home")
        server = EmbeddedPostgres(folder / "home")
        server.start()
        enter_study(folder)
        environment = os.environ | {"PYTHONPATH": os.getcwd()}
        far = environment | {
            "ATELIER_DATABASE_URL": "postgresql://atelier@db.example.org/atelier?sslmode=disable"
        }
        figures = {
            "python -c 'import torch'": median_seconds(
                [sys.executable, "-c", "import torch"], folder, environment
            ),
            "atelier status": median_seconds([*atelier, "status", "startup"], folder, environment),
            "atelier submit --dry-run": median_seconds(
                [*atelier, "submit", "study.toml", "--dry-run"], folder, far
            ),
            "atelier --help": median_seconds([*atelier, "--help"], folder, environment),
        }
        server.stop()
    torch = figures["python -c 'import torch'"]
    for command, seconds in figures.items():
        print(f"{command:<26}{seconds:6.2f} s  {seconds / torch:5.2f} of torch's import")


def enter_study(folder: Path) -> None:
    from search.study import load_study_file, open_study
    from trainer.dataset import read_dataset

    engine = database.connect()
    file = load_study_file(folder / "study.toml")
    open_study(file, engine, database.prepare(engine), read_dataset(folder / "data"))
    engine.dispose()


if __name__ == "__main__":
    main()

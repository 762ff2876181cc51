"""One target under atheris: `python -m tests.fuzz.one TARGET`, then libFuzzer's options."""

import sys
import tempfile
from pathlib import Path

import atheris

# Ours, and what parses for us in Python.
INSTRUMENTED = [
    "search",
    "trainer",
    "storage",
    "dashboards",
    "tomllib",
    "json",
    "PIL",
    "zipfile",
    "tarfile",
]


def main() -> None:
    name = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as corpus:
        with atheris.instrument_imports(include=INSTRUMENTED):
            from tests.fuzz.targets import TARGETS

            target = TARGETS[name]
            path = target.place(Path(work))
            for number, seed in enumerate(target.seeds()):
                target.answer(path, seed)  # imports the reader
                (Path(corpus) / f"seed-{number}").write_bytes(seed)
        atheris.Setup([*sys.argv, corpus], lambda data: target.answer(path, data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()

"""All readers, imported once as atheris instruments them; forks of that process try the targets."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import NoReturn

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
# Of the libraries that begin threads when they are imported: those of OpenMP, and pyarrow's allocator.
THREADLESS = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


class Readers:
    """The table of targets, each with a folder of its own below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        os.environ |= THREADLESS
        early = [name for name in INSTRUMENTED if name in sys.modules]
        assert not early, f"{early} cannot be instrumented any more"
        with _instrumented():
            from tests.fuzz.targets import CASES, TARGETS
        self.targets, self._cases = TARGETS, CASES

    def prepare(self, names: Sequence[str]) -> None:
        """Import what these targets read with. No thread may begin: a fork would be without it."""
        with _instrumented():
            for name in names:
                self._furnish(name)
                self._answer_seeds(name)
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"{threads} threads, so nothing can be forked"

    def _furnish(self, name: str) -> None:
        for part in ("place", "seeds", "found"):
            (self.folder / name / part).mkdir(parents=True)
        for number, seed in enumerate(self.targets[name].seeds()):
            (self.folder / name / "seeds" / str(number)).write_bytes(seed)
        self.targets[name].place(self.folder / name / "place")

    def _answer_seeds(self, name: str) -> None:
        for seed in self.targets[name].seeds():
            with suppress(Exception):  # a fault, which libFuzzer finds first of all
                self.targets[name].answer(self._path(name), seed)

    def _path(self, name: str) -> Path:
        return self.folder / name / "place" / self.targets[name].file

    def try_inputs(self, name: str, options: Sequence[str], megabytes: int) -> NoReturn:
        """Give this process to libFuzzer, which ends it. An input may take so much memory."""
        self._answer_seeds(name)  # reads in the libraries' pages, which are not the input's
        began = resident() >> 20
        print(f"stat::began_with_rss_mb: {began}", file=sys.stderr, flush=True)
        folder, known = self.folder / name, self._cases / name
        corpora = [folder / "found", *([known] if known.is_dir() else []), folder / "seeds"]
        atheris.Setup(
            ["fuzz", *options, f"-rss_limit_mb={began + megabytes}", *map(str, corpora)],
            lambda data: self.targets[name].answer(self._path(name), data),
        )
        atheris.Fuzz()
        raise AssertionError("libFuzzer has not ended the process")


def resident() -> int:
    """The memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _instrumented() -> Iterator[None]:
    """Instruments what is imported meanwhile, without atheris's line for each module."""
    with redirect_stderr(StringIO()), atheris.instrument_imports(include=INSTRUMENTED):
        yield

"""Real workers, a real PostgreSQL, and a seeded schedule of what goes wrong around them.

    python -m tests.chaos.harness --seconds 600 [--seed N ...]

Two hosts share a folder and reach the database each through a network of its own: workers of the second
have process ids and a host name of their own, so that nobody on the first can tell whether they live.
For its share of the seconds each seed breaks what it can; then the study is allowed to end, and
checker.py says whether anything was lost.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.embedded import EmbeddedPostgres
from tests.chaos.checker import References
from tests.chaos.proxy import Mode
from tests.chaos.search import STUDY, Search
from tests.chaos.worker import LEASE_SECONDS
from trainer.demo import write_demo

SEEDS = (1, 2, 3)
DISK = "512m"  # of the home folder: every paused trial keeps its checkpoints
WORKERS = (("a", "1"), ("a", "2"), ("b", "1"))  # host and --pack of each
EXTRA_TRIALS = 5  # that are begun when nothing is disturbed any more


class Chaos:
    """The faults by name, and what they are done to. `count` says how often that was."""

    def __init__(self, search: Search, server: EmbeddedPostgres, seed: int) -> None:
        self.search, self.server, self.random = search, server, random.Random(seed)
        self._later: list[tuple[float, Callable[[], None]]] = []
        self.faults = {
            "worker killed": self.kill,
            "worker paused past its lease": self.pause,
            "worker told to stop": self.stop,
            "server killed": self.kill_server,
            "connections ended by the server": self.terminate,
            "network cut": lambda: self.disturb("cut"),
            "network hung": lambda: self.disturb("hung"),
            "network slow": lambda: self.disturb("slow"),
            "checkpoint damaged": self.damage,
            "clock jumped": self.set_clock,
        }
        if os.geteuid() == 0:
            self.faults["disk full"] = self.fill_disk
        self.count = Counter(dict.fromkeys(self.faults, 0))

    def run(self, seconds: float) -> None:
        """Break things for so long, then mend them."""
        end, next_fault = time.monotonic() + seconds, 0.0
        while (now := time.monotonic()) < end:
            self.search.tend()
            self._mend(now)
            if now >= next_fault and self.search.trials():
                self._break_something()
                next_fault = now + self.random.uniform(1.5, 4.5)
            time.sleep(0.1)
        self._mend(math.inf)

    def _break_something(self) -> None:
        """What is possible and was done least so far."""
        names = self.random.sample([*self.faults], len(self.faults))
        for name in sorted(names, key=self.count.__getitem__):
            if self.faults[name]():
                self.count[name] += 1
                return

    def _mend(self, now: float) -> None:
        for due in [one for one in self._later if one[0] <= now]:
            self._later.remove(due)
            due[1]()

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + seconds, action))

    def kill(self) -> bool:
        return self.random.choice(self.search.places).signal(signal.SIGKILL)

    def stop(self) -> bool:
        return self.random.choice(self.search.places).signal(signal.SIGTERM)

    def pause(self) -> bool:
        places = self.search.places
        place = self.random.choice([one for one in places if not one.paused] or places)
        if place.paused or not place.signal(signal.SIGSTOP):
            return False
        place.paused = True

        def go_on() -> None:
            place.signal(signal.SIGCONT)
            place.paused = False

        self._after(LEASE_SECONDS + self.random.uniform(0.5, 4), go_on)
        return True

    def set_clock(self) -> bool:
        """Let a worker's clock jump, by up to a day, and stay there."""
        self.random.choice(self.search.places).set_clock(self.random.randint(-86400, 86400))
        return True

    def kill_server(self) -> bool:
        pid = int((self.server.data / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        time.sleep(self.random.uniform(0, 2))
        self.server.revive()
        return True

    def terminate(self) -> bool:
        with self.search.connection() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            return cursor.rowcount > 0

    def disturb(self, mode: Mode) -> bool:
        network = self.random.choice([*self.search.hosts.values()]).network
        if network.mode != "open":
            return False
        if mode == "cut":
            network.cut()
        network.mode = mode

        def mend() -> None:
            network.mode = "open"

        self._after(self.random.uniform(1, LEASE_SECONDS + 3), mend)
        return True

    def fill_disk(self) -> bool:
        ballast = self.search.home / "ballast"
        if ballast.exists():
            return False
        with suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
        self._after(self.random.uniform(1, 4), ballast.unlink)
        return True

    def damage(self) -> bool:
        """Spoil a trial's newest checkpoint or its digest, and end the workers, so that it is needed."""
        # Only what has a digest is ever read.
        folders = sorted({path.parent for path in self.search.home.rglob("trial-*/*.pt.sha256")})
        if not folders:
            return False
        for place in self.search.places:
            place.signal(signal.SIGKILL)
        digests = sorted(self.random.choice(folders).glob("*.pt.sha256"))
        if not digests:
            return False
        path = digests[-1] if self.random.random() < 0.2 else digests[-1].with_suffix("")
        with suppress(OSError):
            data = bytearray(path.read_bytes())
            if self.random.random() < 0.5:
                data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            else:
                del data[self.random.randrange(len(data)) :]
            path.write_bytes(data)
            return True
        return False


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A disk that can be filled, where this user may mount one."""
    path.mkdir()
    mounted = os.geteuid() == 0
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], check=True)
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True)


def survive(
    folder: Path, data: Path, seed: int, seconds: float, server: EmbeddedPostgres
) -> dict[str, object]:
    """One study under the faults of a seed: what was done, and what did not hold."""
    study = folder / f"chaos-{seed}.toml"
    study.write_text(STUDY.format(name=study.stem, data=data))
    home = folder / f"home-{seed}"
    with small_disk(home, DISK):
        search = Search(folder / f"logs-{seed}", study, home, server.acquire(), WORKERS)
        chaos = Chaos(search, server, seed)
        try:
            chaos.run(seconds)
            search.end(EXTRA_TRIALS)
        finally:
            search.close()
        evidence, found = search.judge(References())
    return {
        "seed": seed,
        "faults": dict(chaos.count),
        "trials": dict(Counter(trial.state for trial in evidence.trials)),
        "attempts": sum(len(trial.attempts) for trial in evidence.trials),
        "workers": dict(search.ends),
        "violations": found,
    }


@contextmanager
def scene() -> Iterator[tuple[Path, Path]]:
    """A folder that any user may enter, and a dataset in it. It is kept if an error is raised."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.chmod(0o755)
    write_demo(folder / "demo", train=300, val=80, test=10)
    yield folder, folder / "demo"
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600.0, help="in which things break, in all")
    parser.add_argument("--seed", type=int, nargs="*", help="default: three fixed ones and one drawn")
    arguments = parser.parse_args()
    seeds = arguments.seed or [*SEEDS, random.SystemRandom().randrange(10**6)]
    total: Counter[str] = Counter()
    trials = 0
    with scene() as (folder, data):
        server = EmbeddedPostgres(folder / "server")
        try:
            for seed in seeds:
                result = survive(folder, data, seed, arguments.seconds / len(seeds), server)
                print(json.dumps(result), flush=True)
                if result["violations"]:
                    sys.exit(f"violations; the workers' logs are in {folder}")
                total.update(result["faults"])
                trials += sum(result["trials"].values())
        finally:
            server.stop()
    print(f"{total.total()} faults over {trials} trials: {dict(total)}")
    if never := [name for name, times in total.items() if not times]:
        sys.exit(f"not shown, for it never happened: {', '.join(never)}; give it more seconds")


if __name__ == "__main__":
    main()

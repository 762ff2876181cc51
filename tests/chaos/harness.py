"""Real workers, a real PostgreSQL, and a seeded schedule of what goes wrong around them.

    python -m tests.chaos.harness --seconds 90 [--seed N ...]

Two hosts share a folder and reach the database each through a network of its own: workers of the second
have process ids and a host name of their own, so that nobody on the first can tell whether they live.
For its share of the seconds each seed breaks what it can; then the study is allowed to end, and
the rules of search/verify say whether anything was lost.

Workers are forked, so that one that has ended is at work again within a second. In each search one of
them begins as a program of its own. Faults hit workers that hold a trial, where the fault is a worker's;
one that is paused goes on when another has its trial, and the disk is full until somebody has met that.
"""

import argparse
import errno
import itertools
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
from typing import Any, NamedTuple

import psutil
import psycopg2

from search.verify.evidence import Evidence
from storage.embedded import EmbeddedPostgres
from tests.chaos import hosts
from tests.chaos.checker import References
from tests.chaos.proxy import Mode
from tests.chaos.search import STUDY, Place, Search, Stopwatch, begin_imports
from tests.chaos.worker import LEASE_SECONDS
from tests.spoil import spoil
from trainer.demo import write_demo

CHECKPOINT_SECONDS = (0, 20)  # by turns: each epoch is saved, or those at rungs only
SEEDS = (1, 2, 3)
SERVER_DISK = "2g"  # at most; in memory, a server is there again at once after a crash
DISK = "512m"  # of the home folder: every paused trial keeps its checkpoints
WORKERS = (("a", "1"), ("a", "2"), ("b", "1"), ("b", "2"))  # host and --pack of each
FROM_ONE_TO_THE_NEXT = (0.2, 0.6)  # seconds between two faults
TICK = 0.05  # seconds between looks at what has ended
LOOK = 0.25  # seconds between looks at who holds what
LONGEST_PAUSE = 10 * LEASE_SECONDS
HASH = 64  # characters of a digest that count; the file's name follows
NO_SPACE = os.strerror(errno.ENOSPC)
ANY = 0.2  # share of the faults of a worker that hit any, also one that is starting or out of work
AT_LEAST, AT_MOST = 2, 3  # times that each fault is wanted; times the seconds that this may take
EXTRA_TRIALS = 4  # that are begun when nothing is disturbed any more


class Mending(NamedTuple):
    """What is to be mended, and when."""

    due: float
    enough: Callable[[], bool]
    action: Callable[[], None]


class Chaos:
    """The faults by name, and what they are done to. `count` says how often that was."""

    def __init__(self, search: Search, server: EmbeddedPostgres, seed: int) -> None:
        self.search, self.server, self.random = search, server, random.Random(seed)
        self._later: list[Mending] = []
        self._at_work: dict[Place, list[int]] | None = None  # when last looked; None: nobody knows
        self._server_is_down = False
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
        """Break things for so long, then mend them.

        Longer where little happens, since others have the processor: until each fault was there twice.
        """
        begun, next_look, next_fault = time.monotonic(), 0.0, 0.0
        while (now := time.monotonic()) < begun + seconds or (
            now < begun + AT_MOST * seconds and min(self.count.values()) < AT_LEAST
        ):
            self.search.tend()
            if now >= next_look:
                self._at_work, next_look = self.search.at_work(), now + LOOK
            self._mend(now)
            if now >= next_fault:
                self._break_something()
                next_fault = now + self.random.uniform(*FROM_ONE_TO_THE_NEXT)
            time.sleep(TICK)
        self._mend(math.inf)

    def _break_something(self) -> None:
        """What is possible and was done least so far."""
        names = self.random.sample([*self.faults], len(self.faults))
        for name in sorted(names, key=self.count.__getitem__):
            if self.faults[name]():
                self.count[name] += 1
                return

    def _mend(self, now: float) -> None:
        for one in [one for one in self._later if one.due <= now or one.enough()]:
            self._later.remove(one)
            one.action()

    def _after(
        self, seconds: float, action: Callable[[], None], enough: Callable[[], bool] = lambda: False
    ) -> None:
        """Mend something after these seconds, or before, as soon as it has been `enough`."""
        self._later.append(Mending(time.monotonic() + seconds, enough, action))

    def _one_at_work(self) -> Place | None:
        """One that holds a trial; sometimes any, that may be starting, ending, or out of work."""
        places = self.search.places if self.random.random() < ANY else [*(self._at_work or ())]
        # What is paused has to go on, to show that it comes too late.
        places = [one for one in places if not one.paused]
        return self.random.choice(places) if places else None

    def kill(self) -> bool:
        place = self._one_at_work()
        if place is None or not place.signal(signal.SIGKILL):
            return False
        if self.random.random() < 0.5:  # its host is lost with it, for longer than its lease lasts
            place.leave_empty(LEASE_SECONDS + self.random.uniform(0, 1))
        return True

    def stop(self) -> bool:
        place = self._one_at_work()
        return place is not None and place.signal(signal.SIGTERM)

    def pause(self) -> bool:
        """Let a worker stand still until another has what it held."""
        place = self._one_at_work()
        others_are_paused = any(one.paused for one in self.search.places)
        if place is None or others_are_paused or not place.signal(signal.SIGSTOP):
            return False
        place.paused = True
        held = place in (self._at_work or ())

        def go_on() -> None:
            place.signal(signal.SIGCONT)
            place.paused = False

        seconds = LEASE_SECONDS + self.random.uniform(0.5, 2)
        self._after(
            LONGEST_PAUSE if held else seconds,
            go_on,
            enough=lambda: held and self._at_work is not None and place not in self._at_work,
        )
        return True

    def set_clock(self) -> bool:
        """Let a worker's clock jump, by up to a day, and stay there."""
        place = self._one_at_work()
        if place is not None:
            place.set_clock(self.random.randint(-86400, 86400))
        return place is not None

    def kill_server(self) -> bool:
        if self._server_is_down:
            return False
        pid = int((self.server.data / "postmaster.pid").read_text().split()[0])
        family = [pid, *(one.pid for one in psutil.Process(pid).children())]
        os.kill(pid, signal.SIGKILL)
        for one in family:  # as a quick init would: until then they count as running
            with suppress(ChildProcessError):
                os.waitpid(one, 0)
        self._server_is_down = True

        def revive() -> None:
            self.server.revive()
            self._server_is_down = False

        self._after(self.random.uniform(0, 1), revive)
        return True

    def terminate(self) -> bool:
        with suppress(psycopg2.OperationalError), self.search.connection() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            return cursor.rowcount > 0
        return False

    def disturb(self, mode: Mode) -> bool:
        network = self.random.choice([*self.search.hosts.values()]).network
        if network.mode != "open":
            return False
        if mode == "cut":
            network.cut()
        network.mode = mode

        def mend() -> None:
            network.mode = "open"

        outlasts_a_lease = self.random.random() < 0.2
        seconds = LEASE_SECONDS if outlasts_a_lease else 0
        self._after(seconds + self.random.uniform(0.2, 1), mend)
        return True

    def fill_disk(self) -> bool:
        """Leave no room in the home folder, until a worker has met that."""
        ballast = self.search.home / "ballast"
        if ballast.exists():
            return False
        before = self.search.said(NO_SPACE)
        with suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
        self._after(
            LEASE_SECONDS + 1,
            ballast.unlink,
            enough=lambda: self.search.said(NO_SPACE) > before,
        )
        return True

    def damage(self) -> bool:
        """Spoil a trial's newest checkpoint or its digest, and kill its worker, so that it is needed."""
        held = self._at_work or {}
        places = [one for one in held if not one.paused and self._newest_digest(held[one])]
        if not places:
            return False
        place = self.random.choice(places)
        if not place.signal(signal.SIGKILL):
            return False
        digest = self._newest_digest(held[place])  # it may have come further by now
        if digest is None:
            return False
        with suppress(FileNotFoundError):  # a successor may have removed it
            if self.random.random() < 0.2:
                spoil(digest, self.random, HASH)
            else:
                spoil(digest.with_suffix(""), self.random)
            return True
        return False

    def _newest_digest(self, trials: list[int]) -> Path | None:
        """Of a checkpoint of the newest of them. Only what has a digest is ever read."""
        with suppress(FileNotFoundError):  # the trial has just ended
            return max(self.search.home.glob(f"runs/*/trial-{trials[-1]:05d}/*.pt.sha256"), default=None)
        return None


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A disk in memory that can be filled, where this user may mount one.

    What is on it is kept beside it if an error is raised.
    """
    path.mkdir()
    mounted = os.geteuid() == 0
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], check=True)
    try:
        yield path
    except BaseException:  # also sys.exit, by which a violation ends the run
        shutil.copytree(path, path.with_suffix(".kept"), symlinks=True, ignore=_sockets)
        raise
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True)


def _sockets(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_socket()]


# What the faults have led to, by the words of the workers' logs.
MET = {
    "late workers refused": ("no longer held by this worker", "held by another worker now"),
    "damaged checkpoints found": ("is damaged; the one before it counts",),
    "full disks met": (NO_SPACE,),
    "trials gone on with": ("goes on after",),
}
# That an end was seen at once is left out: it takes processor time, which another suite may have.
TO_BE_SEEN = ("taken over after the lease", *MET)


def consequences(evidence: Evidence, search: Search) -> dict[str, int]:
    """What the faults have led to, by which one sees that they were in earnest."""
    lost = [
        other.claimed >= one.lease_until
        for trial in evidence.trials
        for one, other in itertools.pairwise(trial.attempts)
        if one.outcome == "lost"
    ]
    return {
        "taken over after the lease": lost.count(True),
        "taken over at once": lost.count(False),
        **{name: sum(map(search.said, words)) for name, words in MET.items()},
    }


def survive(
    folder: Path,
    study: Path,
    seed: int,
    seconds: float,
    server: EmbeddedPostgres,
    references: References,
) -> dict[str, Any]:
    """One study under the faults of a seed: what was done, and what did not hold."""
    home, watch = folder / f"home-{study.stem}", Stopwatch()
    with small_disk(home, DISK):
        logs, fresh = folder / f"logs-{study.stem}", {seed % len(WORKERS)}
        search = Search(logs, study, home, server.acquire(), WORKERS, fresh)
        chaos = Chaos(search, server, seed)
        try:
            search.begin()
            watch.lap("start")
            chaos.run(seconds)
            watch.lap("faults")
            search.end(EXTRA_TRIALS)
            watch.lap("end")
        finally:
            search.close()
        evidence, found = search.judge(references)
        watch.lap("judgement")
        result = {
            "seed": seed,
            "faults": dict(chaos.count),
            "consequences": consequences(evidence, search),
            "trials": dict(Counter(trial.state for trial in evidence.trials)),
            "attempts": sum(len(trial.attempts) for trial in evidence.trials),
            "workers": dict(search.ends),
            "seconds": watch.seconds,
            "violations": found,
        }
        if found:
            print(json.dumps(result))
            sys.exit(f"violations; the workers' logs, the home and the server are in {folder}")
    return result


@contextmanager
def scene() -> Iterator[tuple[Path, Path]]:
    """A folder that any user may enter, and a dataset in it. It is kept if an error is raised."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.chmod(0o755)
    write_demo(folder / "demo", train=72, val=32, test=2)
    yield folder, folder / "demo"
    shutil.rmtree(folder)


def tell(total: dict[str, Counter[str]], trials: int) -> None:
    """What happened in all searches. Ends the program if something never did."""
    for name, counted in total.items():
        print(f"{name}: {dict(counted)}")
    print(f"{total['faults'].total()} faults over {trials} trials")
    seen = {name: total["consequences"][name] for name in TO_BE_SEEN}
    if "disk full" not in total["faults"]:
        del seen["full disks met"]
    if never := [name for name, times in (total["faults"] | seen).items() if not times]:
        sys.exit(f"not shown, for it never happened: {', '.join(never)}; give it more seconds")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=90.0, help="in which things break, in all")
    parser.add_argument("--seed", type=int, nargs="*", help="default: three fixed ones and one drawn")
    arguments = parser.parse_args()
    begin_imports()
    hosts.adopt_orphans()
    seeds = arguments.seed or [*SEEDS, random.SystemRandom().randrange(10**6)]
    total: dict[str, Counter[str]] = {name: Counter() for name in ("faults", "consequences", "seconds")}
    trials, watch = 0, Stopwatch()
    with scene() as (folder, data), small_disk(folder / "server", SERVER_DISK):
        server, references = EmbeddedPostgres(folder / "server"), References(folder / "references")
        server.acquire()
        watch.lap("preparation")
        try:
            for seed, checkpoint_seconds in zip(seeds, itertools.cycle(CHECKPOINT_SECONDS)):
                study = folder / f"chaos-{seed}.toml"
                values = {"name": study.stem, "data": data, "checkpoint_seconds": checkpoint_seconds}
                study.write_text(STUDY.format(**values))
                share = arguments.seconds / len(seeds)
                result = survive(folder, study, seed, share, server, references)
                print(json.dumps(result), flush=True)
                for name, counted in total.items():
                    counted.update(result[name])
                trials += sum(result["trials"].values())
        finally:
            server.stop()
    total["seconds"].update(watch.seconds)
    tell(total, trials)


if __name__ == "__main__":
    main()

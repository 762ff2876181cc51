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

import psutil
import psycopg2
from sqlalchemy.engine import make_url

from search.exit_codes import ExitCode
from search.study import load_study_file
from storage import database
from storage.embedded import EmbeddedPostgres
from tests.chaos.checker import References, gather, violations
from tests.chaos.proxy import Mode, Proxy
from tests.chaos.worker import CLOCK_VARIABLE, LEASE_SECONDS
from trainer.demo import write_demo

SEEDS = (1, 2, 3)
DISK = "64m"  # of the home folder
WORKERS = (("a", "1"), ("a", "2"), ("b", "1"))  # host and --pack of each
ALONE = ["unshare", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
PATIENCE = 300  # seconds for a study to end once nothing disturbs it
EXTRA_TRIALS = 3  # that are still begun after that
# How a worker may end: for want of trials or space, asked to, or killed. Else the fault is its own.
ENDS = {ExitCode.DONE, ExitCode.WRONG_INPUT, ExitCode.STOPPED, -signal.SIGTERM, -signal.SIGKILL}

STUDY = """
[study]
name = "chaos-{seed}"
max_trials = 100000
sampler = "random"
pruner = "asha"
rungs = [1]

[space]
lr = [1e-3, 3e-3]
batch_size = [64, 128]

[train]
data = "{data}"
backbone = "resnet10t"
weights = "none"
trainable = "head"
image_size = 32
epochs = 4
warmup_epochs = 1
"""


class Host:
    """A machine as the others see it: its workers, and its way to the database."""

    def __init__(self, name: str, socket: str, user: str, home: Path) -> None:
        self.name, self.network = name, Proxy(socket)
        # The shell stays, and exits with 128 + the signal that has ended the worker.
        own_names = [*ALONE, "sh", "-c", f'hostname {name} && "$@"; exit $?', "sh"]
        self._prefix = own_names if name != "a" and os.geteuid() == 0 else []
        self.environment = os.environ | {
            "ATELIER_HOME": str(home),
            "ATELIER_DATABASE_URL": f"postgresql://{user}@127.0.0.1:{self.network.port}/atelier",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, study: Path, pack: str, log: Path, clock: Path) -> subprocess.Popen[bytes]:
        """A worker, whose time of day is off by what the file `clock` says."""
        command = [sys.executable, "-m", "tests.chaos.worker", "worker", str(study), "--pack", pack]
        with log.open("ab") as output:
            return subprocess.Popen(
                [*self._prefix, *command],
                env=self.environment | {CLOCK_VARIABLE: str(clock)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


class Place:
    """Where a worker runs; one that has ended is replaced."""

    def __init__(self, host: Host, pack: str, log: Path) -> None:
        self.host, self.pack, self.log = host, pack, log
        self.clock = log.with_suffix(".clock")
        self.set_clock(0)
        self._process: subprocess.Popen[bytes] | None = None
        self.paused = False
        self.ends: Counter[int] = Counter()  # exit codes

    def tend(self, study: Path) -> None:
        """See to it that a worker runs here."""
        if not self.has_worker():
            self.paused = False
            self._process = self.host.start(study, self.pack, self.log, self.clock)

    def has_worker(self) -> bool:
        """Whether one runs; notes how it has ended."""
        if self._process is not None and (code := self._process.poll()) is not None:
            self.ends[128 - code if code > 128 else code] += 1
            self._process = None
        return self._process is not None

    def set_clock(self, offset: int) -> None:
        """Let the worker's time of day be off by so many seconds."""
        self.clock.write_text(str(offset))

    def signal(self, number: int) -> bool:
        """Send it to the worker itself, not to what put it into its namespace."""
        if self._process is None or not self.has_worker():
            return False
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._process.pid)
            for one in (parent, *parent.children(recursive=True)):
                if one.cmdline()[1:3] == ["-m", "tests.chaos.worker"]:
                    one.send_signal(number)
                    return True
        return False

    def end(self) -> None:
        """Kill it, whatever it does."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.kill()
            self._process.wait()
            self._process = None


class Chaos:
    """One study with its hosts, and the faults by name. `count` says what was done."""

    def __init__(self, folder: Path, data: Path, seed: int, server: EmbeddedPostgres) -> None:
        self.random, self.server = random.Random(seed), server
        self.home = folder / f"home-{seed}"
        self.study = folder / f"chaos-{seed}.toml"
        self.study.write_text(STUDY.format(seed=seed, data=data))
        self.count: Counter[str] = Counter()
        self.url = url = make_url(server.acquire())
        socket = f"{url.query['host']}/.s.PGSQL.{url.query.get('port', 5432)}"
        self.hosts = {name: Host(name, socket, url.username or "", self.home) for name in "ab"}
        logs = folder / f"logs-{seed}"
        logs.mkdir()
        self.places = [
            Place(self.hosts[host], pack, logs / f"{number}-{host}.log")
            for number, (host, pack) in enumerate(WORKERS)
        ]
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

    def run(self, seconds: float) -> None:
        """Break things for so long, then let the study and its workers end. Raises TimeoutError."""
        end, next_fault = time.monotonic() + seconds, 0.0
        while (now := time.monotonic()) < end:
            self._tend(now)
            if now >= next_fault and self.trials():
                self._break_something()
                next_fault = now + self.random.uniform(0.3, 3)
            time.sleep(0.1)
        self._tend(math.inf)
        max_trials = self._limit()
        deadline = time.monotonic() + PATIENCE
        while self.trials("state IN ('COMPLETE', 'PRUNED', 'FAIL')") < max_trials:
            self._wait(deadline, "the study does not end")
            self._tend(time.monotonic())
        while any(place.has_worker() for place in self.places):
            self._wait(deadline, "a worker does not end")

    def _break_something(self) -> None:
        """What is possible and was done least so far."""
        names = self.random.sample([*self.faults], len(self.faults))
        for name in sorted(names, key=self.count.__getitem__):
            if self.faults[name]():
                self.count[name] += 1
                return

    def _wait(self, deadline: float, reason: str) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{reason}; the workers' logs are in {self.places[0].log.parent}")
        time.sleep(0.5)

    def _tend(self, now: float) -> None:
        for place in self.places:
            place.tend(self.study)
        for due in [one for one in self._later if one[0] <= now]:
            self._later.remove(due)
            due[1]()

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + seconds, action))

    def close(self) -> None:
        """End the workers."""
        for place in self.places:
            place.end()
        for host in self.hosts.values():
            host.network.close()

    def kill(self) -> bool:
        return self.random.choice(self.places).signal(signal.SIGKILL)

    def stop(self) -> bool:
        return self.random.choice(self.places).signal(signal.SIGTERM)

    def pause(self) -> bool:
        place = self.random.choice([one for one in self.places if not one.paused] or self.places)
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
        self.random.choice(self.places).set_clock(self.random.randint(-86400, 86400))
        return True

    def kill_server(self) -> bool:
        pid = int((self.server.data / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        time.sleep(self.random.uniform(0, 2))
        self.server.revive()
        return True

    def terminate(self) -> bool:
        with self.connection() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            return cursor.rowcount > 0

    def disturb(self, mode: Mode) -> bool:
        network = self.random.choice([*self.hosts.values()]).network
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
        ballast = self.home / "ballast"
        if ballast.exists():
            return False
        with suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
        self._after(self.random.uniform(1, 4), ballast.unlink)
        return True

    def damage(self) -> bool:
        """Spoil a trial's newest checkpoint, and end the workers, so that it is needed."""
        # Only what has a digest is ever read.
        folders = sorted({path.parent for path in self.home.rglob("trial-*/*.pt.sha256")})
        if not folders:
            return False
        for place in self.places:
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
    def connection(self) -> Iterator["psycopg2.extensions.cursor"]:
        """Past the disturbed networks."""
        connection = psycopg2.connect(
            host=self.url.query["host"], user=self.url.username, dbname=self.url.database
        )
        try:
            with connection, connection.cursor() as cursor:
                yield cursor
        finally:
            connection.close()

    def trials(self, condition: str = "true") -> int:
        """How many there are in this study."""
        with suppress(psycopg2.errors.UndefinedTable), self.connection() as cursor:
            cursor.execute(
                "SELECT count(*) FROM public.trials JOIN public.studies USING (study_id) "
                f"WHERE study_name = %s AND {condition}",
                (self.study.stem,),
            )
            return int(cursor.fetchone()[0])
        return 0

    def _limit(self) -> int:
        """Allow some trials more than there are, and no others. Returns how many that is in all."""
        with self.connection() as cursor:
            # Claims hold this row while they count.
            name = "(SELECT study_id FROM public.studies WHERE study_name = %s)"
            cursor.execute(
                f"SELECT 1 FROM atelier.study WHERE study_id = {name} FOR UPDATE", (self.study.stem,)
            )
            cursor.execute(
                f"SELECT count(*) FROM public.trials WHERE study_id = {name}", (self.study.stem,)
            )
            wanted = int(cursor.fetchone()[0]) + EXTRA_TRIALS
            cursor.execute(
                f"UPDATE atelier.study SET max_trials = %s WHERE study_id = {name}",
                (wanted, self.study.stem),
            )
        return wanted


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
    chaos = Chaos(folder, data, seed, server)
    os.environ["ATELIER_HOME"] = str(chaos.home)
    with small_disk(chaos.home, DISK):
        try:
            chaos.run(seconds)
        finally:
            chaos.close()
        engine = database.connect(make_url(server.acquire()))
        with engine.connect() as connection:
            evidence = gather(connection, load_study_file(chaos.study, []))
        engine.dispose()
        found = violations(evidence, References())
    ends: Counter[int] = sum((place.ends for place in chaos.places), Counter())
    found += [f"{ends[code]} workers ended with {code}" for code in set(ends) - ENDS]
    return {
        "seed": seed,
        "faults": {name: chaos.count[name] for name in chaos.faults},
        "trials": dict(Counter(trial.state for trial in evidence.trials)),
        "attempts": sum(len(trial.attempts) for trial in evidence.trials),
        "workers": dict(ends),
        "violations": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600.0, help="in which things break, in all")
    parser.add_argument("--seed", type=int, nargs="*", help="default: three fixed ones and one drawn")
    arguments = parser.parse_args()
    seeds = arguments.seed or [*SEEDS, random.SystemRandom().randrange(10**6)]
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.chmod(0o755)
    write_demo(folder / "demo", train=300, val=80, test=10)
    server = EmbeddedPostgres(folder / "server")
    results = []
    try:
        for seed in seeds:
            results.append(
                survive(folder, folder / "demo", seed, arguments.seconds / len(seeds), server)
            )
            print(json.dumps(results[-1]), flush=True)
    finally:
        server.stop()
    total: Counter[str] = Counter()
    for one in results:
        total.update(one["faults"])
    trials = sum(sum(one["trials"].values()) for one in results)
    print(f"{total.total()} faults over {trials} trials: {dict(total)}")
    if any(one["violations"] for one in results):
        print(f"violations; the workers' logs are in {folder}")
        return 1
    if never := [name for name, times in total.items() if not times]:
        print(f"not shown, for it never happened: {', '.join(never)}; give it more seconds")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

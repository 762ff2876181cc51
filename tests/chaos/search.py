"""A search to be disturbed: real workers on hosts of their own, each with its way to the database."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import psycopg2
from sqlalchemy.engine import make_url

from search import forking
from search.exit_codes import ExitCode
from search.verify.evidence import Evidence, gather
from search.verify.rules import Holds, violations
from storage import database
from tests.chaos.checker import References, half_written
from tests.chaos.proxy import Proxy
from tests.chaos.worker import CLOCK_VARIABLE, PROCESS_NAME, work

PATIENCE = 300  # seconds for a study to end once nothing disturbs it
AGAIN_AFTER = 1.0  # seconds until a worker that found nothing to do is replaced
ALONE = ["unshare", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
# How a worker may end: for want of trials or space, asked to, or killed. Else the fault is its own.
ENDS = {ExitCode.DONE, ExitCode.WRONG_INPUT, ExitCode.STOPPED, -signal.SIGTERM, -signal.SIGKILL}

STUDY = """
[study]
name = "{name}"
max_trials = 100000
sampler = "random"
strategy = "promote"
rungs = [1]
checkpoint_seconds = {checkpoint_seconds}

[space]
lr = [1e-3, 3e-3]
batch_size = [32, 64]

[train]
data = "{data}"
backbone = "test_resnet"
weights = "none"
trainable = "head"
image_size = 32
epochs = 6
warmup_epochs = 1
"""

Process = subprocess.Popen[bytes] | ForkServerProcess


def begin_imports() -> None:
    """Let the server that workers are forked from import what they need, beside what is done here."""
    root = str(Path(__file__).parents[2])
    # The server does not see where this process stands; without this, each worker would import its own.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    forking.context.set_forkserver_preload(["search.cli.preload", __name__])
    forking.start_server()


class Host:
    """A machine as the others see it: its process ids and name are its own, if root asks for them."""

    def __init__(self, name: str, socket: str, user: str, home: Path) -> None:
        self.network = Proxy(socket)
        self._own_name = name if name != "a" and os.geteuid() == 0 else None
        self.environment = os.environ | {
            "ATELIER_HOME": str(home),
            "ATELIER_DATABASE_URL": f"postgresql://{user}@127.0.0.1:{self.network.port}/atelier",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, study: Path, pack: str, log: Path, clock: Path, fresh: bool) -> Process:
        """A worker, whose time of day is off by what the file `clock` says; not forked, if `fresh`."""
        arguments = [str(study), "--pack", pack]
        environment = self.environment | {CLOCK_VARIABLE: str(clock)}
        if not fresh:
            return forking.start(work, arguments, self._own_name, environment=environment, output=log)
        # The shell stays, and exits with 128 + the signal that has ended the worker.
        shell = [*ALONE, "sh", "-c", f'hostname {self._own_name} && "$@"; exit $?', "sh"]
        command = [sys.executable, "-m", "tests.chaos.worker", *arguments]
        with log.open("ab") as output:
            return subprocess.Popen(
                [*(shell if self._own_name else []), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


class Place:
    """Where a worker runs; one that has ended is replaced. With `fresh` its first one is not forked."""

    def __init__(self, host: Host, pack: str, log: Path, fresh: bool = False) -> None:
        self.host, self.pack, self.log = host, pack, log
        self.log.touch()
        self.clock = log.with_suffix(".clock")
        self.set_clock(0)
        self.started = 0.0  # when the present worker was, in seconds since 1970
        self._process: Process | None = None
        self._fresh = fresh
        self._empty_until = 0.0
        self.paused = False
        self.ends: Counter[int] = Counter()  # exit codes

    def tend(self, study: Path) -> None:
        """See to it that a worker runs here."""
        if not self.has_worker() and time.monotonic() >= self._empty_until:
            self.paused = False
            self.started = time.time()
            self._process = self.host.start(study, self.pack, self.log, self.clock, self._fresh)
            self._fresh = False

    def has_worker(self) -> bool:
        """Whether one runs; notes how it has ended."""
        if self._process is not None and (code := _exit_code(self._process)) is not None:
            self.ends[128 - code if code > 128 else code] += 1
            self._process = None
            if code == ExitCode.DONE:  # the next one may find the same
                self.leave_empty(AGAIN_AFTER)
        return self._process is not None

    def leave_empty(self, seconds: float) -> None:
        """Replace no worker for so long."""
        self._empty_until = time.monotonic() + seconds

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
                if one.name() == PROCESS_NAME:
                    one.send_signal(number)
                    return True
        return False

    def end(self) -> None:
        """Kill it, whatever it does."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.kill()
            _wait(self._process)
            self._process = None


def _exit_code(process: Process) -> int | None:
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


def _wait(process: Process) -> None:
    process.wait() if isinstance(process, subprocess.Popen) else process.join()


class Stopwatch:
    """The seconds that each part has taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, part: str) -> None:
        """What has gone by since the last call, or the beginning, was this part."""
        now = time.monotonic()
        self.seconds[part] = round(now - self._since, 1)
        self._since = now


class Search:
    """One study, its workers, and the database under it.

    `workers` are the host and `--pack` of each, `fresh` the numbers of those that begin with a process
    that was not forked. What is written goes to `folder`, `home` and `url`.
    """

    def __init__(
        self,
        folder: Path,
        study: Path,
        home: Path,
        url: str,
        workers: Sequence[tuple[str, str]],
        fresh: Collection[int] = (),
    ) -> None:
        self.study, self.home, self._url = study, home, make_url(url)
        socket = f"{self._url.query['host']}/.s.PGSQL.{self._url.query.get('port', 5432)}"
        user = self._url.username or ""
        self.hosts = {name: Host(name, socket, user, home) for name, _ in workers}
        self.logs = folder
        self.logs.mkdir()
        self.places = [
            Place(self.hosts[host], pack, self.logs / f"{number}-{host}.log", number in fresh)
            for number, (host, pack) in enumerate(workers)
        ]

    def tend(self) -> None:
        """Replace the workers that have ended."""
        for place in self.places:
            place.tend(self.study)

    def begin(self) -> None:
        """Wait until a worker is at work. Raises TimeoutError."""
        deadline = time.monotonic() + PATIENCE
        while not self.at_work():
            self._wait(deadline, "no worker begins")
            self.tend()

    def end(self, more: int) -> None:
        """Allow so many further trials, and wait for the end of all and of the workers.

        Raises TimeoutError.
        """
        max_trials = self._allow(more)
        deadline = time.monotonic() + PATIENCE
        while self.trials("state IN ('COMPLETE', 'PRUNED', 'FAIL')") < max_trials:
            self._wait(deadline, "the study does not end")
            self.tend()
        while any(place.has_worker() for place in self.places):
            self._wait(deadline, "a worker does not end")

    def _wait(self, deadline: float, reason: str) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{reason}; the workers' logs are in {self.logs}")
        time.sleep(0.1)

    def close(self) -> None:
        """Kill the workers."""
        for place in self.places:
            place.end()
        for host in self.hosts.values():
            host.network.close()

    @property
    def ends(self) -> Counter[int]:
        """The workers' exit codes; that of a signal is negative."""
        return sum((place.ends for place in self.places), Counter())

    def judge(self, references: References) -> tuple[Evidence, list[str]]:
        """All that is on record, and what does not hold."""
        os.environ["ATELIER_HOME"] = str(self.home)
        engine = database.connect(self._url)
        with engine.connect() as connection:
            evidence = gather(connection, self.study.stem)
        broken = violations(evidence, Holds.UNDISTURBED, references.curve)
        found = [f"{one.rule}: {one}" for one in broken]
        found += half_written(engine, evidence.entry.study_id, evidence.runs)
        engine.dispose()
        found += [f"{self.ends[code]} workers ended with {code}" for code in set(self.ends) - ENDS]
        return evidence, found

    @contextmanager
    def connection(self) -> Iterator["psycopg2.extensions.cursor"]:
        """Past the disturbed networks."""
        connection = psycopg2.connect(
            host=self._url.query["host"], user=self._url.username, dbname=self._url.database
        )
        try:
            with connection, connection.cursor() as cursor:
                yield cursor
        finally:
            connection.close()

    def at_work(self) -> dict[Place, list[int]] | None:
        """The numbers of the trials that each worker holds. None while the database is away."""
        held: dict[Place, list[int]] = {}
        try:
            with self.connection() as cursor:
                cursor.execute(
                    "SELECT log, extract(epoch FROM started), trials.number FROM atelier.worker "
                    "JOIN (SELECT * FROM atelier.attempt WHERE released IS NULL) AS open "
                    "ON worker_id = id JOIN public.trials USING (trial_id) ORDER BY trials.number"
                )
                rows = cursor.fetchall()
        except (psycopg2.OperationalError, psycopg2.errors.UndefinedTable):
            return None
        for log, started, number in rows:
            for place in self.places:
                # Not what its predecessor there holds still.
                if log == str(place.log) and started > place.started:
                    held.setdefault(place, []).append(number)
        return held

    def said(self, words: str) -> int:
        """How often these words are in the workers' logs."""
        return sum(place.log.read_text(errors="replace").count(words) for place in self.places)

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

    def _allow(self, more: int) -> int:
        """Allow some trials more than there are. Returns how many that is in all."""
        with self.connection() as cursor:
            # Claims hold this row while they count.
            name = "(SELECT study_id FROM public.studies WHERE study_name = %s)"
            cursor.execute(
                f"SELECT 1 FROM atelier.study WHERE study_id = {name} FOR UPDATE", (self.study.stem,)
            )
            cursor.execute(
                f"SELECT count(*) FROM public.trials WHERE study_id = {name}", (self.study.stem,)
            )
            wanted = int(cursor.fetchone()[0]) + more
            cursor.execute(
                f"UPDATE atelier.study SET max_trials = %s WHERE study_id = {name}",
                (wanted, self.study.stem),
            )
        return wanted

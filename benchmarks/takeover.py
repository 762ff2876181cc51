"""How long a trial waits for another worker after its own died on another host.

    python -m benchmarks.takeover [--trials 200]

Each of --trials processes holds a trial, with the default lease and renewal. Each is killed at a random
moment. One more worker asks for a trial as often as a worker with a free place does. It cannot tell
which processes live. Nothing is trained. The server is an embedded PostgreSQL in a temporary folder.
"""

import argparse
import math
import multiprocessing
import random
import statistics
import threading
import time
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Semaphore

import optuna
import sqlalchemy as sa

from benchmarks.server import temporary_home
from storage import database
from storage.leases import RENEW_SECONDS, LeaseKeeper
from storage.ledger import LEASE_SECONDS, Ledger
from storage.tables import ATTEMPTS, WORKERS
from tests.studies import fill, open_storage

SPREAD = 300.0  # seconds until all processes have been killed


def hold(study_id: int, storage: optuna.storages.BaseStorage, ready: Semaphore) -> None:
    """Claim a trial, and hold it until this process ends."""
    ledger = Ledger(database.connect(), storage, study_id, probe_liveness=lambda _: {})
    ledger.register()
    claim = ledger.claim()
    assert claim is not None
    with LeaseKeeper(ledger) as keeper:
        keeper.hold(claim)
        ready.release()
        while True:
            time.sleep(1000)


def kill(holders: list[BaseProcess], died: dict[int, datetime]) -> None:
    """Kill the holders one after another, at random moments. `died` gets the moments by process id."""
    deaths = sorted(random.uniform(0, SPREAD) for _ in holders)
    for holder, before, death in zip(holders, [0.0, *deaths], deaths, strict=False):
        time.sleep(death - before)
        assert holder.pid is not None
        died[holder.pid] = datetime.now(UTC)
        holder.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    count = parser.parse_args().trials
    with temporary_home():
        engine = database.connect()
        storage = open_storage(engine)
        study_id = fill(engine, ["waiting"] * count, name="takeover", max_trials=count)
        engine.dispose()  # before the fork
        storage._backend.engine.dispose()  # type: ignore[attr-defined]
        context = multiprocessing.get_context("fork")
        ready = context.Semaphore(0)
        holders = [context.Process(target=hold, args=(study_id, storage, ready)) for _ in range(count)]
        for holder in holders:
            holder.start()
        for _ in holders:
            ready.acquire()
        died: dict[int, datetime] = {}
        threading.Thread(target=kill, args=(holders, died), daemon=True).start()
        successor = Ledger(engine, storage, study_id, probe_liveness=lambda _: {})
        successor.register()
        taken: list[int] = []
        while len(taken) < count:
            time.sleep(RENEW_SECONDS)
            while claim := successor.claim(taken):
                taken.append(claim.trial_id)
        next_attempt = ATTEMPTS.alias()
        query = (
            sa.select(WORKERS.c.pid, next_attempt.c.claimed)
            .join(ATTEMPTS, ATTEMPTS.c.worker_id == WORKERS.c.id)
            .join(
                next_attempt,
                (next_attempt.c.trial_id == ATTEMPTS.c.trial_id)
                & (next_attempt.c.number == ATTEMPTS.c.number + 1),
            )
            .where(ATTEMPTS.c.outcome == "lost")
        )
        with engine.connect() as connection:
            waits = sorted(
                (claimed - died[pid]).total_seconds() for pid, claimed in connection.execute(query)
            )
    print(
        f"{len(waits)} trials taken over after {waits[0]:.0f} to {waits[-1]:.0f} s: median "
        f"{statistics.median(waits):.0f}, p95 {waits[math.ceil(0.95 * len(waits)) - 1]:.0f} "
        f"(lease {LEASE_SECONDS:.0f} s, renewed and asked for every {RENEW_SECONDS:.0f} s)"
    )


if __name__ == "__main__":
    main()

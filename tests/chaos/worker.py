"""`atelier worker` with leases of seconds, of which minutes see many end, and a clock that jumps."""

import os
import sys
import threading
import time
from functools import partialmethod
from pathlib import Path

import time_machine

from search.cli import main
from storage.leases import LeaseKeeper
from storage.ledger import Ledger
from tests.chaos import hosts

LEASE_SECONDS, RENEW_SECONDS = 3.0, 0.75
CLOCK_VARIABLE = "CHAOS_CLOCK"  # names a file with the seconds by which the time of day is off
PROCESS_NAME = "chaos-worker"  # of a process that has come so far as to be a worker


def work(arguments: list[str], host: str | None) -> None:
    """Run one in this process, which moves to a host of its own if that has a name."""
    if host is not None:
        hosts.move_to(host)
    hosts.call_process(PROCESS_NAME)
    Ledger.__init__ = partialmethod(Ledger.__init__, lease_seconds=LEASE_SECONDS)  # type: ignore[method-assign]
    LeaseKeeper.__init__ = partialmethod(LeaseKeeper.__init__, every=RENEW_SECONDS)  # type: ignore[method-assign]
    if CLOCK_VARIABLE in os.environ:
        clock = Path(os.environ[CLOCK_VARIABLE])
        threading.Thread(target=_follow, args=(clock,), daemon=True).start()
    main(["worker", *arguments])


def _follow(clock: Path) -> None:
    traveller = time_machine.travel(time.time()).start()
    while True:
        right = time_machine.escape_hatch.time.time()
        traveller.move_to(right + float(clock.read_text() or 0))
        time.sleep(0.1)


if __name__ == "__main__":
    work(sys.argv[1:], host=None)

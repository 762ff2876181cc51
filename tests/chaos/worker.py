"""`atelier worker` with leases of seconds, of which minutes see many end, and a clock that jumps."""

import os
import threading
import time
from functools import partialmethod
from pathlib import Path

import time_machine

from search.cli import main
from storage.ledger import LeaseKeeper, Ledger

LEASE_SECONDS, RENEW_SECONDS = 6.0, 1.5
CLOCK_VARIABLE = "CHAOS_CLOCK"  # names a file with the seconds by which the time of day is off


def _follow(clock: Path) -> None:
    traveller = time_machine.travel(time.time()).start()
    while True:
        right = time_machine.escape_hatch.time.time()
        traveller.move_to(right + float(clock.read_text() or 0))
        time.sleep(0.5)


if __name__ == "__main__":
    Ledger.__init__ = partialmethod(Ledger.__init__, lease_seconds=LEASE_SECONDS)
    LeaseKeeper.__init__ = partialmethod(LeaseKeeper.__init__, every=RENEW_SECONDS)
    if CLOCK_VARIABLE in os.environ:
        clock = Path(os.environ[CLOCK_VARIABLE])
        threading.Thread(target=_follow, args=(clock,), daemon=True).start()
    main()

"""Renew a worker's leases from a thread while it trains."""

import threading
import time

from storage.ledger import Claim, LeaseLost, Ledger

RENEW_SECONDS = 30.0


class LeaseKeeper:
    """Renews claims from its own thread until the `with` block ends.

    No database error ends it. `Ledger.renew` retries with back-off, and after that the next round
    tries again.
    """

    def __init__(self, ledger: Ledger, every: float = RENEW_SECONDS) -> None:
        self._ledger, self._every = ledger, every
        self._done = threading.Event()
        self._held: set[Claim] = set()
        self._lost: set[Claim] = set()
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)

    def hold(self, claim: Claim) -> None:
        """Renew the claim from now on, until its attempt is closed."""
        self._lost.discard(claim)  # an equal claim may have been withdrawn
        self._held.add(claim)

    def let_go(self, claim: Claim) -> None:
        """Stop renewing the claim."""
        self._held.discard(claim)

    def held(self) -> list[Claim]:
        """The claims that are renewed; some may have ended by now."""
        return list(self._held)

    def has_lost(self, claim: Claim) -> bool:
        """Whether another worker has taken over the trial."""
        return claim in self._lost

    def __enter__(self) -> "LeaseKeeper":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _run(self) -> None:
        while not self._done.wait(self._every):
            for claim in list(self._held):
                try:
                    self._ledger.renew(claim)
                except LeaseLost:
                    if claim in self._held:
                        self._held.discard(claim)
                        self._lost.add(claim)
                except Exception:  # the renewing must go on after any error of the database
                    time.sleep(1)

"""`atelier worker` with leases of seconds, so that minutes see many of them end."""

from functools import partialmethod

from search.cli import main
from storage.ledger import LeaseKeeper, Ledger

LEASE_SECONDS, RENEW_SECONDS = 6.0, 1.5

if __name__ == "__main__":
    Ledger.__init__ = partialmethod(Ledger.__init__, lease_seconds=LEASE_SECONDS)
    LeaseKeeper.__init__ = partialmethod(LeaseKeeper.__init__, every=RENEW_SECONDS)
    main()

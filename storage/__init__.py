"""Where things are kept: the database, the ledger of who trains what, and the run folder."""

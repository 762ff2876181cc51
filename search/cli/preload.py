"""Imports all that a worker needs, in the fork server of search/forking.py.

Garbage collection is off meanwhile, which saves a tenth of the time. What is imported by then is never
collected, so forked processes keep sharing its memory.
"""
# ruff: noqa: F401

import gc
from contextlib import suppress

gc.disable()

# If memory is short, the code that needs these modules meets the same error, and reports it.
with suppress(ImportError, MemoryError, OSError):
    import search.cli.searching
    import search.cli.training

gc.freeze()
gc.enable()

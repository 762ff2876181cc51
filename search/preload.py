"""Imports all that a worker needs: see search/forking.py.

Garbage collection is off meanwhile, which saves a tenth of the time. What is there by the end is never
collected, so that forked processes go on sharing it.
"""
# ruff: noqa: F401

import gc
from contextlib import suppress

gc.disable()

# For want of memory: whoever needs them meets the same error, and somebody hears it.
with suppress(ImportError, MemoryError, OSError):
    import search.cli.searching
    import search.cli.training

gc.freeze()
gc.enable()

"""Imports all that a worker needs: see search/forking.py.

Garbage collection is off meanwhile, which saves a tenth of the time. What is there by the end is never
collected, so that forked processes go on sharing it.
"""
# ruff: noqa: E402, F401

import gc

gc.disable()

import search.confirmation
import search.slurm.job
import search.worker
import trainer.workspace

gc.freeze()
gc.enable()

"""Confirm a search: rerun its best trials on fresh seeds, and say which one is reliably the best."""

"""Starts `atelier` with this project's own packages, whatever folders of such names are on the path."""

import sys
from pathlib import Path

# `search` and `storage` are common names: PYTHONPATH may lead to others.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from search.cli import main

if __name__ == "__main__":
    main()

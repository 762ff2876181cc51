"""Starts `atelier` with this project's own packages, whatever folders of such names are on the path."""

import atexit
import gc
import sys
from pathlib import Path

# `search` and `storage` are common names: PYTHONPATH may lead to others.
sys.path.insert(0, str(Path(__file__).resolve().parent))


def main() -> None:
    """Run the command. Modules are no garbage: to look through them takes a third of a short command."""
    # While they are imported: `search.cli` looks for garbage again when it has the verb. Not at the top
    # of this file, which workers import too. And at the end, when Python takes everything apart.
    gc.disable()
    atexit.register(gc.freeze)
    from search import cli

    cli.main()


if __name__ == "__main__":
    main()

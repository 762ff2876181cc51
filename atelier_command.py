"""Starts `atelier` with this project's own packages, whatever folders of such names are on the path."""

import atexit
import gc
import os
import sys
import threading
from pathlib import Path
from typing import NoReturn

# `search` and `storage` are common names: PYTHONPATH may lead to others.
sys.path.insert(0, str(Path(__file__).resolve().parent))


def main() -> NoReturn:
    """Run the command, and end the process as Python does, but without taking every module apart.

    That alone takes a fifth of a short command's time, for memory that the system frees anyway.
    """
    # What is imported stays. `search.cli` looks for garbage again when it has imported the verb. Not at
    # the top of this file, which workers import too.
    gc.disable()
    from search import cli

    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

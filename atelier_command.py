"""Starts `atelier` with this project's own packages, whatever folders of such names are on the path."""

import atexit
import gc
import os
import sys
import threading
from pathlib import Path
from typing import NoReturn

# What is imported stays until the end, so looking for garbage meanwhile is in vain.
gc.disable()

# `search` and `storage` are common names: PYTHONPATH may lead to others.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from search import cli  # noqa: E402  # what it imports is the most of it


def main() -> NoReturn:
    """Run the command, and end the process as Python does, but without taking every module apart.

    That alone takes a tenth of a second, for memory that the system frees anyway.
    """
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

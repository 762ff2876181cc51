"""Sizes of memory in the forms of SLURM."""

import re

BYTE, MIB = 1, 1 << 20
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(?:([KMGTP])B?)?", re.ASCII | re.IGNORECASE)


def size(text: str, bare: int) -> float | None:
    """A size in bytes. A number without a unit counts `bare` bytes each. None for what is no size."""
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    unit = 1024.0 ** (1 + "KMGTP".index(match[2].upper())) if match[2] else bare
    return float(match[1]) * unit


def mebibytes(text: str) -> float:
    """A size in MiB, as sbatch and sacctmgr take a bare number to be. Raises ValueError for another."""
    found = size(text, bare=MIB)
    if found is None:
        raise ValueError(f"{text!r} is not understood")
    return found / MIB

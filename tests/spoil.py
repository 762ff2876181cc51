"""Damages a file, as a bad disk does: for tests/chaos and tests/simulation."""

import random
from pathlib import Path


def spoil(path: Path, chance: random.Random, size: int | None = None) -> None:
    """Flip one bit of a file, or cut it off, within its first `size` bytes."""
    with path.open("r+b") as file:
        data = bytearray(file.read() or b"?")  # it may be torn already
        where = chance.randrange(min(size or len(data), len(data)))
        if chance.random() < 0.5:
            data[where] ^= 1 << chance.randrange(8)
        else:
            del data[where:]
        file.seek(0)
        file.write(data)
        file.truncate()

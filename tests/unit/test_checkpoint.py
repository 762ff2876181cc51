"""A folder of checkpoints: what is kept, what does not count, and a kill at any moment."""

import subprocess
import sys

import pytest

from trainer.checkpoint import Checkpoints

# Saves a third checkpoint, and dies at the number-th of the calls that change a disk; once with what is
# not synced yet lost, as in a power failure. For each number in turn, until a save comes to its end.
KILLED_SAVES = """
import os, signal, sys
from itertools import count
from pathlib import Path
import torch
from trainer.checkpoint import Checkpoints

torch.set_num_threads(1)

def deadly(name, number, calls, torn):
    real = getattr(os, name)
    def call(*arguments, **options):
        if next(calls) == number:
            if torn and name == "fsync":
                file = Path(f"/proc/self/fd/{arguments[0]}")
                if file.is_file():
                    os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(os, name, call)

def save_and_die(folder, number, torn):
    checkpoints = Checkpoints(folder)
    for epoch in (1, 2):
        checkpoints.save(epoch, epoch, {"epoch": epoch, "predictions": []})
    calls = count()
    for name in ("fsync", "replace", "unlink"):
        deadly(name, number, calls, torn)
    checkpoints.save(3, 3, {"epoch": 3, "predictions": []})
    os._exit(0)

for torn in (False, True):
    for number in count():
        child = os.fork()
        if not child:
            save_and_die(Path(sys.argv[1]) / f"{number:02d}-{torn}", number, torn)
        if os.waitpid(child, 0)[1] == 0:
            break
"""


def state(**values):
    return values | {"predictions": []}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def pairs(*stems):
    return [f"attempt-0001-{stem}.pt{suffix}" for stem in stems for suffix in ("", ".sha256")]


def test_a_save_killed_at_any_moment_spoils_nothing(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED_SAVES, str(tmp_path)], check=True)
    folders = sorted(tmp_path.iterdir())
    newest = []
    for folder in folders:
        checkpoints = Checkpoints(folder)
        whole = [state["epoch"] for state in checkpoints.newest_first()]
        assert whole in ([2, 1], [3, 2, 1], [3, 2])
        newest.append(whole[0])
        checkpoints.save(4, 4, state(epoch=4))
        # A kill before the last removal leaves one pair more, until now.
        assert names(folder) == pairs(
            f"epoch-{whole[0]:04d}-step-{whole[0]:08d}", "epoch-0004-step-00000004"
        )
    assert len(folders) > 20
    assert {2, 3} == set(newest)


def test_the_newest_two_are_kept_and_leftovers_are_swept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / ".attempt-0001-epoch-0000-step-00000001.pt.dead").write_bytes(b"half")
    (tmp_path / "attempt-0001-epoch-0000-step-00000001.pt").write_bytes(b"whole, but has no digest")
    checkpoints.save(1, 5, state(x=5))
    checkpoints.save(1, 8, state(x=8))
    checkpoints.save(2, 8, state(x="evaluated"))  # a name of its own: a kill must not mix the two
    assert names(tmp_path) == pairs("epoch-0001-step-00000008", "epoch-0002-step-00000008")
    assert list(checkpoints.newest_first()) == [state(x="evaluated"), state(x=8)]
    checkpoints.clear()
    assert not tmp_path.exists()


def test_a_late_one_of_a_replaced_worker_does_not_count(tmp_path):
    paused, successor = Checkpoints(tmp_path, 1), Checkpoints(tmp_path, 2)
    paused.save(1, 7, state(by="both"))
    assert successor.latest() == state(by="both")
    successor.save(1, 9, state(by="successor"))
    in_the_middle = tmp_path / ".attempt-0002-epoch-0002-step-00000014.pt.5eed"
    in_the_middle.touch()
    paused.save(3, 21, state(by="paused"))
    assert in_the_middle.exists()
    assert successor.latest() == state(by="successor")
    paused.withdraw()
    assert not list(tmp_path.glob("*0003*"))
    successor.clear()
    paused.save(4, 28, state(by="paused"))
    paused.withdraw()
    assert not tmp_path.exists()


def test_a_save_that_is_not_allowed_writes_nothing(tmp_path):
    def refuse():
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        Checkpoints(tmp_path / "run", before_save=refuse).save(0, 1, {})
    assert not (tmp_path / "run").exists()

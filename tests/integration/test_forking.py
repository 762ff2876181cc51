"""Processes that are forked ready: what they are given, how they end, and who is asked."""

import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest

from search import forking
from trainer.dataset import DatasetError


def seen(path):
    """What a forked process finds: its environment, modules, threads and session."""
    print("to the log")
    assert {"torch", "timm", "optuna"} <= sys.modules.keys()
    assert threading.active_count() == 1
    assert os.getsid(0) == os.getpid()
    assert multiprocessing.parent_process().is_alive()
    path.write_text(os.environ["ONLY_HERE"])
    sys.exit(3)


def fails():
    raise ValueError("a fault of ours")


def sleeps():
    time.sleep(60)


def refuse(what):
    raise DatasetError(f"no {what}")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def starts_and_is_killed(path, temporary):
    """Starts another process, which notes when it has seen that this one was killed."""
    os.environ["TMPDIR"] = str(temporary)
    forking.start(watches, path, environment={}, output=path.with_suffix(".log"))
    killed()


def watches(path):
    while multiprocessing.parent_process().is_alive():
        time.sleep(0.01)
    path.touch()


def test_a_process_has_its_environment_its_log_and_all_imports(tmp_path):
    log = tmp_path / "log"
    process = forking.start(seen, tmp_path / "seen", environment={"ONLY_HERE": "yes"}, output=log)
    process.join()
    assert process.exitcode == 3, log.read_text()
    assert (tmp_path / "seen").read_text() == "yes"
    assert log.read_text() == "to the log\n"


def test_an_error_is_in_the_log(tmp_path):
    process = forking.start(fails, environment={}, output=tmp_path / "log")
    process.join()
    assert process.exitcode == 1
    assert "a fault of ours" in (tmp_path / "log").read_text()


def test_a_killed_process_says_by_what(tmp_path):
    process = forking.start(sleeps, environment={}, output=tmp_path / "log")
    assert process.exitcode is None
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_process_sees_that_its_starter_was_killed(tmp_path):
    """The folder for temporary files may have a long name, though a socket in it may not."""
    path, temporary = tmp_path / "seen", tmp_path / ("long" * 20)
    temporary.mkdir()
    spawn = multiprocessing.get_context("spawn")
    starter = spawn.Process(target=starts_and_is_killed, args=(path, temporary))
    starter.start()
    starter.join()
    assert starter.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_to_the_whole_group_leaves_the_server(tmp_path):
    """As SLURM and `timeout` send it: the starter goes on, and still hears how its processes end."""
    spawn = multiprocessing.get_context("spawn")
    starter = spawn.Process(target=hears_of_its_processes, args=(tmp_path / "log",))
    starter.start()
    starter.join()
    assert starter.exitcode == 0


def hears_of_its_processes(log):
    os.setsid()
    heard = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: heard.append(number))
    forking.start_server()
    os.killpg(0, signal.SIGINT)  # while it imports
    process = forking.start(sleeps, environment={}, output=log)
    os.killpg(0, signal.SIGTERM)
    assert heard == [signal.SIGINT, signal.SIGTERM]
    assert process.is_alive()
    process.terminate()
    process.join()
    assert process.exitcode == -signal.SIGTERM
    assert forking.call(os.path.join, "a", "b") == "a/b"


def test_a_call_returns_or_raises_what_the_function_does():
    assert forking.call(os.path.join, "a", "b") == "a/b"
    with pytest.raises(DatasetError, match="no images"):
        forking.call(refuse, "images")
    with pytest.raises(forking.CallFailedError, match="process of killed has ended with -9; is there"):
        forking.call(killed)

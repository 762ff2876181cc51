"""`atelier` in the shells that people have: widths, pipes, encodings, closed streams and limits."""

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from search import forking
from search.cli import app
from search.error_lines import one_line
from tests.studies import fill

ROOT = Path(__file__).parents[2]
ATELIER = f"{sys.executable} -m atelier_command"
LOG = "/home/somebody/a-project/.atelier/runs/demo-20261125-101010/logs/worker-1.log"
ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def environment(**changed):
    kept = {
        key: value for key, value in os.environ.items() if key not in ("COLUMNS", "PYTHONIOENCODING")
    }
    return kept | {"PYTHONPATH": str(ROOT), "TERM": "xterm"} | changed


def shell(script, cwd, **changed):
    """What a script of the shell's says, both streams together, and its exit code."""
    words = ["bash", "-c", script.replace("atelier", ATELIER)]
    result = subprocess.run(
        words, cwd=cwd, env=environment(**changed), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return result.returncode, result.stdout.decode(errors="backslashreplace")


@pytest.fixture
def on_terminal(monkeypatch):
    """What a verb shows on a terminal of some width, without its styles."""

    def show(width, *words, **changed):
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        parts = []
        reader = threading.Thread(target=lambda: parts.extend(iter(lambda: read(ours), b"")))
        reader.start()
        former = os.dup(1)
        os.dup2(theirs, 1)
        os.close(theirs)
        try:
            with monkeypatch.context() as context, os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
                context.setattr("os.environ", environment(**changed))
                context.setattr("sys.stdout", stdout)
                app([*words], standalone_mode=False)
        finally:
            os.dup2(former, 1)
            os.close(former)
            reader.join()
            os.close(ours)
        return re.sub(r"\x1b\[[0-9;]*m", "", b"".join(parts).decode()).splitlines()

    return show


def read(descriptor):
    """What comes next from a terminal; nothing once its other end is closed."""
    with suppress(OSError):
        return os.read(descriptor, 65536)
    return b""


@pytest.fixture
def demo_study(engine, home):
    fill(engine, ["complete", "pruned", "running"], name="demo", log=LOG)
    fill(engine, ["complete"], name="größe 日本")


WIDTHS = [  # of the terminal, what the environment says, and what is meant
    (80, {}, 80),
    (80, {"COLUMNS": "0"}, 80),
    (200, {"COLUMNS": "80"}, 80),
    (80, {"TERM": "dumb", "COLUMNS": "abc"}, 80),
    (40, {"TERM": "dumb"}, 40),
    (40, {"NO_COLOR": "1", "COLUMNS": "²"}, 40),
]


@pytest.mark.parametrize(("width", "changed", "meant"), WIDTHS)
def test_on_a_terminal_every_column_is_shown_within_its_width(
    demo_study, on_terminal, width, changed, meant
):
    for verb, words in (
        ("trials", ("seconds", "weight", "dropout", "epsilon", "complete")),
        ("status", ("trial", "weight", "dropout", "epsilon", "complete")),
        ("logs", ("trial", "attempt", "worker", "job", "ended", "node-1:77", "12_3", "not yet")),
    ):
        lines = on_terminal(width, verb, "demo", **changed)
        if verb == "logs":  # below the table is a log's text, which a terminal wraps
            assert lines[-1].startswith(LOG)
            lines = lines[: lines.index("")]
        assert max(map(len, lines)) <= meant
        together = " ".join(" ".join(lines).split())
        assert [word for word in words if word not in together] == []


def test_a_path_that_is_folded_is_whole(demo_study, on_terminal):
    lines = on_terminal(80, "logs", "demo")
    place = lines[0].index("log")
    assert LOG in "".join(line[place:].strip() for line in lines[1 : lines.index("")])


@pytest.mark.parametrize("verb", ["logs", "trials", "status"])
def test_in_a_pipe_a_row_is_a_line_whatever_columns_says(demo_study, verb):
    for columns in ("0", "20", "abc", "²", "99999999999999999999", "-1"):
        result = CliRunner().invoke(app, [verb, "demo"], env={"COLUMNS": columns, "FORCE_COLOR": "1"})
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.output
        rows = [line for line in result.output.splitlines() if re.match(r" *\d+ +\w+ .*\d", line)]
        assert len(rows) == (4 if verb == "logs" else 3)  # one trial was resumed
        if verb == "logs":
            assert all("node-1:77" in row and row.rstrip().endswith(LOG) for row in rows)


NOT_TEXT = {
    "a study": (r"atelier status $'caf\xe9'", {}, r"argument 'caf\xe9' is no text in UTF-8"),
    "a file": (r"atelier data check $'caf\xe9'", {}, r"argument 'caf\xe9'"),
    "an option": (r"atelier export x -o $'caf\xe9.toml'", {}, r"argument 'caf\xe9.toml'"),
    "an option before the verb": (r"atelier $'--caf\xe9' x", {}, r"argument '--caf\xe9'"),
    "a verb of a group": (r"atelier db $'caf\xe9'", {}, r"argument 'caf\xe9'"),
    "a setting": (r"atelier search x.toml --set $'study.name=\xff'", {}, r"argument 'study.name=\xff'"),
    "the home": (r"ATELIER_HOME=$'\xe9' atelier db status", {}, "ATELIER_HOME is no text"),
    "a password": (
        r"ATELIER_DATABASE_URL=$'postgresql://u:s3\xe9cret@h/d' atelier db status",
        {},
        "ATELIER_DATABASE_URL is no text",
    ),
    "the folder": (r"mkdir $'\xe9'; cd $'\xe9'; atelier db status", {}, r"that you are in, '"),
    "a folder that is gone": (
        "mkdir g; cd g; rmdir ../g; atelier db status",
        {},
        "is gone; cd to another",
    ),
    "ASCII": ("atelier status größe", ASCII, "is no text in ASCII; give it another name, or set LC_ALL"),
}


@pytest.mark.parametrize("name", NOT_TEXT)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, name):
    script, changed, expected = NOT_TEXT[name]
    code, said = shell(script, tmp_path, **changed)
    assert (code, len(said.splitlines())) == (2, 1), said
    assert expected in said
    assert "cret" not in said


@pytest.mark.parametrize(
    "changed",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "POSIX"},
        {"USER": os.fsdecode(b"\xe9"), "HOSTNAME": os.fsdecode(b"\xff")},
    ],
)
def test_a_terminal_without_the_letters_gets_others(demo_study, tmp_path, changed):
    code, said = shell("atelier status größe\\ 日本", tmp_path, **changed)
    assert code == 0, said
    assert "Traceback" not in said
    assert "1/1 trials" in said


CLOSED = {
    "a pipe that nobody reads": ("atelier --help | true; exit ${PIPESTATUS[0]}", {0, 1}, 0),
    "a pipe that is read in part": ("atelier trials demo | head -1; exit ${PIPESTATUS[0]}", {0, 1}, 1),
    "no stdout": ("atelier trials demo >&-", {0}, 0),
    "no stderr": ("atelier status absent 2>&-", {2}, 0),
    "no stream at all": ("atelier status demo <&- >&- 2>&-", {0}, 0),
    "no stdin to ask": ("atelier user add me <&- 2>/dev/null >&2", {1}, 0),
    "a full disk for a table": ("atelier trials demo >/dev/full", {2}, 1),
    "a full disk for the help": ("atelier --help >/dev/full", {2}, 1),
    "a full disk for an error": ("atelier status absent 2>/dev/full", {2}, 0),
}


@pytest.mark.parametrize("name", CLOSED)
def test_an_end_of_the_output_is_quiet_or_one_line(demo_study, tmp_path, name):
    script, codes, lines = CLOSED[name]
    code, said = shell(script, tmp_path)
    assert code in codes, said
    assert len(said.splitlines()) == lines, said


LIMITS = {
    "open files": (
        "ulimit -n 32; atelier db start",
        1,
        "allows a process 32 open files (ulimit -n); a search",
    ),
    "hardly an open file": ("ulimit -n 12; atelier db start", 1, "say ulimit -n 1024"),
    "the size of files": ("ulimit -f 100; atelier db start", 1, "allows files of 0.1 MB (ulimit -f)"),
    "memory for torch": ("ulimit -v 1500000; atelier model study.toml", 1, "allows a process 1.5 GB"),
    "memory for an import": ("ulimit -v 280000; atelier model study.toml", 1, "(ulimit -v 280000)"),
    "memory for nothing": ("ulimit -v 100000; atelier db status", 1, "training needs about 8"),
    "memory for the one that forks": (
        "ulimit -v 1500000; atelier search study.toml",
        1,
        "(ulimit -v 150",
    ),
    "CPU time": ("ulimit -S -t 1; atelier model study.toml", 1, "the CPU time that this shell"),
    "no thread": ("OMP_NUM_THREADS=0 atelier db status", 2, "OMP_NUM_THREADS='0': allowed is a number"),
    "threads in words": (
        "OMP_NUM_THREADS=abc atelier db status",
        2,
        "allowed is a number from 1 to 4096",
    ),
    "too many threads": ("OMP_NUM_THREADS=999999999 atelier db status", 2, "unset it for all CPUs"),
    "CPUs of another script": ("ATELIER_CPUS=² atelier db status", 2, "ATELIER_CPUS='²'"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_said_in_one_line_with_what_is_needed(home, study_text, tmp_path, name):
    script, expected_code, expected = LIMITS[name]
    (tmp_path / "study.toml").write_text(study_text)
    code, said = shell(script, tmp_path)
    assert (code, len(said.splitlines())) == (expected_code, 1), said
    assert expected in said


def test_a_limit_of_threads_is_told_from_a_fault_of_ours(tmp_path):
    script = (
        "import os, resource, threading; from search.error_lines import one_line\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\n"
        "if os.getuid() == 0: os.setresuid(65534, 65534, 65534)\n"
        "for start in (threading.Thread(target=print).start, os.fork):\n"
        "    try: start()\n"
        "    except Exception as error: print(one_line(error))"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert said.count("this shell allows 1 (ulimit -u)") == 2, said


def test_a_folder_for_temporary_files_that_is_none():
    line = one_line(FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"))
    assert line == "no folder for temporary files is writable; set TMPDIR to one that is"
    assert one_line(ValueError("a fault of ours")) is None


def test_a_fork_server_that_is_killed_is_said(monkeypatch):
    """As the kernel does where a job has too little memory for torch."""
    forking.start_server()
    server = psutil.Process(forking.forkserver._forkserver._forkserver_pid)

    def kill_soon():
        server.suspend()
        while server.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        threading.Timer(0.3, server.kill).start()

    monkeypatch.setattr(forking, "start_server", kill_soon)
    with pytest.raises(forking.CallFailedError, match="is there enough memory"):
        forking.call(os.path.join, "a", "b")

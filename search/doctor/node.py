"""`atelier doctor --on-node`: a short job asks the same on a node, and both answers are compared."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dashboards.terminal import say
from search.doctor.check import Check, State, not_asked, ok, wrong
from search.doctor.database import CLOCK_SECONDS
from search.json_output import JSON_VERSION
from search.slurm.commands import SilenceError
from search.slurm.logs import log_folder
from search.slurm.queue import ENDED, jobs
from search.slurm.script import doctor_script
from search.slurm.submit import check_script, make_log_folder, submit_script
from search.study_config import StudyConfig
from storage.ownership import with_users_umask
from storage.studies import job_in_words, split_job

PATIENCE = 600  # seconds that the job may wait in the queue and work
LOG_SECONDS = 20  # until a file that a node has closed is seen here, on a shared file system
POLL_SECONDS = 1.0
BOTH = "here and there"


def on_node(
    file: StudyConfig, profile: str, arguments: list[str], here: Sequence[Check]
) -> Iterator[Check]:
    """The checks on a node, and what they say beside those made here. Raises InputError."""
    script = doctor_script(file, profile, arguments)
    make_log_folder()
    check_script(script)
    with with_users_umask():  # SLURM gives the job this umask
        job = submit_script(script)
    number, cluster = split_job(job)
    log = log_folder() / f"doctor-{number}.log"
    say(f"job {job_in_words(job)} asks on a node; its log is {log}")
    state = _wait(number, cluster, log)
    there = _answer(log)
    if there is not None:
        yield from (replace(check, where=f"on {check.where} (job {number})") for check in there)
        yield from (replace(check, where=BOTH) for check in _compare(here, there, log.parent))
    elif state is None:
        remedy = f"give the same command again when nodes are free; to end the job: scancel {number}"
        yield not_asked("node", f"job {number} has not answered in {PATIENCE} s", remedy)
    elif log.exists():
        lines = log.read_text("utf-8", "replace").strip().splitlines() or ["nothing"]
        yield wrong("node", f"job {number} ended ({state}) and said: {lines[-1]}", f"read {log}")
    else:
        remedy = "set ATELIER_HOME to a folder that the nodes share"
        yield wrong(
            "same folder", f"job {number} ended ({state}), and its log is not here: {log}", remedy
        )


def _wait(number: str, cluster: str, log: Path) -> str | None:
    """Wait for the answer or the job's end. Returns the state in which it ended; None if it has not."""
    deadline, ended = time.monotonic() + PATIENCE, None
    while _answer(log) is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        if ended is not None:
            continue
        try:
            job = jobs([number], cluster).find(number)
        except SilenceError:
            continue  # the controller is busy
        if job is None or job.state in ENDED:
            ended, deadline = job.state if job else "forgotten", time.monotonic() + LOG_SECONDS
    return ended


def _answer(log: Path) -> list[Check] | None:
    """What `atelier doctor --json` has written into a log, after what the profile's setup printed."""
    try:
        text = log.read_text("utf-8", "replace")
        start = max(match.start() for match in re.finditer(r'\{\s*"version":', text))
        answer = json.JSONDecoder().raw_decode(text[start:])[0]
    except (FileNotFoundError, ValueError):
        return None  # not yet
    if answer["version"] != JSON_VERSION:
        return None
    return [_check(row) for row in answer["checks"]]


def _check(row: dict[str, Any]) -> Check:
    return Check(**row | {"state": State(row["state"])})


def _compare(here: Sequence[Check], there: Sequence[Check], folder: Path) -> Iterator[Check]:
    """The folder is the same, since the node's log came into it."""
    mine, nodes = ({check.name: check for check in checks} for checks in (here, there))
    yield ok("same folder", f"what the node wrote is in {folder}")
    for name in ("python", "packages"):
        if mine[name].found == nodes[name].found:
            yield ok(f"same {name}", "on the node as here")
        else:
            found = f"the node has {nodes[name].found}; here is {mine[name].found}"
            yield wrong(f"same {name}", found, "let all machines use the same .venv, on a shared folder")
    leads = [checks["clock"].seconds for checks in (mine, nodes) if "clock" in checks]
    if len(leads) < 2 or leads[0] is None or leads[1] is None:
        yield not_asked("same clock", "without a database on both sides nobody can compare")
        return
    lead = leads[1] - leads[0]
    found = f"the node's is {abs(lead):.1f} s {'ahead' if lead >= 0 else 'behind'}"
    if abs(lead) < CLOCK_SECONDS:
        yield ok("same clock", found)
    else:
        yield wrong("same clock", found, "let an administrator set the node's clock by NTP")

"""Call SLURM's commands, and tell an answer from a refusal and from silence."""

import os
import subprocess
from functools import cache
from typing import NamedTuple

from dashboards.terminal import printable

PATIENCE = 20  # seconds that a command may take
# A user's own habits (SQUEUE_PARTITION hides jobs), and what another job has left in its environment.
FOREIGN = ("SLURM_", "SBATCH_", "SQUEUE_", "SINFO_", "SCONTROL_")
# Where the cluster is, and who asks.
NEEDED = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"}

# SLURM's words for a controller that is away or busy, and for a machine that belongs to no cluster.
SILENCE = (
    "nable to contact",
    "Socket timed out",
    "Zero Bytes were transmitted",
    "Connection refused",
    "Could not establish a configuration source",
)


class SlurmError(RuntimeError):
    """SLURM refused, or answered what is not understood; the message is one line."""


class SilenceError(SlurmError):
    """No answer from SLURM: there is none here, or its controller is away or busy."""


class Answer(NamedTuple):
    """What a command that succeeded has printed."""

    output: str
    complaint: str  # on stderr


def call(*command: str, text: str = "", environment: dict[str, str] | None = None) -> Answer:
    """Run a command with `text` as its input. Raises SlurmError, SilenceError."""
    try:
        result = subprocess.run(
            command,
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # what cannot be decoded is not understood, which the caller notices
            timeout=PATIENCE,
            env=clean_environment() if environment is None else environment,
        )
    except OSError as error:
        raise SilenceError(f"no {command[0]} on this machine ({error.strerror})") from None
    except subprocess.TimeoutExpired:
        raise SilenceError(f"{command[0]} did not answer in {PATIENCE} s") from None
    complaint = result.stderr.strip()
    if result.returncode != 0:
        said = one_line(complaint or result.stdout) or "nothing"
        kind = SilenceError if any(words in said for words in SILENCE) else SlurmError
        raise kind(f"{' '.join(command[:2])} ended with {result.returncode} and said: {said}")
    return Answer(result.stdout, complaint)


def clean_environment(*left_open: str) -> dict[str, str]:
    """This process's environment without what SLURM's commands would read in it.

    `left_open` are names of variables that stay.
    """
    stays = NEEDED.union(left_open)
    return {k: v for k, v in os.environ.items() if k in stays or not k.startswith(FOREIGN)}


def not_understood(command: str, text: str) -> SlurmError:
    """What to raise about an answer that says nothing to us."""
    return SlurmError(f"{command} of {version()} answered what is not understood: {one_line(text)!r}")


@cache
def version() -> str:
    """SLURM's version, for messages."""
    try:
        return call("squeue", "--version").output.strip() or "an unknown SLURM"
    except SlurmError:
        return "an unknown SLURM"


def one_line(text: str) -> str:
    """Another program's text in one line of bearable length."""
    line = " | ".join(printable(part) for part in text.splitlines() if part.strip())
    return line if len(line) <= 300 else f"{line[:300]} ..."

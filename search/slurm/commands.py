"""Call SLURM's commands, and tell an answer from a refusal and from silence."""

import subprocess
from functools import cache
from typing import NamedTuple

from dashboards.terminal import printable
from search.slurm.environment import clean_environment

PATIENCE = 20  # seconds that a command may take
NO_CLUSTER = "Could not establish a configuration source"
# What SLURM's commands say when the controller is away or busy, or the machine is in no cluster.
SILENCE = (
    "nable to contact",
    "Socket timed out",
    "Zero Bytes were transmitted",
    "Connection refused",
)


class SlurmError(RuntimeError):
    """SLURM refused, or answered what is not understood; the message is one line."""


class SilenceError(SlurmError):
    """No answer from SLURM: there is none here, or its controller is away or busy."""


class NoClusterError(SilenceError):
    """SLURM's commands are here, but they know no cluster."""


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
            errors="replace",  # the caller then notices that it does not understand
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
        kind = NoClusterError if NO_CLUSTER in said else kind
        raise kind(f"{' '.join(command[:2])} ended with {result.returncode} and said: {said}")
    return Answer(result.stdout, complaint)


def not_understood(command: str, text: str) -> SlurmError:
    """The error for an answer that Atelier does not understand."""
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

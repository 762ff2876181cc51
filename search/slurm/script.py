"""Render the batch script of workers or of a long run. Nothing is run or written here."""

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from search.errors import InputError
from search.profile import SlurmProfile
from search.slurm.commands import SlurmError, call
from search.slurm.environment import LEFT_OPEN, kept_from_commands
from search.slurm.logs import log_folder
from search.study_config import StudyConfig
from storage import libpq
from storage.paths import home
from storage.url import configured_url, database_url, is_local, server_host
from trainer.allocation import FEATURES
from trainer.config import TrainConfig

ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%0*[1-9]\d*)?")
DOCTOR_MINUTES = "3"  # it takes one, but packages on a cold file system may take two
TASK_LOG = "%A_%a.log"  # array and task
SHORT = {"array": "-a", "output": "-o", "qos": "-q", "partition": "-p", "account": "-A", "time": "-t"}
SHORT |= {"cpus-per-task": "-c"}
MOST_NAMES = 5  # of variables in one message
# With one of these sbatch would not just submit the script and print the job's id.
OTHER_USES = ("--wrap", "--wait", "-W", "--test-only", "--parsable", "--help", "--version")


def render_script(
    profile: SlurmProfile,
    array: str | None,
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    log: str,
) -> str:
    """The batch script as text. Raises InputError for a bad `array`, or options that clash.

    One array task, or the one job, runs `command` in `folder`. The command replaces the shell, so that
    SLURM signals it. `log` is the path of the log, with SLURM's %A and %a, or %j.
    """
    if array is not None and not ARRAY.fullmatch(array):
        raise InputError(f"--array {array!r}: allowed is SLURM's form, as in 0-7%4")
    options = {
        "job-name": "atelier",
        "array": array,
        "output": log,
        "qos": profile.qos,
        "partition": profile.partition,
        "account": profile.account,
        "cpus-per-task": profile.cpus,
        "gres": f"gpu:{profile.gpus}" if profile.gpus else None,
        "mem": profile.memory,
        "time": profile.time,
        "signal": f"B:USR2@{profile.warning}",
    }
    given = {key: value for key, value in options.items() if value is not None}
    _refuse_clashes(profile.options, [*given, "open-mode"])
    lines = [f"#SBATCH --{key}={_word(value)}" for key, value in given.items()]
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
    lines += [f"#SBATCH {option}" for option in profile.options]
    exports = [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "trap '' USR2  # SLURM's warning must not end a worker that has just started",
            *exports,
            *profile.setup,
            f"cd {shlex.quote(str(folder))} || exit 1",
            f"exec {shlex.join(command)}",
            "",
        ]
    )


def _refuse_clashes(options: list[str], keys: list[str]) -> None:
    """Raises InputError for an option that repeats or contradicts what the script says."""
    for word in option_words(options):
        if any(means(word, other) for other in OTHER_USES):
            raise InputError(f"options has {word}, which does not just submit; leave it out")
        for key in keys:
            if key != "job-name" and (means(word, f"--{key}") or means(word, SHORT.get(key, " "))):
                raise InputError(
                    f"options has {word}, and the script says --{key} already; leave it out, or use the "
                    "profile's own key"
                )


def option_words(lines: list[str]) -> list[str]:
    """The words of lines of options, without what follows `=`."""
    return [word.partition("=")[0] for line in lines for word in line.replace('"', " ").split()]


def means(word: str, option: str) -> bool:
    """Whether a word may be this option of sbatch: also abbreviated, or with its value as in -Alab."""
    if word.startswith("--"):
        return len(word) > 2 and option.startswith(word)
    return word.startswith(option)


def left_open(script: str) -> list[str]:
    """The variables of this environment that sbatch gets, since the script leaves them open."""
    words = option_words(re.findall(r"^#SBATCH\s+(.*)$", script, re.MULTILINE))
    return [
        name
        for name, options in LEFT_OPEN.items()
        if name in os.environ and not any(means(word, option) for word in words for option in options)
    ]


def about_environment(script: str) -> list[str]:
    """What sbatch gets of this environment's variables for SLURM, and what not, in words."""
    taken = left_open(script)
    dropped = kept_from_commands(*taken)
    lines = [f"sbatch gets {name}={os.environ[name]}, which the profile leaves open" for name in taken]
    if dropped:
        more = len(dropped) - MOST_NAMES
        names = ", ".join(dropped[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
        lines.append(f"sbatch does not get {names}: the profile says what the job is")
    return lines


def _word(value: object) -> str:
    """A value for an #SBATCH line. sbatch splits the line by blanks and quotes, as a shell does."""
    text = str(value)
    if "\n" in text:
        raise InputError(f"{text!r} has a line break, which no #SBATCH line can hold; rename it")
    if re.fullmatch(r"[\w@%+=:,./-]*", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def array_script(file: StudyConfig, profile: str, array: str, options: list[str]) -> str:
    """The batch script of a study's workers, as this user would submit it from here.

    `options` are the worker's arguments, with the study's path or name. Raises InputError.
    """
    chosen = _profile(file.slurm, profile)
    environment = {"ATELIER_DATABASE_URL": _node_url()} | _environment(file.shared, chosen)
    return _script(chosen, array, ["worker", *options], environment, TASK_LOG)


def run_script(
    config: TrainConfig, slurm: Mapping[str, SlurmProfile], profile: str, options: list[str]
) -> str:
    """The batch script of `atelier train` with these arguments. Raises InputError."""
    chosen = _profile(slurm, profile)
    return _script(chosen, None, ["train", *options], _environment(config, chosen), "train-%j.log")


def doctor_script(file: StudyConfig, profile: str, options: list[str]) -> str:
    """The batch script of `atelier doctor` on a node, for a few minutes. Raises InputError."""
    chosen = _profile(file.slurm, profile).model_copy(update={"time": DOCTOR_MINUTES, "warning": 0})
    environment = {"ATELIER_DATABASE_URL": _node_url()} | _environment(file.shared, chosen)
    return _script(chosen, None, ["doctor", "--json", *options], environment, "doctor-%j.log")


def _profile(slurm: Mapping[str, SlurmProfile], name: str) -> SlurmProfile:
    if name not in slurm:
        names = ", ".join(slurm) or "none"
        raise InputError(f"--profile {name!r}: the file has {names}; add [slurm.{name}]")
    return slurm[name]


def _script(
    profile: SlurmProfile,
    array: str | None,
    arguments: list[str],
    environment: dict[str, str],
    log: str,
) -> str:
    # -P: a file of this name in the user's folder must not run instead.
    command = [sys.executable, "-P", "-m", "atelier_command", *arguments]
    path = log_pattern(log_folder(), log)
    return render_script(profile, array, command, Path.cwd(), environment, path)


def log_pattern(folder: Path, name: str) -> str:
    """The path of a log in this folder. `name` may have SLURM's %A and the like. Raises InputError."""
    if "\\" in str(folder):
        raise InputError(f"{folder}: SLURM writes no log to a path with a backslash; set ATELIER_HOME")
    return f"{str(folder).replace('%', '%%')}/{name}"


def _environment(config: TrainConfig, profile: SlurmProfile) -> dict[str, str]:
    """What a job needs to find the same files. No secret: anybody may read the script."""
    given = {"ATELIER_HOME": str(home())}
    if profile.gpus or not any("gpu" in option for option in profile.options):
        # A worker uses what was asked of SLURM. It does not fall back to a CPU unasked.
        given["ATELIER_DEVICE"] = "cuda" if profile.gpus else "cpu"
    for name in (*libpq.FILES, "HF_HOME", "HF_HUB_CACHE", FEATURES):
        if value := os.environ.get(name):
            given[name] = value
    if config.weights == "timm":
        given["HF_HUB_OFFLINE"] = "1"  # the weights are in the cache: see search.slurm.submit
    return given


def _node_url() -> str:
    """The database's URL, if a compute node can use it and anybody may see it. Raises InputError."""
    text = configured_url()
    if text is None:
        raise InputError(
            "the embedded database is reachable on this machine only; let it listen with "
            "atelier db start --listen ADDRESS, or set ATELIER_DATABASE_URL (docs/cluster.md)"
        )
    url = database_url()
    if url.password is not None or "password" in url.query:
        raise InputError(
            "the database URL holds a password, which the job's script would show; "
            "put it into ~/.pgpass and leave it out of the URL"
        )
    host = server_host(url)
    if is_local(host) and not _cluster_is_this_machine():
        raise InputError(
            f"the database URL names {host or 'a local socket'}, which on a compute node is "
            "another machine; write the address that the nodes reach"
        )
    return text


def _cluster_is_this_machine() -> bool:
    try:
        nodes = call("sinfo", "--noheader", "--Node", "--format=%N").output.split()
    except SlurmError:
        return False
    return set(nodes) == {socket.gethostname().split(".")[0]}

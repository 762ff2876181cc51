"""`atelier init`: a study file for this site's SLURM, or for this machine, made from a ready one."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pynvml
import tomli_w

from dashboards.study_tables import GIB
from search.errors import InputError
from search.slurm.commands import NoClusterError, SilenceError, SlurmError
from search.slurm.fit import Proposal, ask_for_gpus, partition_line, preferred, proposals, usable
from search.slurm.script import render_script
from search.slurm.site import Partition, Site, read_site
from search.slurm.submit import try_script
from search.slurm.times import slurm_seconds
from search.study_config import StudyConfig
from search.toml_file import READY, load_study_file, read_toml, validate
from trainer.allocation import cpu_count, memory_limit, visible_gpus
from trainer.dataset import read_dataset
from trainer.text import read_text

WITH_GPU, WITHOUT_GPU = READY / "fashion.toml", READY / "fashion-cpu.toml"
MOST_TRIES = 24  # proposals that sbatch is asked about
MOST_LISTED = 6  # other partitions in a comment
SIGN = "# Written by atelier init"
SIGNED = re.compile(rf"^{SIGN}.*\n", re.MULTILINE)
HEADER = re.compile(r"^\[.*$", re.MULTILINE)
# Up to the next table of another kind, with the comments above that; or to the end.
SLURM_TABLES = re.compile(
    r"^\[slurm\b.*?(?=^(?:[ \t]*(?:#[^\n]*)?\n)*\[(?!slurm\b)|\Z)", re.MULTILINE | re.DOTALL
)
# The keys of a table, in this order; those of ALWAYS also where they are as if left out.
ORDER = ("partition", "account", "qos", "cpus", "gpus", "memory", "time", "warning")
ALWAYS = {"cpus", "gpus", "memory", "time"}
LONG_RUN = "final"
PURPOSE = {
    "tuning": "atelier submit: each task of the array is a worker",
    LONG_RUN: "atelier train --submit: the long run",
}


@dataclass(frozen=True)
class Draft:
    """A study file that is not written yet."""

    text: str
    config: StudyConfig
    found: list[str]  # what was found here, a line each
    array: str | None = None  # what to submit; None without SLURM


def draft_for_machine(template: Path | None, changes: Mapping[str, Any]) -> Draft:
    """A study file for this machine alone. Raises InputError."""
    gpus = _gpus()
    memory = memory_limit() or psutil.virtual_memory().total
    words = [
        f"{cpu_count()} CPU cores",
        f"{memory / GIB:.0f} GiB of memory",
        ", ".join(gpus) or "no GPU",
    ]
    here = f"this machine: {', '.join(words)}"
    return _draft(template or (WITH_GPU if gpus else WITHOUT_GPU), changes, here, [])


def _gpus() -> list[str]:
    """This machine's GPUs, with their names and memory where the driver tells them."""
    found = [f"GPU {name}" for name in visible_gpus()]
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for place, name in enumerate(visible_gpus()):
            gpu = (
                pynvml.nvmlDeviceGetHandleByIndex(int(name))
                if name.isdecimal()
                else pynvml.nvmlDeviceGetHandleByUUID(name)
            )
            size = pynvml.nvmlDeviceGetMemoryInfo(gpu).total / GIB
            found[place] = f"{pynvml.nvmlDeviceGetName(gpu)} of {size:.0f} GiB"
    return found


def draft_for_site(
    template: Path | None, changes: Mapping[str, Any], partition: str | None, account: str | None
) -> Draft:
    """A study file whose [slurm.*] tables this site's sbatch accepts. Raises InputError."""
    try:
        site = read_site()
        wanted = load_study_file(template or WITH_GPU).slurm or load_study_file(WITH_GPU).slurm
        with_gpus = ask_for_gpus(wanted)
        chosen = _partitions(site, partition, account, with_gpus)
        path = template or (WITH_GPU if any(one.gpus for one in chosen) else WITHOUT_GPU)
        seconds = max(slurm_seconds(profile.time) or 0 for profile in wanted.values())
        tries = (
            proposal
            for one in preferred(chosen, seconds, with_gpus)
            for proposal in proposals(site, one, wanted, account)
        )
        proposal, said = _accepted(islice(tries, MOST_TRIES))
    except NoClusterError:
        raise InputError(
            "SLURM's commands are here, but no cluster; set SLURM_CONF if there is one, or write a file "
            "for this machine alone, with --local"
        ) from None
    except SilenceError as error:
        raise InputError(
            f"{error}; try again on a login node, or write a file for this machine alone, with --local"
        ) from None
    except SlurmError as error:
        raise InputError(f"{error}; write the [slurm.*] tables by hand (docs/cluster.md)") from None
    closed = usable(site, account, with_gpus)[1]
    lines = {
        one.name: partition_line(one)
        + (f"; not for you: {closed[one.name]}" if one.name in closed else "")
        for one in site.partitions
    }
    others = [line for name, line in lines.items() if name != proposal.partition.name]
    more = [f"and {len(others) - MOST_LISTED} more: sinfo -s"] if len(others) > MOST_LISTED else []
    tables = _tables(proposal, _why(proposal.partition, partition, seconds))
    if others:
        tables += ["# Other partitions:", *(f"#   {line}" for line in [*others[:MOST_LISTED], *more])]
    found = [*lines.values(), *(f"note: {note}" for note in site.notes), *said]
    if dropped := [f"[slurm.{name}]" for name, one in wanted.items() if one.setup or one.options]:
        found.append(f"note: setup and options of {', '.join(dropped)} are left out; add what fits here")
    here = f"cluster {site.cluster}, SLURM {site.version}"
    return _draft(path, changes, here, found, tables, proposal.array)


def _partitions(site: Site, name: str | None, account: str | None, with_gpus: bool) -> list[Partition]:
    """The partitions to choose from. Raises InputError."""
    if site.without_account:
        raise InputError(
            f"SLURM has no account for {site.without_account}, and takes no job here without one; ask "
            f"those who run this site for one (sacctmgr add user {site.without_account} account=NAME)"
        )
    found, closed = usable(site, account, with_gpus)
    if name is None:
        if not found:
            reasons = "; ".join(f"{one}: {why}" for one, why in closed.items())
            raise InputError(f"no partition of this site is for you: {reasons}; ask those who run it")
        return found
    named = [one for one in site.partitions if one.name == name]
    if not named:
        names = ", ".join(one.name for one in site.partitions)
        raise InputError(f"--partition {name!r}: this site has {names}")
    if name in closed and named[0].nodes:  # which may just be hidden
        raise InputError(f"--partition {name!r}: {closed[name]}; give another one, or --account")
    return named


def _why(taken: Partition, given: str | None, seconds: float) -> str:
    if given:
        return "as you said"
    if taken.is_default and taken.seconds >= seconds:
        return "the default one"
    return f"the longest time{' with GPUs' if taken.gpus else ''}"


def _accepted(tries: Iterable[Proposal]) -> tuple[Proposal, list[str]]:
    """The first proposal that sbatch accepts, and what it said to that and to the ones before.

    Raises InputError if it accepts none, SilenceError.
    """
    refused: dict[str, None] = {}  # each answer once, in order
    for proposal in tries:
        try:
            start = [try_script(_script(proposal, name)) for name in proposal.profiles]
        except SilenceError:
            raise
        except SlurmError as error:
            refused[f"{proposal.partition.name}: {error}"] = None
        else:
            notes = [f"note: refused in {answer}" for answer in refused]
            return proposal, [*notes, f"accepted, and nothing is submitted: {start[0]}"]
    raise InputError(
        f"SLURM refuses every partition: {'; '.join(refused)}; give another --partition or --account, "
        "or ask those who run the site"
    )


def _script(proposal: Proposal, name: str) -> str:
    # One task: how many more SLURM takes depends on the jobs that the user has there at the moment.
    array = None if name == LONG_RUN else "0"
    return render_script(proposal.profiles[name], array, ["true"], Path.cwd(), {}, "/dev/null")


def _tables(proposal: Proposal, why: str) -> list[str]:
    """The lines of the [slurm.*] tables. A value has a comment unless the table before has the same."""
    lines: list[str] = []
    before: dict[str, str] = {}
    for name, profile in proposal.profiles.items():
        reasons = proposal.reasons[name] | {"partition": why}
        values = profile.model_dump(exclude_defaults=True) | profile.model_dump(include=ALWAYS)
        code = {key: tomli_w.dumps({key: values[key]}).strip() for key in ORDER if key in values}
        width = max(map(len, code.values()))
        lines.append(f"[slurm.{name}]" + (f"  # for {PURPOSE[name]}" if name in PURPOSE else ""))
        for key, text in code.items():
            reason = reasons.get(key, "") if before.get(key) != text else ""
            lines.append(f"{text:{width}}  # {reason}" if reason else text)
        lines.append("")
        before = code
    return lines


def _draft(
    template: Path,
    changes: Mapping[str, Any],
    here: str,
    found: list[str],
    tables: list[str] | None = None,
    array: str | None = None,
) -> Draft:
    """The template with other places of its files and other [slurm.*] tables; its other lines stay.

    Raises InputError, DatasetError.
    """
    settings = load_study_file(template).shared  # its errors are in its own name
    if "data" in changes:
        images = len(
            read_dataset(changes["data"], unknown_labels=settings.unknown_labels).split("train")
        )
        if settings.train_images and settings.train_images > images:
            changes = {**changes, "train_images": images}
    wanted = {key: value for key, value in read_toml(template).items() if key != "slurm"}
    wanted["train"] |= changes
    text = SLURM_TABLES.sub("", SIGNED.sub("", read_text(template))).rstrip() + "\n"
    for key, value in changes.items():
        text = _put(text, key, value)
    signature = f"{SIGN}, from {template.name}, for {here}.\n"
    text = "\n".join([signature + text, *(tables or [])]).rstrip() + "\n"
    try:
        written = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        written = {}
    if {key: value for key, value in written.items() if key != "slurm"} != wanted:
        raise InputError(
            f"{template}: its tables cannot be changed line by line; write [train], each [slurm.NAME] "
            "and each key on a line of its own, or begin with another file"
        )
    return Draft(text, validate(StudyConfig, written, template), [here, *found], array)


def _put(text: str, key: str, value: Any) -> str:
    """The text with this key of [train], in place of the line that has it."""
    line = tomli_w.dumps({key: value}).strip()
    start = re.search(r"^\[train\].*\n?", text, re.MULTILINE)
    if start is None:
        return text
    end = HEADER.search(text, start.end())
    body = text[start.end() : end.start() if end else len(text)]
    changed, found = re.subn(rf"^{key}\s*=.*$", lambda _: line, body, count=1, flags=re.MULTILINE)
    after = text[start.end() + len(body) :]
    return text[: start.end()] + (changed if found else f"{line}\n{body}") + after

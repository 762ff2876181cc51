"""What this site's SLURM has, and what this user may use of it: asked once, with `read_site`."""

import grp
import math
import os
import pwd
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from search.slurm.commands import NoClusterError, SlurmError, call, not_understood, one_line
from search.slurm.environment import habits
from search.slurm.sizes import mebibytes
from search.slurm.times import NO_LIMIT, slurm_seconds

COMMANDS = ("sbatch", "squeue", "scontrol", "sinfo")
# A node in one of these states runs jobs, now or soon.
UP = {"idle", "mixed", "allocated", "completing", "planned", "reserved", "maint", "reboot"}
UP |= {"powered_down", "powering_down", "powering_up"}
AWAY = {
    "down",
    "drained",
    "draining",
    "fail",
    "failing",
    "error",
    "inval",
    "unknown",
    "future",
    "blocked",
}
SILENT = "*"  # after the state of a node that does not answer
WITHOUT_LIMIT = {"", "N/A", "NONE", "(NULL)", *NO_LIMIT}
EVERYBODY = {"", "ALL", "(null)"}
# What makes SLURM hold jobs to the limits of accounts and QOS, of AccountingStorageEnforce.
ENFORCING = {"limits", "safe", "all"}
WITH_ACCOUNT = {"associations", "qos", "wckeys", *ENFORCING}  # each job needs one
OVER_PARTITION = "OverPartQOS"  # flag of a QOS that comes before the QOS of a partition
SLICE = re.compile(r"\d+g\.\d+gb", re.IGNORECASE)  # in the name of a part of a GPU (MIG)
NORMAL = "normal"  # the QOS where there is no other default
# sacctmgr's limits of numbers of jobs, and what they are in `Stated`. The account's MaxJobs gives way to
# the QOS's MaxJobsPU. In SLURM also to its MaxJobsPA, where here both hold.
JOBS = {
    "MaxJobs": ("MaxJobsPU", "running"),
    "MaxJobsPU": ("MaxJobsPU", "running"),
    "MaxJobsPA": ("MaxJobsPA", "running"),
    "GrpJobs": ("GrpJobs", "running"),
    "MaxSubmit": ("MaxSubmitPU", "submitted"),
    "MaxSubmitPU": ("MaxSubmitPU", "submitted"),
    "MaxSubmitPA": ("MaxSubmitPA", "submitted"),
    "GrpSubmit": ("GrpSubmit", "submitted"),
}
RESOURCES = {  # its limits of resources, and how the fields of Limits that they bound begin
    "MaxTRES": "",
    "MaxTRESPerNode": "",
    "MaxTRESPU": "all_",
    "MaxTRESPA": "all_",
    "GrpTRES": "all_",
}
TRES = {"cpu": "cpus", "mem": "memory", "gres/gpu": "gpus"}
_PAIR = re.compile(r"(\S+?)=(\S*)")
_GPU = re.compile(r"gpu(?::(?P<kind>[^:]*[^:\d][^:]*))?(?::(?P<count>\d+))?")


@dataclass(frozen=True)
class Nodes:
    """The nodes of one kind and state in a partition."""

    number: int
    are_up: bool
    cpus: int  # of each
    memory: int  # MiB of each
    gpus: dict[str, int]  # of each, by type; the type is "" where the site names none

    @property
    def gpus_each(self) -> int:
        return sum(self.gpus.values())


@dataclass(frozen=True)
class Partition:
    """One partition. A limit is infinite where SLURM sets none."""

    name: str
    is_default: bool
    closed: str | None  # why this user can submit nothing here
    seconds: float  # of a job
    cpus: float  # on one node
    memory: float  # MiB of a job on one node
    memory_per_cpu: float  # MiB
    accounts: frozenset[str]  # that may use it; empty for all
    denied_accounts: frozenset[str]
    qos: frozenset[str]  # that may be used in it; empty for all
    denied_qos: frozenset[str]
    own_qos: str  # whose limits hold for every job in it; or empty
    nodes: tuple[Nodes, ...]

    @property
    def working(self) -> list[Nodes]:
        """Its nodes that are up; all, if none is."""
        return [nodes for nodes in self.nodes if nodes.are_up] or list(self.nodes)

    @property
    def gpus(self) -> dict[str, int]:
        """How many GPUs of which type work: the most frequent first, parts of GPUs (MIG) last."""
        counts: Counter[str] = Counter()
        for nodes in self.working:
            for kind, count in nodes.gpus.items():
                counts[kind] += count * nodes.number
        order = sorted(counts, key=lambda kind: (bool(SLICE.search(kind)), not kind, -counts[kind]))
        return {kind: counts[kind] for kind in order}


class Limits(NamedTuple):
    """What one user's jobs may take. Infinite where SLURM sets no limit."""

    seconds: float = math.inf  # of a job
    running: float = math.inf  # jobs at once
    submitted: float = math.inf  # jobs that run or wait
    cpus: float = math.inf  # of a job, as the next two
    memory: float = math.inf  # MiB
    gpus: float = math.inf
    all_cpus: float = math.inf  # of all jobs that run at once, as the next two
    all_memory: float = math.inf  # MiB
    all_gpus: float = math.inf


NO_LIMITS = Limits()
# The limits that SLURM states of one QOS or account: by its name for them, and by the field of Limits
# that they bound. A limit gives way only to the same one of what comes first, so two dictionaries are
# joined with `|`; all that are left hold.
Stated = Mapping[tuple[str, str], float]


def tightest(stated: Stated) -> Limits:
    """What is left where all of these hold."""
    least: dict[str, float] = {}
    for (_, what), most in stated.items():
        least[what] = min(most, least.get(what, math.inf))
    return Limits(**least)


@dataclass(frozen=True)
class Association:
    """An account that this user may charge, and the QOS that go with it."""

    account: str
    partition: str  # the only one that it is for; or empty
    qos: tuple[str, ...]  # the one that a job gets unasked comes first
    stated: Stated


@dataclass
class Site:
    """What SLURM has said."""

    version: str
    cluster: str
    largest_array: int  # tasks
    requeues: bool  # unasked
    partitions: list[Partition] = field(default_factory=list)
    # The user's default account comes first. Empty where SLURM keeps no accounts.
    associations: list[Association] = field(default_factory=list)
    without_account: str | None = None  # this user, if SLURM has no account for them but wants one
    qos: dict[str, Stated] = field(default_factory=dict)  # whose limits SLURM enforces
    qos_before_partition: set[str] = field(default_factory=set)  # their limits come before its QOS's
    notes: list[str] = field(default_factory=list)  # what was not understood, or not said


def absent_commands() -> list[str]:
    """Those of SLURM's commands that Atelier calls and this machine lacks."""
    return [name for name in COMMANDS if shutil.which(name) is None]


def has_cluster() -> bool:
    """Whether SLURM's commands know a cluster. It may be silent."""
    try:
        configuration()
    except NoClusterError:
        return False
    except SlurmError:  # it is silent, or answers what is not understood
        pass
    return True


def configuration() -> dict[str, str]:
    """SLURM's settings by name, with its version as "version". Raises SlurmError, SilenceError."""
    output = call("scontrol", "show", "config").output
    settings = dict(re.findall(r"^(\w+) *= (.*?) *$", output, re.MULTILINE))
    if "SLURM_VERSION" not in settings:
        raise not_understood("scontrol show config", output)
    return settings | {"version": settings["SLURM_VERSION"]}


def read_site() -> Site:
    """Ask SLURM. Raises SilenceError if it does not answer, SlurmError if that is not understood."""
    config = configuration()
    if not config.get("MaxArraySize", "").isdecimal() or "ClusterName" not in config:
        raise not_understood("scontrol show config", str(config))
    site = Site(
        config["version"],
        config["ClusterName"],
        int(config["MaxArraySize"]),
        config.get("JobRequeue") != "0",
    )
    nodes = _read_nodes(site)
    _read_partitions(site, nodes, config)
    if "slurmdbd" in config.get("AccountingStorageType", ""):
        try:
            _read_accounts(site, set(config.get("AccountingStorageEnforce", "").lower().split(",")))
        except (SlurmError, ValueError) as error:
            site.associations, site.without_account = [], None
            site.qos, site.qos_before_partition = {}, set()
            site.notes.append(f"accounts and QOS are not known: {error}")
    return site


def _read_nodes(site: Site) -> dict[str, list[Nodes]]:
    """The nodes by partition. What is not understood becomes a note, and its nodes are left out."""
    found: dict[str, list[Nodes]] = {}
    output = call("sinfo", "--noheader", "--exact", "--format=%R|%D|%T|%c|%m|%G").output
    for line in filter(None, map(str.strip, output.splitlines())):
        match = re.fullmatch(r"([^|]+)\|(\d+)\|([a-z_/]+)(\W*)\|(\d+)\+?\|(\d+)\+?\|(.*)", line)
        gpus = _gpus(match[7]) if match else None
        if match and match[2] == "0":
            continue  # sinfo hides them: nodes of a cloud that are switched off
        if match is None or gpus is None or match[3] not in UP | AWAY:
            site.notes.append(
                f"sinfo printed what is not understood, and is left out: {one_line(line)!r}"
            )
            continue
        is_up = match[3] in UP and SILENT not in match[4]
        found.setdefault(match[1], []).append(
            Nodes(int(match[2]), is_up, int(match[5]), int(match[6]), gpus)
        )
    return found


def _gpus(gres: str) -> dict[str, int] | None:
    """GPUs by type, from `gpu:a100:4(S:0-1),nvme:1`. None if that is not understood."""
    gpus: dict[str, int] = {}
    for resource in re.sub(r"\([^)]*\)", "", gres).split(","):
        if resource.partition(":")[0] == "gpu":
            match = _GPU.fullmatch(resource)
            if match is None:
                return None
            kind = match["kind"] or ""
            gpus[kind] = gpus.get(kind, 0) + int(match["count"] or 1)
    return {kind: count for kind, count in gpus.items() if count}


def _read_partitions(site: Site, nodes: dict[str, list[Nodes]], config: dict[str, str]) -> None:
    output = call("scontrol", "show", "partition", "--oneliner").output
    for line in filter(None, map(str.strip, output.splitlines())):
        pairs = dict(_PAIR.findall(line))
        name = pairs.get("PartitionName", "")
        try:
            site.partitions.append(_partition(pairs, tuple(nodes.get(name, ())), config))
        except (KeyError, ValueError):
            site.notes.append(
                f"scontrol printed what is not understood, and is left out: {one_line(line)!r}"
            )
    if not site.partitions:
        raise not_understood("scontrol show partition", output)


def _partition(pairs: dict[str, str], nodes: tuple[Nodes, ...], config: dict[str, str]) -> Partition:
    """Raises KeyError and ValueError for what is not understood."""

    def listed(key: str) -> frozenset[str]:
        text = pairs.get(key, "")
        return frozenset(() if text in EVERYBODY else text.split(","))

    own_qos = pairs.get("QoS", "")
    return Partition(
        pairs["PartitionName"],
        pairs["Default"] == "YES",
        _why_closed(pairs["State"], pairs.get("RootOnly"), listed("AllowGroups"), nodes),
        _seconds(pairs["MaxTime"]),
        _limit(pairs.get("MaxCPUsPerNode", "")),
        _limit(pairs.get("MaxMemPerNode", config.get("MaxMemPerNode", ""))),
        _limit(pairs.get("MaxMemPerCPU", config.get("MaxMemPerCPU", ""))),
        listed("AllowAccounts"),
        listed("DenyAccounts"),
        listed("AllowQos"),
        listed("DenyQos"),
        "" if own_qos in ("N/A", "(null)") else own_qos,
        nodes,
    )


def _why_closed(
    state: str, root_only: str | None, groups: frozenset[str], nodes: tuple[Nodes, ...]
) -> str | None:
    if state != "UP":
        return f"it is {state}"
    if not nodes:
        return "sinfo shows no nodes of it"
    if os.geteuid() == 0:
        return None  # SLURM lets root in
    if root_only == "YES":
        return "it is for root"
    if groups and not groups & {_group(number) for number in (os.getegid(), *os.getgroups())}:
        return f"it is for the groups {', '.join(sorted(groups))}"
    return None


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _read_accounts(site: Site, enforced: set[str]) -> None:
    user = pwd.getpwuid(os.geteuid()).pw_name
    default = next((row["DefaultAccount"] for row in _rows("user", user, "DefaultAccount")), "")
    holds, usual = bool(enforced & ENFORCING), habits().qos
    fields = "Account,ParentName,Cluster,GrpJobs,GrpSubmit,GrpTRES"
    above = {
        row["Account"]: (row["ParentName"], _stated(row))
        for row in (_rows("associations", "user=", fields) if holds else ())
        if row["Cluster"] in ("", site.cluster)
    }
    fields = "Account,Partition,QOS,DefaultQOS,Cluster,MaxWall,MaxJobs,GrpJobs,MaxSubmit,GrpSubmit"
    for row in _rows("associations", f"user={user}", f"{fields},MaxTRES,MaxTRESPerNode,GrpTRES"):
        if row["Cluster"] in ("", site.cluster):
            allowed = row["QOS"].split(",")
            names = [usual, row["DefaultQOS"], NORMAL, *sorted(allowed)]
            site.associations.append(
                Association(
                    row["Account"],
                    row["Partition"],
                    tuple(name for name in dict.fromkeys(names) if name and name in allowed),
                    _with_those_above(row, above) if holds else {},
                )
            )
    site.associations.sort(key=lambda one: one.account != default)
    if not site.associations:
        site.without_account = user if enforced & WITH_ACCOUNT else None
        site.notes.append(f"SLURM has no account for {user}")
    if holds:
        fields = "Name,Flags,MaxWall,MaxJobsPU,MaxJobsPA,GrpJobs,MaxSubmitPU,MaxSubmitPA,GrpSubmit"
        for row in _rows("qos", "", f"{fields},MaxTRES,MaxTRESPerNode,MaxTRESPU,MaxTRESPA,GrpTRES"):
            site.qos[row["Name"]] = _stated(row)
            if OVER_PARTITION in row["Flags"].split(","):
                site.qos_before_partition.add(row["Name"])


def _with_those_above(row: dict[str, str], above: dict[str, tuple[str, Stated]]) -> Stated:
    """The limits of an association, its account and all accounts above it: all of them hold."""
    stated, account, left = dict(_stated(row)), row["Account"], dict(above)
    while found := left.pop(account, None):
        account, theirs = found
        for limit, most in theirs.items():
            stated[limit] = min(most, stated.get(limit, math.inf))
    return stated


def _rows(what: str, which: str, fields: str) -> Iterator[dict[str, str]]:
    """The rows of `sacctmgr show`, by field. Raises SlurmError for another number of fields."""
    words = ("sacctmgr", "--noheader", "--parsable2", "show", what, *filter(None, [which]))
    for line in filter(None, map(str.strip, call(*words, f"format={fields}").output.splitlines())):
        names, values = fields.split(","), line.split("|")
        if len(values) != len(names):
            raise not_understood(f"sacctmgr show {what}", line)
        yield dict(zip(names, values, strict=True))


def _stated(row: dict[str, str]) -> Stated:
    """The limits in a row of sacctmgr. Raises ValueError if one is not understood."""
    found = {}
    for name, text in row.items():
        if name == "MaxWall":
            found[name, "seconds"] = _seconds(text)
        elif name in JOBS:
            found[JOBS[name]] = _limit(text)
        elif name in RESOURCES:
            for what, most in _tres(text).items():
                found[name, RESOURCES[name] + what] = most
    return {limit: most for limit, most in found.items() if most < math.inf}


def _tres(text: str) -> dict[str, float]:
    """A limit as in `cpu=2,mem=4G,gres/gpu=1`: by "cpus", "memory" (MiB) and "gpus", where limited.

    A limit for one type of GPU counts for all types. Raises ValueError if it is not understood.
    """
    found: dict[str, float] = {}
    for item in filter(None, text.split(",")):
        resource, _, value = item.partition("=")
        if not (resource and value):
            raise ValueError(f"{item!r} is not understood")
        what = TRES.get(resource.partition(":")[0])
        if what:
            most = mebibytes(value) if what == "memory" else _limit(value)
            found[what] = min(most, found.get(what, math.inf))
    return found


def _seconds(text: str) -> float:
    """A time limit in seconds. Raises ValueError if it is not understood."""
    if text.upper() in WITHOUT_LIMIT:
        return math.inf
    seconds = slurm_seconds(text)
    if seconds is None:
        raise ValueError(f"{text!r} is not understood")
    return float(seconds)


def _limit(text: str) -> float:
    """A number, infinite for none. Raises ValueError if it is not understood."""
    if text.upper() in WITHOUT_LIMIT:
        return math.inf
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not understood")
    return float(text)

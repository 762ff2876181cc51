"""The [slurm.*] profiles that fit a site: what a study asks for, as far as the site allows it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dashboards.study_tables import duration
from search.profile import DEFAULT_MEMORY, SlurmProfile
from search.slurm.site import NO_LIMITS, Limits, Nodes, Partition, Site, Stated, tightest
from search.slurm.sizes import mebibytes
from search.slurm.times import clock, slurm_seconds
from storage.words import counted

DAY = 86400  # seconds
TASKS, AT_ONCE = 8, 4  # of an array
YOURS = "your account or QOS"
YOUR_MOST = f"the most that {YOURS} allows"
WARNED_SHARE = 4  # of a short job at most a fourth is left to end in


@dataclass(frozen=True)
class Account:
    """Whom to charge, and the QOS. None leaves it to SLURM."""

    name: str | None = None
    qos: str | None = None
    why: str = ""
    why_qos: str = ""
    limits: Limits = NO_LIMITS


@dataclass(frozen=True)
class Proposal:
    """Profiles for one partition, with the reasons for their values by key."""

    partition: Partition
    profiles: dict[str, SlurmProfile]
    reasons: dict[str, dict[str, str]]
    array: str


def ask_for_gpus(profiles: Mapping[str, SlurmProfile]) -> bool:
    """Whether any of them does."""
    return any(profile.gpus for profile in profiles.values())


def usable(site: Site, account: str | None, with_gpus: bool) -> tuple[list[Partition], dict[str, str]]:
    """The partitions that the user can submit to, and why not to the others, by name."""
    closed = {
        one.name: why for one in site.partitions if (why := _closed(site, one, account, with_gpus))
    }
    return [one for one in site.partitions if one.name not in closed], closed


def _closed(site: Site, partition: Partition, account: str | None, with_gpus: bool) -> str | None:
    if partition.closed:
        return partition.closed
    if not site.associations:
        fits = account not in partition.denied_accounts
        fits &= not partition.accounts or account in partition.accounts
    else:
        fits = any(_accounts(site, partition, account, with_gpus))
    if fits:
        return None
    if with_gpus and partition.gpus and any(_accounts(site, partition, account, False)):
        return "your account lets no job of it use GPUs; give the file of a study without"
    allowed = {"accounts": partition.accounts, "QOS": partition.qos}
    only = [f"the {what} {', '.join(sorted(names))}" for what, names in allowed.items() if names]
    return (
        f"it is for {' and '.join(only)}"
        if only
        else "no account of yours is for it, or lets a job run there"
    )


def preferred(partitions: list[Partition], seconds: float, gpus: bool) -> list[Partition]:
    """The best first: with GPUs, if they are wanted; the default if its time is enough; the longest."""
    return sorted(
        partitions,
        key=lambda one: (
            gpus and not one.gpus,
            not any(nodes.are_up for nodes in one.nodes),
            not (one.is_default and one.seconds >= seconds),
            -one.seconds,
            -sum(one.gpus.values()),
        ),
    )


def proposals(
    site: Site, partition: Partition, wanted: Mapping[str, SlurmProfile], account: str | None
) -> Iterator[Proposal]:
    """What to try in a partition: first what seems right, then what a site may want instead."""
    kinds = partition.gpus
    kind = next(iter(kinds), "")
    before: Proposal | None = None
    payers = [*_accounts(site, partition, account, ask_for_gpus(wanted))]
    for payer in payers or [Account(account)]:
        # Where one type is among several, it is named, since a trial's numbers depend on the type.
        for named in (True, False) if len(kinds) > 1 else (False, True)[: 1 + bool(kind)]:
            for part in (1, 2):
                proposal = _propose(site, partition, wanted, payer, kind if named else "", part)
                if before is None or proposal.profiles != before.profiles:
                    yield proposal
                before = proposal


def _accounts(site: Site, partition: Partition, only: str | None, with_gpus: bool) -> Iterator[Account]:
    """The accounts that may pay for jobs in a partition, the user's default account first.

    Each with one QOS: further ones would take the tries with sbatch from other accounts and partitions.
    """
    names = list(dict.fromkeys(one.account for one in site.associations))
    for one in site.associations:
        if one.partition not in ("", partition.name) or only not in (None, one.account):
            continue
        if partition.accounts and one.account not in partition.accounts:
            continue
        allowed = [
            name
            for name in one.qos
            if name not in partition.denied_qos and (not partition.qos or name in partition.qos)
        ]
        if one.account in partition.denied_accounts or (one.qos and not allowed):
            continue
        limits = {qos: _limits_of_job(site, partition, one.stated, qos) for qos in allowed or ("",)}
        takes_gpus = with_gpus and bool(partition.gpus)
        running = [name for name, own in limits.items() if _lets_run(own, takes_gpus)]
        if running:
            qos = running[0]
            why, why_qos = _or(names, one.account, "yours"), _or(running, qos, "allowed here")
            yield Account(one.account, qos or None, why, why_qos, limits[qos])


def _limits_of_job(site: Site, partition: Partition, of_account: Stated, qos: str) -> Limits:
    """What holds for a job. The partition's QOS comes first, then the job's, then the account."""
    order = [partition.own_qos, qos]
    if qos in site.qos_before_partition:
        order.reverse()
    first, then = (site.qos.get(name, {}) for name in order)
    return tightest({**of_account, **then, **first})


def _lets_run(limits: Limits, with_gpu: bool) -> bool:
    """Whether one job may run at all. Sites close an account or a QOS by a limit of 0."""
    return min(limits if with_gpu else limits._replace(gpus=math.inf, all_gpus=math.inf)) >= 1


def _or(names: list[str], taken: str | None, which: str) -> str:
    others = [name for name in names if name != taken]
    return f"also {which}: {', '.join(others)}" if others else ""


def _propose(
    site: Site,
    partition: Partition,
    wanted: Mapping[str, SlurmProfile],
    payer: Account,
    kind: str,
    part: int,
) -> Proposal:
    """`kind` is the type of GPU to name, if any. `part` divides what the hardware has."""
    profiles, reasons = {}, {}
    for name, profile in wanted.items():
        chosen = {
            "partition": (partition.name, ""),
            "account": (payer.name, payer.why),
            "qos": (payer.qos, payer.why_qos),
            **_hardware(partition, profile, payer.limits, kind, part),
            **_time(site, partition, profile, payer),
        }
        profiles[name] = SlurmProfile(**{key: value for key, (value, _) in chosen.items()})
        reasons[name] = {key: why for key, (_, why) in chosen.items()}
    return Proposal(partition, profiles, reasons, _array(site, partition, payer.limits, profiles))


def _hardware(
    partition: Partition, profile: SlurmProfile, limits: Limits, kind: str, part: int
) -> dict[str, tuple[Any, str]]:
    """CPUs, GPUs and memory: what the study asks for, and no more than a GPU's share of any node.

    So a task waits for nothing but a GPU. Each has its reason.
    """
    gpus = partition.gpus if profile.gpus else {}
    nodes = [
        one for one in partition.working if kind in one.gpus or (not kind and (one.gpus or not gpus))
    ]
    share, small = _share(nodes, [min(one.cpus, partition.cpus) for one in nodes], bool(gpus), part)
    cpus, why_cpus = _at_most(
        max(min(share, profile.cpus), 1),
        f"a node has {counted(small.cpus, 'CPU')}{_for(small, gpus)}" if small else "",
        (min(limits.cpus, limits.all_cpus), YOUR_MOST),
    )
    share, small = _share(nodes, [one.memory for one in nodes], bool(gpus), part)
    # SLURM takes 0 for all that a node has.
    wanted = mebibytes(profile.memory) or (share if small else mebibytes(DEFAULT_MEMORY))
    # Where each CPU has a limit of memory, SLURM raises the CPUs of a job that asks for more.
    memory, why_memory = _at_most(
        max(min(share, wanted), 1),
        f"a node has {small.memory >> 10} GiB{_for(small, gpus)}" if small else "",
        (
            min(partition.memory, partition.memory_per_cpu * cpus),
            f"the most that {partition.name} allows for its {counted(cpus, 'CPU')}",
        ),
        (min(limits.memory, limits.all_memory), YOUR_MOST),
    )
    if part > 1:
        why_memory += "; SLURM refused more"
    why_gpus = f"{partition.name} has {_gpus_in_words(gpus)}" if gpus else ""
    if kind and len(gpus) > 1:
        why_gpus += "; on equal GPUs a trial has equal numbers"
    count: int | str = (f"{kind}:1" if kind else 1) if gpus else 0
    if not partition.nodes:
        count, why_gpus = profile.gpus, f"sinfo does not show what {partition.name} has"
    return {
        "cpus": (cpus, why_cpus),
        "gpus": (count, why_gpus),
        "memory": (_in_gib(memory, is_cut=memory < wanted), why_memory),
    }


def _in_gib(memory: int, is_cut: bool) -> str:
    """A size in MiB as sbatch takes it, in whole GiB if it has that many, or was cut anyway."""
    in_gib = memory >= 1024 and (is_cut or memory % 1024 == 0)
    return f"{memory >> 10}G" if in_gib else f"{memory}M"


def _at_most(value: float, why: str, *limits: tuple[float, str]) -> tuple[int, str]:
    """The value within all limits, and why it is so. A limit comes with its reason."""
    value, why = min((value, why), *limits, key=lambda one: one[0])
    return int(value), why


def _share(
    nodes: list[Nodes], sizes: list[float], by_gpu: bool, part: int
) -> tuple[float, Nodes | None]:
    """What a task can have of this size on any of the nodes, and the node that has least."""
    shares = [
        (size // (one.gpus_each if by_gpu else 1) // part, one)
        for one, size in zip(nodes, sizes, strict=True)
    ]
    return min(shares, key=lambda share: share[0], default=(math.inf, None))


def _time(
    site: Site, partition: Partition, profile: SlurmProfile, payer: Account
) -> dict[str, tuple[Any, str]]:
    most = min(partition.seconds, payer.limits.seconds)
    who = partition.name if most == partition.seconds else YOURS
    end = "when its time is up, a task is requeued and goes on"
    if not site.requeues:
        end = "when its time is up, a task asks to be requeued, which this site does not do unasked"
    seconds = min(slurm_seconds(profile.time) or math.inf, most)
    is_short = seconds < WARNED_SHARE * profile.warning
    return {
        "time": (
            "UNLIMITED" if math.isinf(seconds) else clock(int(seconds)),
            f"{who}: {in_words(most)}; {end}",
        ),
        "warning": (
            int(seconds) // WARNED_SHARE if is_short else profile.warning,
            "seconds before the end at which the workers are warned",
        ),
    }


def _array(
    site: Site, partition: Partition, limits: Limits, profiles: Mapping[str, SlurmProfile]
) -> str:
    """The array to submit: no more tasks than SLURM takes, no more at once than there is room for."""
    tasks = min(TASKS, site.largest_array, limits.submitted)
    profile = next(iter(profiles.values()))
    at_once = min(
        AT_ONCE,
        tasks,
        limits.running,
        limits.all_cpus / profile.cpus,
        limits.all_memory / mebibytes(profile.memory),
    )
    if partition.gpus and ask_for_gpus(profiles):
        at_once = min(at_once, sum(partition.gpus.values()), limits.all_gpus)
    return f"0-{max(int(tasks), 1) - 1}%{max(int(at_once), 1)}"


def in_words(seconds: float) -> str:
    """A time limit for people."""
    if math.isinf(seconds):
        return "no limit"
    days, rest = divmod(int(seconds), DAY)
    return f"up to {counted(days, 'day') if days and not rest else duration(seconds)}"


def partition_line(partition: Partition) -> str:
    """What a partition has, for people."""
    number = sum(nodes.number for nodes in partition.nodes)
    away = sum(nodes.number for nodes in partition.nodes if not nodes.are_up)
    return (
        f"{partition.name}{' (the default)' if partition.is_default else ''}: "
        f"{in_words(partition.seconds)}, {counted(number, 'node')}"
        f"{f' ({away} down or drained)' if away else ''}, {_gpus_in_words(partition.gpus)}"
    )


def _gpus_in_words(gpus: Mapping[str, int]) -> str:
    return ", ".join(counted(n, f"{kind} GPU".lstrip()) for kind, n in gpus.items()) or "no GPU"


def _for(nodes: Nodes, gpus: Mapping[str, int]) -> str:
    return f" for {counted(nodes.gpus_each, 'GPU')}" if gpus else ""

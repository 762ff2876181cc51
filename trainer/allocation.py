"""What this process was granted, of CPUs and memory: on a shared node the machine has more."""

import os


def cpu_count() -> int:
    """This process's share, where ATELIER_CPUS says so; CPUs of the SLURM task; else all it may use."""
    granted = number("ATELIER_CPUS") or number("SLURM_CPUS_PER_TASK")
    return granted or len(os.sched_getaffinity(0))


def memory_limit() -> int | None:
    """Bytes of main memory that SLURM granted on this node; None where nobody set a limit."""
    per_node, per_cpu = number("SLURM_MEM_PER_NODE"), number("SLURM_MEM_PER_CPU")  # MiB
    granted = per_node or (per_cpu and per_cpu * cpu_count())
    return granted << 20 if granted else None


def number(variable: str) -> int | None:
    """A positive number from the environment; None if it is absent or something else."""
    text = os.environ.get(variable, "")
    return int(text) or None if text.isdecimal() else None

"""What this process was granted, of CPUs, memory and GPUs: on a shared node the machine has more."""

import os
from pathlib import Path

# What names GPUs, and the values by which it names none: the second is SLURM's.
NAMING_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
NO_GPU = ("", "-1", "NoDevFiles")
GPU_FILES = ("nvidia[0-9]*", "kfd")  # in /dev


def cpu_count() -> int:
    """This process's share, where ATELIER_CPUS says so; CPUs of the SLURM task; else all it may use."""
    granted = number("ATELIER_CPUS") or number("SLURM_CPUS_PER_TASK")
    return granted or len(os.sched_getaffinity(0))


def memory_limit() -> int | None:
    """Bytes of main memory that SLURM granted on this node; None where nobody set a limit."""
    per_node, per_cpu = number("SLURM_MEM_PER_NODE"), number("SLURM_MEM_PER_CPU")  # MiB
    granted = per_node or (per_cpu and per_cpu * cpu_count())
    return granted << 20 if granted else None


def sign_of_gpu() -> str | None:
    """What says that there is a GPU for this process, whether or not torch can use it; None for nothing.

    Asks no driver.
    """
    if number("SLURM_GPUS_ON_NODE"):
        return f"SLURM_GPUS_ON_NODE={os.environ['SLURM_GPUS_ON_NODE']}"
    for name in (*NAMING_GPUS, "SLURM_JOB_GPUS"):
        if os.environ.get(name, "") not in NO_GPU:
            return f"{name}={os.environ[name]}"
    if any(name in os.environ for name in NAMING_GPUS):
        return None  # the machine's are hidden from this process
    found = [path for pattern in GPU_FILES for path in sorted(Path("/dev").glob(pattern))]
    return f"{found[0]} is there" if found else None


def number(variable: str) -> int | None:
    """A positive number from the environment, or the first of several; None for anything else."""
    text = os.environ.get(variable, "").split(",")[0].strip()
    return int(text) or None if text.isdecimal() else None

"""The share of a machine's CPUs, memory and GPUs that this process may use."""

import os
from dataclasses import dataclass
from pathlib import Path

# The environment variable that says how much of the trunk's output is kept, and where.
FEATURES = "ATELIER_FEATURES"
DEVICE = "ATELIER_DEVICE"  # the environment variable that says what to train on
# Variables that name GPUs, and the values that mean no GPU. The last value is SLURM's.
NAMING_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
NO_GPU = ("", "-1", "NoDevFiles")
GPU_FILES = ("nvidia[0-9]*", "kfd")  # in /dev


@dataclass(frozen=True)
class Allocation:
    """What a scheduler has granted. A field is None if the scheduler said nothing about it."""

    cpus: int | None = None
    memory: int | None = None  # bytes
    memory_per_cpu: int | None = None  # bytes
    gpus: str | None = None  # the sign that there are GPUs, for a message


_granted = Allocation()  # without a scheduler


def set_granted(allocation: Allocation) -> None:
    """Set what a scheduler has granted to this process. Call it once, at the start."""
    global _granted
    _granted = allocation


def cpu_count() -> int:
    """The number that ATELIER_CPUS gives, else that granted, else all CPUs of this process."""
    return number("ATELIER_CPUS") or _granted.cpus or len(os.sched_getaffinity(0))


def memory_limit() -> int | None:
    """The bytes of main memory that were granted. None without a limit."""
    per_cpu = _granted.memory_per_cpu
    return _granted.memory or (per_cpu and per_cpu * cpu_count())


def sign_of_gpu() -> str | None:
    """A sign that this process has a GPU, whether or not torch can use it. None without a sign.

    This asks no driver.
    """
    if _granted.gpus:
        return _granted.gpus
    for name in NAMING_GPUS:
        if os.environ.get(name, "") not in NO_GPU:
            return f"{name}={os.environ[name]}"
    if any(name in os.environ for name in NAMING_GPUS):
        return None  # the machine's GPUs are hidden from this process
    files = [path for pattern in GPU_FILES for path in sorted(Path("/dev").glob(pattern))]
    return f"{files[0]} is there" if files else None


def visible_gpus() -> list[str]:
    """The names of the GPUs of NVIDIA's that processes may use, if any. This asks no driver."""
    if os.environ.get(DEVICE) == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [] if visible in NO_GPU else visible.split(",")
    return [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]


def number(variable: str) -> int | None:
    """A positive number from the environment, the first if there are several. Else None."""
    text = os.environ.get(variable, "").split(",")[0].strip()
    return int(text) or None if text.isdecimal() else None

"""What SLURM has granted to this process, told to the trainer."""

import os

from trainer.allocation import NO_GPU, Allocation, number, set_granted


def take_granted() -> None:
    """Read SLURM's variables for the trainer. To be called once, where a process begins."""
    per_node, per_cpu = number("SLURM_MEM_PER_NODE"), number("SLURM_MEM_PER_CPU")  # MiB
    set_granted(
        Allocation(
            cpus=number("SLURM_CPUS_PER_TASK"),
            memory=per_node and per_node << 20,
            memory_per_cpu=per_cpu and per_cpu << 20,
            gpus=_sign_of_gpus(),
        )
    )


def _sign_of_gpus() -> str | None:
    count, listed = os.environ.get("SLURM_GPUS_ON_NODE"), os.environ.get("SLURM_JOB_GPUS", "")
    if number("SLURM_GPUS_ON_NODE"):
        return f"SLURM_GPUS_ON_NODE={count}"
    return None if listed in NO_GPU else f"SLURM_JOB_GPUS={listed}"

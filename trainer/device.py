"""The device that a process trains on: which one, its memory, its threads, its errors."""

import ctypes
import resource
from contextlib import suppress

import psutil
import torch

from trainer.allocation import cpu_count, memory_limit, number

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def pick_device() -> torch.device:
    """The GPU that CUDA_VISIBLE_DEVICES leaves visible, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare_process() -> int:
    """Let torch use the CPUs that this process was given, and keep the memory that it frees.

    Returns the number of threads.
    """
    torch.set_num_threads(number("OMP_NUM_THREADS") or cpu_count())
    # glibc gives a large tensor's memory back to the kernel at once, and the next one is paid for in
    # page faults: on a CPU, 40 % of an epoch's time. The largest are few enough to pay that, and would
    # leave holes that fit no other.
    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        # Older versions refuse more than 32 MiB.
        if libc.mallopt(M_MMAP_THRESHOLD, 64 << 20) or libc.mallopt(M_MMAP_THRESHOLD, 32 << 20):
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    return torch.get_num_threads()


def release_memory() -> None:
    """Give the kernel what lies unused between the tensors that are kept.

    Once an epoch: the pieces that one phase has left are often too small for the next one's tensors.
    """
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(device: torch.device) -> int:
    """Bytes that this process may use in all, of the device where it counts them, else of the node."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return memory_limit() or psutil.virtual_memory().available + psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """Bytes at most in use so far, of the device where it counts them, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the trial does not fit into the memory there is."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def is_device_fault(error: BaseException) -> bool:
    """Whether the GPU is unusable for this process from now on."""
    return "CUDA error" in str(error)

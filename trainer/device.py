"""The device that a process trains on: which one, its memory, its threads, its errors."""

import ctypes
import logging
import os
import resource
import socket
from contextlib import suppress
from functools import cache

import psutil
import torch

from trainer.allocation import cpu_count, memory_limit, number, sign_of_gpu
from trainer.torch_file import said

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
DEVICE = "ATELIER_DEVICE"  # the environment variable that says what to train on


class DeviceError(RuntimeError):
    """This machine has not the device that was asked for; the message is one line."""

    exit_code = 1  # the place's fault, not the input's: another machine may have it


class UnknownDeviceError(ValueError):
    """ATELIER_DEVICE says something else than cuda or cpu; the message is one line."""


def pick_device() -> torch.device:
    """What ATELIER_DEVICE says, cuda or cpu; else the GPU where there is one, else the CPU.

    A GPU that was granted or is there is never passed over in silence. It is tried, so that one in a bad
    state is found before there is work to lose. Raises DeviceError, UnknownDeviceError.
    """
    wanted = os.environ.get(DEVICE, "")
    if wanted not in ("", "cuda", "cpu"):
        raise UnknownDeviceError(
            f"{DEVICE}={wanted!r}: allowed are cuda and cpu; CUDA_VISIBLE_DEVICES says which GPU"
        )
    if wanted == "cpu":
        note_cpu(f"{DEVICE}=cpu")
        return torch.device("cpu")
    asked = f"{DEVICE}=cuda" if wanted else sign_of_gpu()
    if asked is None:
        if not torch.cuda.is_available():
            note_cpu("no GPU here")
            return torch.device("cpu")
        asked = "torch sees one"
    try:
        torch.ones(1, device="cuda").add(1).item()
    except Exception as error:  # a driver that is absent, old or broken: each has an error of its own
        raise DeviceError(
            f"{socket.gethostname()} has no GPU that torch can use: {said(error)}; a GPU was asked for "
            f"({asked}); mend that, use another machine, or train on the CPU with {DEVICE}=cpu"
        ) from error
    return torch.device("cuda")


@cache
def note_cpu(why: str) -> None:
    """Once in a process."""
    log.info("training on the CPU of %s: %s", socket.gethostname(), why)


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

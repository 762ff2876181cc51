"""The device that a process trains on: which one, its memory, its threads, its errors."""

import ctypes
import logging
import os
import resource
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import psutil
import torch

from trainer.allocation import DEVICE, cpu_count, memory_limit, number, sign_of_gpu
from trainer.torch_file import said

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
# Environment variables that choose among a library's kernels.
STEERING = (
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
)


class DeviceError(RuntimeError):
    """This machine lacks the device that was asked for. The message is one line."""

    exit_code = 1  # not the input's fault, because another machine may have the device


class UnknownDeviceError(ValueError):
    """ATELIER_DEVICE is neither cuda nor cpu. The message is one line."""


def pick_device() -> torch.device:
    """The device that ATELIER_DEVICE names, cuda or cpu. Else a GPU if there is one, else the CPU.

    A GPU that was granted or is present is never ignored silently. It is tried, so that a broken GPU is
    noticed before there is work to lose. Raises DeviceError, UnknownDeviceError.
    """
    named = os.environ.get(DEVICE, "")
    if named not in ("", "cuda", "cpu"):
        raise UnknownDeviceError(
            f"{DEVICE}={named!r}: allowed are cuda and cpu; CUDA_VISIBLE_DEVICES says which GPU"
        )
    if named == "cpu":
        note_cpu(f"{DEVICE}=cpu")
        return torch.device("cpu")
    sign = f"{DEVICE}=cuda" if named else sign_of_gpu()
    if sign is None:
        if not torch.cuda.is_available():
            note_cpu("no GPU here")
            return torch.device("cpu")
        sign = "torch sees one"
    try:
        torch.ones(1, device="cuda").add(1).item()
    except Exception as error:  # an absent, an old and a broken driver raise different errors
        raise DeviceError(
            f"{socket.gethostname()} has no GPU that torch can use: {said(error)}; a GPU was asked for "
            f"({sign}); mend that, use another machine, or train on the CPU with {DEVICE}=cpu"
        ) from error
    return torch.device("cuda")


@cache
def note_cpu(why: str) -> None:
    """Log once in a process that it computes on the CPU, and why."""
    log.info("computing on the CPU of %s: %s", socket.gethostname(), why)


def prepare_process() -> int:
    """Let torch use the CPUs that this process was given, and reuse the memory that it frees.

    Returns the number of threads.
    """
    torch.set_num_threads(number("OMP_NUM_THREADS") or cpu_count())
    # glibc gives a large tensor's memory back to the kernel at once. The next tensor pays for that in
    # page faults, which took 40 % of an epoch's time on a CPU. The memory of the very largest tensors
    # still goes back: they are few, and would leave holes that nothing else fits.
    with suppress(OSError, AttributeError):  # raised without glibc
        libc = ctypes.CDLL(None)
        # Older versions refuse more than 32 MiB.
        if libc.mallopt(M_MMAP_THRESHOLD, 64 << 20) or libc.mallopt(M_MMAP_THRESHOLD, 32 << 20):
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    return torch.get_num_threads()


def release_memory() -> None:
    """Give unused memory between the tensors back to the kernel.

    This is called once an epoch, because the gaps after one phase are often too small for the next.
    """
    with suppress(OSError, AttributeError):  # raised without glibc
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(device: torch.device) -> int:
    """Bytes that this process may use in total, of the GPU's memory or else of the node's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return memory_limit() or psutil.virtual_memory().available + psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far, of the GPU's memory or else of the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_model(device: torch.device) -> str:
    """What tells devices apart whose results may differ in bits."""
    steering = [f"{name}={os.environ.get(name)}" for name in STEERING]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        libraries = f"CUDA {torch.version.cuda}, cuDNN {cudnn}"
        return f"{properties.name}, {properties.multi_processor_count}, {libraries}, {steering}"
    cpu = f"{socket.gethostname()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{cpu}, {torch.get_num_threads()} threads, {steering}"


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Copy a tensor to main memory, beside what the device does next. Returns what waits for it."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.current_stream(tensor.device).record_event()

    def wait() -> torch.Tensor:
        done.synchronize()
        return copy

    return wait


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # Of main memory; of a graph and of memory that is pinned; of cuBLAS.
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in words)


def is_device_fault(error: BaseException) -> bool:
    """Whether the GPU is unusable for this process from now on."""
    return "CUDA error" in str(error) and not is_out_of_memory(error)

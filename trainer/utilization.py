"""How busy this process's GPU is, as NVML says."""

import logging
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

import pynvml
import torch

log = logging.getLogger(__name__)

EVERY_SECONDS = 0.2  # NVML's own value is that of the last sixth of a second
MOST_SAMPLES = 10_000


class Utilization:
    """Samples the share of the time in which the GPU computes, from a thread of its own.

    Nothing is known of a CPU, of a part of a GPU (MIG), and without NVML.
    """

    def __init__(self, device: torch.device) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=MOST_SAMPLES)  # when, and the share
        self._gpu = _handle(device)
        self._is_closed = threading.Event()
        if self._gpu is not None:
            threading.Thread(target=self._sample, name="utilization", daemon=True).start()

    def since(self, moment: float) -> float | None:
        """The mean share since a moment of `time.monotonic`, in [0, 1]. None if it is not known."""
        shares = [share for when, share in self._samples.copy() if when >= moment]
        if not shares and self._samples:  # a short epoch
            shares = [self._samples[-1][1]]
        return sum(shares) / len(shares) if shares else None

    def close(self) -> None:
        """End the thread."""
        self._is_closed.set()

    def _sample(self) -> None:
        with suppress(pynvml.NVMLError):  # then nothing more is known
            while not self._is_closed.wait(EVERY_SECONDS):
                share = pynvml.nvmlDeviceGetUtilizationRates(self._gpu).gpu / 100
                self._samples.append((time.monotonic(), share))


def _handle(device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # CUDA numbers GPUs otherwise
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        with suppress(pynvml.NVMLError_NotSupported):  # which a GPU says that cannot be parted
            if pynvml.nvmlDeviceGetMigMode(gpu)[0]:
                return None
        pynvml.nvmlDeviceGetUtilizationRates(gpu)
    except pynvml.NVMLError as error:
        log.info("how busy the GPU is cannot be said: %s", error)
        return None
    return gpu

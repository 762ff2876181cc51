"""What `atelier doctor` asks of the machine: Python, packages, driver, GPUs, memory, limits."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

import psutil
import pynvml

from search.doctor.check import Check, State, not_asked, note, ok, told, wrong
from search.forking import PROJECT_FOLDER
from storage import limits
from trainer.allocation import DEVICE, cpu_count, memory_limit, sign_of_gpu, visible_gpus

GB = 10**9
PACKAGES = ("atelier", "torch", "torchvision", "timm", "optuna")
INSTALL = "install what requirements.txt names: make venv"
# The least driver by the major version of CUDA that torch was built for, from
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
TRY_SECONDS = 120  # to import torch from a cold file system takes a minute
TRY_DEVICE = (
    "from search.slurm.granted import take_granted; from trainer.device import pick_device; "
    "take_granted(); print(pick_device())"
)
LITTLE_MEMORY = 2 * GB  # torch alone takes a part of it
CGROUPS = Path("/sys/fs/cgroup")


def python() -> Iterator[Check]:
    """The interpreter."""
    yield ok("python", f"{platform.python_version()}, {sys.executable}")


def packages() -> Iterator[Check]:
    """The versions of the packages on which a trial's numbers depend, from their metadata alone."""
    versions = {name: _version(name) for name in PACKAGES}
    found = ", ".join(f"{name} {number or 'is not installed'}" for name, number in versions.items())
    if None in versions.values():
        yield wrong("packages", found, INSTALL)
        return
    wanted = re.search(r"torch==([\w.]+)", " ".join(requires("torchvision") or []))
    if wanted and wanted[1] != str(versions["torch"]).partition("+")[0]:
        yield wrong("packages", f"{found}; this torchvision is for torch {wanted[1]}", INSTALL)
        return
    yield ok("packages", found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpus() -> Iterator[Check]:
    """The driver against the CUDA that torch was built for, and whether torch can use the GPUs."""
    if os.environ.get(DEVICE) == "cpu":
        yield ok("gpus", f"none wanted: {DEVICE}=cpu")
        return
    driver, names = _nvidia()
    if not names and sign_of_gpu() is None and not os.environ.get(DEVICE):
        yield not_asked("gpus", f"no GPU here (NVIDIA's driver: {driver})")
        return
    usable = _try_device()
    yield _driver(driver, usable.state is State.OK)
    yield replace(usable, found=", ".join([*names, usable.found]))


def _nvidia() -> tuple[str | pynvml.NVMLError, list[str]]:
    """The driver's version, or why there is none; and the GPUs' names and memory."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return error, []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        names = [
            f"{pynvml.nvmlDeviceGetName(gpu)} ({pynvml.nvmlDeviceGetMemoryInfo(gpu).total / GB:.0f} GB)"
            for gpu in handles
        ]
        return pynvml.nvmlSystemGetDriverVersion(), names
    finally:
        pynvml.nvmlShutdown()


def _driver(driver: str | pynvml.NVMLError, usable: bool) -> Check:
    """Whether the driver is new enough for torch. If torch can use the GPU, it is."""
    cuda = torch_cuda()
    found = f"{driver}; torch was built for {f'CUDA {cuda}' if cuda else 'no CUDA'}"
    if usable:
        return ok("driver", found)
    mend = f"or train on the CPU: {DEVICE}=cpu"
    if not isinstance(driver, str):
        return wrong("driver", f"NVIDIA's library says: {found}", f"let it be mended, {mend}")
    if cuda is None:
        return wrong("driver", found, f"{INSTALL}, {mend}")
    least, number = LEAST_DRIVER.get(int(cuda.split(".")[0])), driver.split(".")[0]
    if least is None or not number.isdecimal():
        return not_asked("driver", f"{found}; which driver that needs is not known here")
    if int(number) >= least:
        return ok("driver", found)
    remedy = (
        f"let an administrator install driver {least} or newer, or install a torch for an older CUDA"
    )
    return wrong("driver", f"{found}, which needs driver {least} or newer", remedy)


def torch_cuda() -> str | None:
    """The CUDA that torch was built for, as in 13.0. None for none. Reads torch's file of versions."""
    text = Path(str(distribution("torch").locate_file("torch/version.py"))).read_text("utf-8")
    found = re.search(r"^cuda\b[^=]*= '([\d.]+)'", text, re.MULTILINE)
    return found and found[1]


def _try_device() -> Check:
    """Let a process of its own use the device, as a worker does first. A broken driver may hang."""
    try:
        tried = subprocess.run(
            [sys.executable, "-P", "-c", TRY_DEVICE],
            env=os.environ | {"PYTHONPATH": PROJECT_FOLDER},
            capture_output=True,
            text=True,
            timeout=TRY_SECONDS,
        )
    except subprocess.TimeoutExpired:
        remedy = "see whether nvidia-smi answers, and let an administrator mend the driver"
        return wrong("gpus", f"torch has not used the device in {TRY_SECONDS} s", remedy)
    if tried.returncode == 0:
        return ok("gpus", f"torch uses {tried.stdout.strip()}, visible: {len(visible_gpus())}")
    error = (tried.stderr.strip().splitlines() or [limits.why_killed()])[-1]
    return told("gpus", re.sub(r"^trainer\.device\.\w+: ", "", error))


def memory() -> Iterator[Check]:
    """The CPUs and the memory that this process was granted."""
    total, granted, group = psutil.virtual_memory().total, memory_limit(), _group_limit()
    found = f"CPUs: {cpu_count()}, memory: {total / GB:.1f} GB"
    found += f", {granted / GB:.1f} granted by SLURM" if granted else ""
    found += f", {group / GB:.1f} allowed by its control group" if group and group < total else ""
    least = min(amount for amount in (total, granted, group) if amount)
    if least < LITTLE_MEMORY:
        remedy = "ask for more (memory in [slurm.*]), or train elsewhere: a worker may be killed"
        yield note("memory", f"{found}, which is little", remedy)
    else:
        yield ok("memory", found)


def _group_limit() -> int | None:
    """The bytes that this process's control group (version 2) may use; None without a limit."""
    lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = CGROUPS / own.lstrip("/")
    texts = [
        (place / "memory.max").read_text("utf-8").strip()
        for place in (folder, *folder.parents)
        if place.is_relative_to(CGROUPS) and (place / "memory.max").is_file()
    ]
    return min((int(text) for text in texts if text.isdecimal()), default=None)


def shell_limits() -> Iterator[Check]:
    """The limits of this shell, which SLURM gives to jobs too."""
    problems = [*limits.too_low()]
    for problem in problems:
        yield told("ulimit", problem)
    if not problems:
        yield ok("ulimit", "enough open files, file size and address space")

"""Submit a job: check what would fail in the queue, then give SLURM the script."""

import logging
import re
import shlex
import tempfile
from pathlib import Path

import huggingface_hub

from search.errors import InputError
from search.export import Bundle, check_origin
from search.slurm.commands import (
    Answer,
    SilenceError,
    SlurmError,
    call,
    not_understood,
    one_line,
)
from search.slurm.environment import clean_environment
from search.slurm.logs import log_folder
from search.slurm.script import array_script, left_open, run_script
from search.slurm.site import absent_commands
from search.study_config import NO_FILE, StudyConfig
from storage.database import connect
from storage.ownership import with_users_umask
from storage.paths import make_private
from storage.status import read_status
from storage.studies import enter_array_job
from storage.words import counted
from trainer.config import TrainConfig
from trainer.dataset import Dataset, read_dataset
from trainer.division import divide
from trainer.kind import not_weights

log = logging.getLogger(__name__)


def submit_study(file: StudyConfig, profile: str, array: str, options: list[str]) -> str:
    """Check what would fail in the queue, create the study if need be, submit. Returns the job id.

    Raises InputError, DatasetError, DatabaseError. Then nothing was submitted.
    """
    from search.study import lead_study  # late: Optuna is slow to import, and only this needs it

    _check_sbatch()
    script = array_script(file, profile, array, options)
    check_weights(file.shared)
    dataset = dataset_of(file.shared)
    engine = connect()
    make_log_folder()
    check_script(script)
    entry = lead_study(file, engine, dataset)
    status = read_status(engine, entry.study_id, entry.name)
    if status.has_ended:
        raise InputError(
            f"study {entry.name!r} has its {counted(status.finished, 'trial')}; raise study.max_trials "
            f"(of a confirmation, --seeds), or see: atelier status {shlex.quote(entry.name)}"
        )
    job = submit_script(script)
    enter_array_job(engine, entry.study_id, job, array)
    return job


def submit_run(bundle: Bundle, config: TrainConfig, profile: str, options: list[str]) -> str:
    """Check what would fail in the queue and submit `atelier train`. Returns the job id.

    Raises InputError, DatasetError. Then nothing was submitted.
    """
    _check_sbatch()
    script = run_script(config, bundle.slurm, profile, options)
    check_weights(config)
    check_origin(bundle, config, dataset_of(config).fingerprint)
    make_log_folder()
    check_script(script)
    with with_users_umask():  # SLURM gives the job this umask
        return submit_script(script)


def dataset_of(config: TrainConfig) -> Dataset:
    """Read the dataset. Raises DatasetError, also for too few images for the configuration."""
    dataset = read_dataset(config.data, unknown_labels=config.unknown_labels)
    divide(dataset, config)
    return dataset


def _check_sbatch() -> None:
    """Raises InputError where there is no SLURM: then what jobs need does not matter."""
    if "sbatch" in absent_commands():
        raise InputError("no sbatch on this machine; submit on a login node of the cluster")


def make_log_folder() -> None:
    try:
        make_private(log_folder())
        tempfile.TemporaryFile(dir=log_folder()).close()
    except OSError as error:
        raise InputError(
            f"cannot write to {log_folder()} ({error.strerror}); set ATELIER_HOME"
        ) from None


def check_weights(config: TrainConfig) -> None:
    """Raises InputError unless the nodes will find the weights without the internet."""
    if config.weights not in NO_FILE and (wrong := not_weights(Path(config.weights))):
        raise InputError(f"weights = {config.weights!r}: {wrong}")
    if config.weights != "timm":
        return
    name = config.backbone
    if "." not in name:
        raise InputError(f"backbone = {name!r}: name the weights' tag too, as in {name}.TAG")
    cached = huggingface_hub.try_to_load_from_cache(f"timm/{name}", "model.safetensors")
    if not isinstance(cached, str):
        raise InputError(
            f"weights = 'timm': {name} is not in the cache, and compute nodes may have no internet; "
            f"get it with: hf download timm/{name} config.json model.safetensors, or give a file "
            "with --weights"
        )


def try_script(script: str) -> str:
    """Let sbatch look at the script without submitting it. Returns what it says of the start.

    Raises SlurmError, SilenceError.
    """
    return one_line(_sbatch(script, "--test-only").complaint)


def check_script(script: str) -> None:
    """The same for a script of the user's. Raises InputError."""
    try:
        try_script(script)
    except SilenceError as error:
        raise InputError(f"{error}; try again, on a login node of the cluster") from None
    except SlurmError as error:
        raise InputError(f"{error}; change the [slurm.*] table, or what it needs") from None


def submit_script(script: str) -> str:
    """Submit the script. Returns the job's id, with `;CLUSTER` after it where sbatch names one.

    Raises InputError.
    """
    try:
        output, complaint = _sbatch(script, "--parsable")
        # Plug-ins may print lines too.
        ids = set(re.findall(r"^\s*([0-9]{1,10}(?:;[^;\s]+)?)\s*$", output, re.MULTILINE))
        if len(ids) != 1:
            raise not_understood("sbatch", f"{output}\n{complaint}")
    except SlurmError as error:
        raise InputError(
            f"{error}; look with squeue --me whether the job is there before you try again"
        ) from None
    if complaint:
        log.warning("sbatch said: %s", one_line(complaint))
    return str(ids.pop())


def _sbatch(script: str, option: str) -> Answer:
    return call("sbatch", option, text=script, environment=clean_environment(*left_open(script)))

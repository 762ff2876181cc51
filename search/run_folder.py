"""The models in a run's folder: the one to predict with, and the one that the run began with."""

from pathlib import Path

from search.errors import InputError
from search.study_config import weights_identity
from trainer.files import write_atomically

GIVE = "give the run folder of a finished: atelier train"


def model_path(run: Path) -> Path:
    """The file to predict with: a finished run's best model, else its last. Raises InputError."""
    if run.suffix == ".toml":
        its_run = run.with_suffix(".run")
        next_step = (
            f"its run is {its_run}: give that"
            if its_run.is_dir()
            else "train it first, with: atelier train"
        )
        raise InputError(f"{run} is a configuration; {next_step}")
    if run.is_file():
        return run
    best, last = run / "best.safetensors", run / "last.safetensors"
    if last.is_file():
        return best if best.is_file() else last
    if best.is_file():
        raise InputError(f"{run}: the run is not finished; go on with atelier train, or name {best}")
    if not run.exists():
        config = run.with_suffix(".toml")
        remedy = f"make it with: atelier train {config}" if config.is_file() else GIVE
        raise InputError(f"{run}: no such run; {remedy}")
    raise InputError(f"{run}: no model in it; {GIVE}")


def init_path(folder: Path, init: Path) -> Path:
    """The model file that the run in `folder` begins with: that of the run `init`, or its own copy.

    Raises InputError if there is none, or if the run began with another.
    """
    own = _own(folder)
    try:
        given = model_path(init)
    except InputError:
        if own.is_file():
            return own  # the other run may be gone
        raise
    if not own.is_file():
        return given
    if weights_identity(str(given)) != weights_identity(str(own)):
        raise InputError(
            f"--init {init}: is not what the run in {folder} began with, which is {own}; give that, or "
            "another --run"
        )
    return own


def keep_init(folder: Path, given: Path, digest: str) -> None:
    """Copy the model file that a run begins with into its folder. Raises OSError.

    Raises InputError if the file has changed since it was read.
    """
    own = _own(folder)
    if not own.is_file():
        write_atomically(own, given.read_bytes())
        if weights_identity(str(own)) != digest:
            own.unlink()
            raise InputError(f"{given} has just changed, since its run goes on; give the command again")


def _own(folder: Path) -> Path:
    return folder / "init.safetensors"

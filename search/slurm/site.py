"""What SLURM is here, and what this site lets it do, as `scontrol show config` says."""

import re
import shutil

from search.slurm.commands import call, not_understood

COMMANDS = ("sbatch", "squeue", "scontrol", "sinfo")


def absent_commands() -> list[str]:
    """Those of SLURM's commands that Atelier calls and this machine lacks."""
    return [name for name in COMMANDS if shutil.which(name) is None]


def configuration() -> dict[str, str]:
    """SLURM's settings by name, with its version as "version". Raises SlurmError, SilenceError."""
    output = call("scontrol", "show", "config").output
    settings = dict(re.findall(r"^(\w+) *= (.*?) *$", output, re.MULTILINE))
    if "SLURM_VERSION" not in settings:
        raise not_understood("scontrol show config", output)
    return settings | {"version": settings["SLURM_VERSION"]}

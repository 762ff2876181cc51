"""Commands of SLURM that print what a test says; tests/cluster has the real ones."""

import os

import pytest

from search.slurm import job as job_module
from search.slurm.commands import version
from search.slurm.queue import say


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Puts a command into PATH that prints what a test says."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SQUEUE_PARTITION", "cpu")  # it would hide jobs
    monkeypatch.setattr(job_module, "PAUSE_SECONDS", 0)
    version.cache_clear()
    say.cache_clear()

    def prints(name, text, code=0, error=""):
        """It also notes its arguments and its environment in NAME.arguments and NAME.environment."""
        (tmp_path / f"{name}.output").write_text(text)
        (tmp_path / f"{name}.error").write_text(error)
        script = tmp_path / name
        script.write_text(
            "#!/bin/bash\n"
            f'[ "$*" = --version ] && echo slurm 99.11.1 && exit\n'
            f'echo "$*" >> {tmp_path}/{name}.arguments\n'
            f"env > {tmp_path}/{name}.environment\n"
            f"cat {tmp_path}/{name}.output; cat {tmp_path}/{name}.error >&2; exit {code}\n"
        )
        script.chmod(0o755)
        return tmp_path / f"{name}.arguments"

    return prints

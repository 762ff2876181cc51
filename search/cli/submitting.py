"""The verb submit, and how an array of workers is submitted."""

import typer

from search.cli.finding import command
from search.cli.options import (
    ARRAY,
    TUNING,
    Array,
    Data,
    DryRun,
    Pack,
    Profile,
    Set,
    StudyPath,
    Weights,
    check_pack,
    load_study,
    print_script,
    say_each,
    worker_options,
)
from search.doctor.look import about_jobs
from search.slurm.script import array_script
from search.slurm.submit import submit_study
from search.study_config import StudyConfig
from storage.studies import job_in_words


def submit(
    study: StudyPath,
    array: Array = None,
    profile: Profile = None,
    dry_run: DryRun = False,
    pack: Pack = None,
    data: Data = None,
    weights: Weights = None,
    set_: Set = None,
) -> None:
    """Start workers as a SLURM array job, after checking what would fail there."""
    config = load_study(study, data, weights, set_)
    check_pack(pack)
    arguments = [str(study.absolute()), *worker_options(data, weights, set_, pack)]
    next_commands = [
        command("status", "--watch", str(study)),
        command("logs", str(study)),
        command("stop", str(study)),
        command("dashboard"),
    ]
    submit_workers(config, arguments, array, profile, dry_run, next_commands)


def submit_workers(
    config: StudyConfig,
    arguments: list[str],
    array: str | None,
    profile: str | None,
    dry_run: bool,
    next_commands: list[str],
) -> None:
    """Submit an array of workers with these arguments, or print its script."""
    array = ARRAY if array is None else array
    profile = TUNING if profile is None else profile
    if dry_run:
        print_script(array_script(config, profile, array, arguments))
        return
    job = submit_study(config, profile, array, arguments)
    say_each(about_jobs())
    typer.echo(f"job {job_in_words(job)}")
    for next_command in next_commands:
        typer.echo(f"  {next_command}")

"""`atelier doctor`: shows what a search needs here, what was found of it, and what to do."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dashboards.terminal import console, say
from search.cli.finding import OptionalStudy, command, is_file
from search.cli.options import (
    TUNING,
    Data,
    Profile,
    Set,
    Weights,
    file_or_recorded,
    worker_options,
)
from search.doctor.check import Check, State, ask, not_asked, ok
from search.doctor.look import checks_here, render
from search.doctor.node import on_node
from search.errors import InputError
from search.exit_codes import ExitCode
from search.json_output import AsJson, print_json
from search.study_config import StudyConfig


def doctor(
    study: OptionalStudy = None,
    as_json: AsJson = False,
    node: Annotated[
        bool, typer.Option("--on-node", help="Ask on a node too, by a short job of the profile.")
    ] = False,
    profile: Profile = None,
    data: Data = None,
    weights: Weights = None,
    set_: Set = None,
) -> None:
    """Check what a search needs here: machine, folders, database, SLURM.

    With a study also its weights, dataset, profile and record.
    Each line is a check, with what to do where something is wrong.
    Exit codes: 0 nothing is wrong, 1 something is.
    """
    if node and study is None:
        raise InputError("--on-node needs a study, whose profile says how to get a node; name it")
    read: list[StudyConfig] = []

    def read_study() -> Iterator[Check]:
        if study is None:
            yield not_asked("study", "no study was given", command("doctor", "STUDY"))
            return
        read.append(file_or_recorded(study, data, weights, set_))
        yield ok("study", f"{read[0].study.name} {f'in {study}' if is_file(study) else 'on record'}")

    checks = [*ask("study", read_study)]
    file, chosen = read[0] if read else None, profile or TUNING
    checks += checks_here(file, chosen, profile is not None)
    if node and file is not None and study is not None:
        named = str(Path(study).absolute()) if is_file(study) else study
        arguments = [*worker_options(data, weights, set_, None), "--", named]
        checks += ask("node", partial(on_node, file, chosen, arguments, [*checks]))
    if as_json:
        print_json(checks=checks)
    else:
        console().print(render(checks))
    if wrong := sum(check.state is State.WRONG for check in checks):
        say(f"{wrong} of {len(checks)} checks found something wrong (docs/usage.md)")
        raise typer.Exit(ExitCode.FAILED)

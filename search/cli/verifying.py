"""The verb verify, in a module of its own because its rules need more than a look at a study."""

import typer

from dashboards.terminal import printable, say
from search.cli.finding import StudyName, find_study
from search.exit_codes import ExitCode
from search.json_output import AsJson, print_json
from search.verify.look import verify as verify_study
from storage.database import READING
from storage.paths import home
from storage.words import counted


def verify(
    study: StudyName,
    as_json: AsJson = False,
) -> None:
    """Check that all holds what is promised of a study, while its workers run or later.

    Each line says what is wrong with which trial, and what to do next. Nothing is written.
    Exit codes: 0 all holds, 1 something does not.
    """
    engine, entry = find_study(study, READING)
    verdict = verify_study(engine, entry.name)
    findings, rules = verdict.findings, len(verdict.rules)
    if as_json:
        print_json(**verdict.as_dict())
    else:
        for finding in findings:
            typer.echo(printable(str(finding)))
        if not findings:
            trials = len(verdict.evidence.trials)
            typer.echo(f"study {entry.name!r}: {counted(trials, 'trial')}, all {rules} rules hold")
    if not verdict.evidence.has_files:
        say(f"note: no file was looked at, since the study's are not in ATELIER_HOME ({home()})")
    if findings:
        found = counted(len(findings), "finding")
        say(f"study {entry.name!r}: {found}, by {rules} rules (docs/guarantees.md)")
        raise typer.Exit(ExitCode.FAILED)

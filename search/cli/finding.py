"""Find a study by its name or its file: what the verbs share that only read the database."""

import shlex
from pathlib import Path
from typing import Annotated

import sqlalchemy as sa
import typer

from search.cli.completion import studies
from search.errors import InputError
from storage import database, schema
from storage.studies import StudyEntry, study_entry, study_names
from trainer.text import same_letters

NAMED = 20  # studies in an error, at most
# Verbs that read the record take a file for the name in it; those that read settings, for what it says.
_NAME = typer.Argument(help="Study name, or its study file.", autocompletion=studies)
_FILE = typer.Argument(help="Study file, or the name of a study on record.", autocompletion=studies)
StudyName = Annotated[str, _NAME]
OptionalStudyName = Annotated[str | None, _NAME]
Study = Annotated[str, _FILE]
OptionalStudy = Annotated[str | None, _FILE]


def find_database(sessions: database.Sessions = database.WORK) -> sa.Engine:
    """An engine on an existing database with tables of this version.

    Raises InputError, DatabaseError.
    """
    engine = database.look(sessions)
    if schema.schema_revision(engine) is None:
        raise InputError("the database has no study yet; start one with: atelier search STUDY.toml")
    schema.require_schema(engine)
    return engine


def is_file(study: str) -> bool:
    """Whether a study is meant by its file, and not by its name, which a file here may have too."""
    return study.endswith(".toml")


def find_study(
    name_or_file: str, sessions: database.Sessions = database.WORK
) -> tuple[sa.Engine, StudyEntry]:
    """Find a study that exists, by its name or its file. Raises InputError."""
    name = name_or_file
    if is_file(name):
        from search.toml_file import load_study_file  # late: with pydantic, which a name does not need

        name = load_study_file(Path(name)).study.name
    engine = find_database(sessions)
    entry = study_entry(engine, name) or study_entry(engine, same_letters(name))
    if entry is None:
        raise InputError(f"no study {name!r} in the database, {_which_has(study_names(engine))}")
    return engine, entry


def _which_has(names: list[str]) -> str:
    """What there is instead, and what to do next."""
    if not names:
        return "which has none yet; start one with: atelier search STUDY.toml"
    if len(names) > NAMED:
        return f"which has {len(names)}; they are listed by: atelier status"
    return f"which has: {', '.join(names)}; name one of these, or a study file (.toml)"


def command(*words: str) -> str:
    """A command that a user may copy."""
    return shlex.join(["atelier", *words])

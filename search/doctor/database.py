"""What `atelier doctor` asks of the database, and of a study's record in it."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import sqlalchemy as sa

from search.comparable import check_optuna, check_versions
from search.doctor.check import Check, State, ask, not_asked, note, ok, told, wrong
from storage import database, schema
from storage.clock import clock_lead
from storage.embedded import EmbeddedPostgres
from storage.paths import home
from storage.properties import Property
from storage.studies import StudyEntry, study_entry
from storage.url import configured_url, shown

CLOCK_SECONDS = 30
# Torch's version at the end of the names under which a study records its trunk (trainer/workspace.py).
_TORCH = re.compile(r", torch ([^,\s]+)$")


def database_here(study: str | None) -> Iterator[Check]:
    """Whether the database can be used from here, and whether versions are those of the study."""
    if configured_url() is None and not EmbeddedPostgres(home()).exists():
        yield not_asked("database", f"none in {home()} yet; the first search makes one")
        return
    engine = database.look(replace(database.WORK, checked=False))
    patience = database.thread_patience.set(0)  # somebody waits for the answer
    try:
        yield ok("database", shown(engine.url))
        fits = True
        for check in ask("db check", partial(_examined, engine)):
            fits = fits and check.state is not State.WRONG
            yield check
        yield from ask("clock", partial(_clock, engine))
        if study is not None:
            yield from ask("record", partial(_study, engine, study, fits))
    finally:
        database.thread_patience.reset(patience)
        engine.dispose()


def _examined(engine: sa.Engine) -> Iterator[Check]:
    """The checks of `atelier db check`, with one line for all settings of a session that are right."""
    settings = []
    for one in schema.examine(engine):
        if one.name in database.WORK.settings and not one.problem:
            settings.append(f"{one.name} {one.value}")
            continue
        yield _check(one)
    if len(settings) == len(database.WORK.settings):
        yield ok("db sessions", ", ".join(settings))


def _check(one: Property) -> Check:
    name = f"db {one.name}"
    if one.problem:
        return told(name, f"it {one.problem}")
    return note(name, one.value, one.remark) if one.remark else ok(name, one.value)


def _clock(engine: sa.Engine) -> Iterator[Check]:
    with engine.connect() as connection:
        lead = clock_lead(connection)
    found = f"{abs(lead):.1f} s {'ahead of' if lead >= 0 else 'behind'} the database's"
    if abs(lead) < CLOCK_SECONDS:
        yield replace(ok("clock", found), seconds=lead)
    else:
        remedy = "let an administrator set both clocks by NTP; logs and certificates go by them"
        yield replace(wrong("clock", found, remedy), seconds=lead)


def _study(engine: sa.Engine, name: str, fits: bool) -> Iterator[Check]:
    """The versions here against those on record."""
    if not fits or schema.schema_revision(engine) is None:
        yield not_asked(
            "record", "the database has to be in order first" if not fits else "no study yet"
        )
        return
    entry = study_entry(engine, name)
    if entry is None:
        yield not_asked("record", f"the database has no study {name!r} yet")
        return
    check_versions(entry)
    check_optuna(entry)
    yield _torch(entry)


def _torch(entry: StudyEntry) -> Check:
    """Workers have recorded torch's version. Atelier's own is in the versions that have passed."""
    here = version("torch").partition("+")[0]
    recorded = {one[1].partition("+")[0] for key in entry.trunks if (one := _TORCH.search(key))}
    if not recorded:
        return ok(
            "record", f"Optuna {entry.optuna_version}, as here; no worker has recorded torch's version"
        )
    if recorded == {here}:
        return ok("record", f"torch {here} and Optuna {entry.optuna_version}, as here")
    found = f"workers of study {entry.name!r} had torch {', '.join(sorted(recorded))}; here is {here}"
    return note("record", found, "install the same version on every machine, else curves differ")

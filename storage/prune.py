"""Find files that a study no longer needs, and run folders of deleted studies; remove them.

`atelier db prune` removes them. A worker with no work left also removes leftover checkpoints.

The checkpoints of every unfinished trial are kept, so that it can be resumed. The predictions of the
best trials and of those that are being confirmed are kept too: `atelier confirm` and `report` compute
from them. Users may also delete studies elsewhere, such as in optuna-dashboard.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa

from storage.database import retrying
from storage.optuna_tables import TRIALS, VALUES, TrialState
from storage.paths import DELETED, RunFolder, artifacts, files_in, home
from storage.studies import study_entry, study_names
from storage.usage import TRAINED_HERE

ABANDONED_SECONDS = 86400.0  # a file that is still being written is younger


def superfluous(
    engine: sa.Engine, study_id: int, runs: RunFolder, keep: int | None, always: Iterable[int] = ()
) -> Iterator[Path]:
    """Files that may be removed, in no order. Pictures that nobody finishes are among them.

    `keep` is how many of the best trials keep their predictions; None for all. The trials in `always`
    keep them too.
    """
    # Before the trials are read: later files may be a newer trial's.
    files = [*runs.files(), *files_in(artifacts())]
    ranked = _ranked(engine, study_id)
    complete = [number for number, _, trained_here in ranked if trained_here]
    unfinished = [number for number, state, _ in ranked if not state.is_finished()]
    resumable = {runs.checkpoints(number) for number in unfinished}
    # A worker writes a trial's predictions just before its end.
    wanted = {runs.predictions(number) for number in (*complete[:keep], *always, *unfinished)}
    for path in files:
        if path.name.startswith("."):
            may_go = _is_abandoned(path)
        elif path.match("predictions/trial-*.npz"):
            may_go = path not in wanted
        elif path.match("trial-*/attempt-*"):
            may_go = path.parent not in resumable or path.suffix == ".damaged"
        else:
            may_go = False  # logs, and a user's own files
        if may_go:
            yield path


def remove(paths: Iterable[Path]) -> None:
    """Remove files, and then their folders if these are empty."""
    for path in paths:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # the folder has other files
            path.parent.rmdir()


def forgotten(engine: sa.Engine) -> list[Path]:
    """Run folders without a study in this database, to which nobody has written for a day.

    They may belong to another database that shares the home. Only the user can know that.
    """
    folders = sorted((home() / "runs").glob("*"))  # before the studies are read: later folders are new
    entries = [study_entry(engine, name) for name in study_names(engine)]
    in_use = {RunFolder(entry.name, entry.created).path for entry in entries if entry is not None}
    return [
        folder
        for folder in folders
        if folder not in in_use and re.search(r"-\d{8}-\d{6}$", folder.name) and _is_at_rest(folder)
    ]


def _is_at_rest(folder: Path) -> bool:
    paths = {Path(top, name) for top, folders, files in os.walk(folder) for name in (*folders, *files)}
    mark = folder / DELETED  # to make it was to write to the folder, but it is nobody's work
    return all(map(_is_abandoned, paths - {mark} if mark in paths else paths | {folder}))


@retrying
def _ranked(engine: sa.Engine, study_id: int) -> list[tuple[int, TrialState, bool]]:
    """The trials' numbers, states, and whether our workers completed them; the best first."""
    query = (
        sa.select(TRIALS.c.number, TRIALS.c.state, TRAINED_HERE)
        .outerjoin(VALUES, VALUES.c.trial_id == TRIALS.c.trial_id)
        .where(TRIALS.c.study_id == study_id)
        .order_by(VALUES.c.value.desc().nulls_last(), TRIALS.c.number)
    )
    with engine.connect() as connection:
        return [(number, state, trained) for number, state, trained in connection.execute(query)]


def _is_abandoned(path: Path) -> bool:
    """Whether nobody has written to a file for long: perhaps its writer was killed."""
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > ABANDONED_SECONDS
    return False

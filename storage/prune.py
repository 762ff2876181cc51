"""What a study's folder holds that no longer matters: found by rule.

`atelier db prune` removes it; what it is of checkpoints, a worker removes that finds nothing more to do.
Kept are the checkpoints of every trial that is not finished, so that it can be resumed, and the
predictions of the best trials and of those that are being confirmed, from which `atelier confirm` and
`report` compute.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa
from optuna.storages._rdb.models import TrialModel, TrialValueModel
from optuna.trial import TrialState

from storage.database import retrying
from storage.runs import RunFolder

ABANDONED_SECONDS = 86400.0  # a file that somebody is writing is younger


def superfluous(
    engine: sa.Engine, study_id: int, runs: RunFolder, keep: int | None, always: Iterable[int] = ()
) -> Iterator[Path]:
    """Files that may go, in no order.

    `keep` is how many of the best trials keep their predictions; None: all. Those of the trials
    `always` keep them too.
    """
    files = runs.files()  # before the trials are read: a later file may be of one that begins meanwhile
    ranked = _ranked(engine, study_id)
    complete = [number for number, state in ranked if state == TrialState.COMPLETE]
    unfinished = [number for number, state in ranked if not state.is_finished()]
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
            may_go = False  # logs, and what a user has put there
        if may_go:
            yield path


def remove(paths: Iterable[Path]) -> None:
    """Remove files, and the folders that are empty then."""
    for path in paths:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # it has others
            path.parent.rmdir()


@retrying
def _ranked(engine: sa.Engine, study_id: int) -> list[tuple[int, TrialState]]:
    """The trials' numbers and states, the best first."""
    query = (
        sa.select(TrialModel.number, TrialModel.state)
        .outerjoin(TrialValueModel, TrialValueModel.trial_id == TrialModel.trial_id)
        .where(TrialModel.study_id == study_id)
        .order_by(TrialValueModel.value.desc().nulls_last(), TrialModel.number)
    )
    with engine.connect() as connection:
        return [(row.number, row.state) for row in connection.execute(query)]


def _is_abandoned(path: Path) -> bool:
    """Whether it is the unfinished file of a writer that was killed."""
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > ABANDONED_SECONDS
    return False

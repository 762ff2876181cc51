"""Show a confirmation on the dashboard's page of its search."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import sqlalchemy as sa

from dashboards.predictions import PredictionsError
from search.confirm.evidence import Confirmation, read_confirmation
from search.confirm.plan import SUFFIX
from search.confirm.table import COLUMNS, cells, verdict
from search.errors import InputError
from storage.status import Status, read_status
from storage.studies import StudyEntry, study_entry


class Page(NamedTuple):
    """A confirmation's table and its verdict in sentences."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    verdict: Sequence[str]


def confirmed_reader() -> Callable[[sa.Engine, StudyEntry, Status], Page | None]:
    """What reads the page of a search; it gives None for one that is not confirmed.

    A page is worked out again only if a trial has ended: that takes a part of a second.
    """
    known: dict[int, tuple[object, Page | None]] = {}

    def read(engine: sa.Engine, search: StudyEntry, status: Status) -> Page | None:
        linked = study_entry(engine, search.name + SUFFIX)
        if linked is None:
            return None
        reruns = read_status(engine, linked.study_id, linked.name)
        now = linked.study_id, linked.settings, reruns.max_trials, reruns.finished, status.finished
        if search.study_id not in known or known[search.study_id][0] != now:
            try:
                confirmation = read_confirmation(engine, search, status)
            except (InputError, PredictionsError) as error:  # which may pass: so it is not kept
                return Page((), (), [str(error)])
            known[search.study_id] = now, _page(confirmation)
        return known[search.study_id][1]

    return read


def _page(confirmation: Confirmation | None) -> Page | None:
    if confirmation is None:
        return None
    return Page(COLUMNS, [*map(cells, confirmation.candidates)], verdict(confirmation))

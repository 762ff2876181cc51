"""The report's text and its figures are of one reading of the study."""

import sqlalchemy as sa

from search.report import write_report
from storage.studies import study_entry
from tests.studies import fill


def test_a_report_reads_each_thing_once(engine, home, tmp_path):
    fill(engine, ["complete", "pruned", "failed", "running", "waiting", "complete"], name="filled")
    entry = study_entry(engine, "filled")
    statements = []
    sa.event.listen(
        engine, "before_cursor_execute", lambda _connection, _cursor, text, *_: statements.append(text)
    )
    page = write_report(engine, entry, tmp_path / "report")
    assert len(statements) == len(set(statements)) <= 12
    assert {path.name for path in page.parent.iterdir()} == {
        *("report.md", "report.html", "history.png", "curves.png"),
        *("compare-batch_size.png", "compare-weight_decay.png", "compare-dropout.png"),
    }

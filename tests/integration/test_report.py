"""The report's text and its figures are of one reading of the study."""

import re

import pytest
import sqlalchemy as sa

from dashboards import charts
from dashboards.outputs import OutputError
from search.report import write_report
from storage import curves, database
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
    assert len(statements) == len(set(statements)) <= 14
    assert {path.name for path in page.parent.iterdir()} == {
        *("report.md", "report.html", "history.png", "curves.png"),
        *("compare-batch_size.png", "compare-weight_decay.png", "compare-dropout.png"),
    }


def test_the_text_and_the_figures_show_one_moment(engine, home, tmp_path, monkeypatch):
    fill(engine, ["complete"] * 3, name="filled")
    entry = study_entry(engine, "filled")
    ends, draw = [], charts.history
    monkeypatch.setattr(charts, "history", lambda read: ends.extend(read) or draw(read))
    meanwhile = database.connect()

    def change(_connection, _cursor, text, *_):
        if "trial_values" in text:  # the status is being read: before the figures' data are
            with meanwhile.begin() as connection:
                connection.execute(sa.text("UPDATE trial_values SET value = 0.987"))

    before = {end.value for end in curves.read_ends(engine, entry.study_id)}
    sa.event.listen(engine, "after_cursor_execute", change)
    write_report(engine, entry, tmp_path / "report")
    assert {end.value for end in ends} == before
    assert {end.value for end in curves.read_ends(meanwhile, entry.study_id)} == {0.987}


def test_a_report_goes_into_a_folder_of_its_own(engine, home, tmp_path):
    fill(engine, ["complete"] * 2, name="filled")
    fill(engine, ["complete"] * 2, name="other")
    own, mine, file = tmp_path / "report", tmp_path / "mine", tmp_path / "file"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    file.write_text("mine")
    write_report(engine, study_entry(engine, "filled"), own)
    before = {path: path.read_bytes() for path in own.iterdir()}
    write_report(engine, study_entry(engine, "filled"), own)  # its own report is replaced
    assert before.keys() == {*own.iterdir()}
    before = {path: path.read_bytes() for path in own.iterdir()}
    for folder, said in (
        (mine, "mine: has thesis.tex, which is not of a report of study 'other'; give another folder"),
        (own, "has compare-batch_size.png, which is not of a report of study 'other'"),
        (file, "file: is a file; give a folder"),
    ):
        with pytest.raises(OutputError, match=re.escape(said)):
            write_report(engine, study_entry(engine, "other"), folder)
    assert before == {path: path.read_bytes() for path in own.iterdir()}
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]

"""A backup that is taken in the middle of a search, and what becomes of it elsewhere."""

import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from typer.testing import CliRunner

from search.cli import app
from search.exit_codes import ExitCode
from storage import backup, database, optuna_storage, paths, schema, studies
from storage.archive import BackupError
from storage.ledger import LeaseLost
from storage.outcome import RESTORED
from storage.tables import ATTEMPTS
from tests.conftest import empty_database
from tests.integration import test_ledger
from tests.integration.test_wrong_input import downgrade
from tests.studies import MAY_DIFFER, fill

runner = CliRunner()


@pytest.fixture
def elsewhere(server, tmp_path, monkeypatch):
    """Go to an empty home and an empty database, which is returned."""
    made = []

    def go():
        name = f"elsewhere_{len(made)}_{tmp_path.name.replace('-', '_').lower()}"[:60]
        text = empty_database(server, name)
        monkeypatch.setenv("ATELIER_DATABASE_URL", text)
        monkeypatch.setenv("ATELIER_HOME", str(tmp_path / name))
        made.append(database.connect(make_url(text)))
        return made[-1]

    yield go
    for engine in made:
        engine.dispose()


def stop_after(worker, epochs):
    """Let the worker be asked to stop when it has trained so many epochs."""
    train, numbers = worker.train, itertools.count(1)

    def counted():
        train()
        if next(numbers) == epochs:
            worker.stop.ask("enough", ExitCode.STOPPED)

    worker.train = counted
    return worker


def test_a_search_goes_on_elsewhere_where_the_backup_was_taken(
    engine, make_worker, elsewhere, tmp_path, monkeypatch
):
    assert (
        stop_after(make_worker(pictures=True), 5).run() == ExitCode.STOPPED
    )  # one trial, and two epochs of three
    taken = runner.invoke(app, ["db", "backup", str(tmp_path / "b.tar")])
    assert taken.exit_code == 0, taken.output
    assert make_worker().run() == ExitCode.DONE
    [study] = studies.study_names(engine)
    wanted = [
        [row | {"recorded": 0, "seconds": 0} for row in studies.epochs_of(engine, 1, n)] for n in (0, 1)
    ]

    other = elsewhere()
    result = runner.invoke(app, ["db", "restore", str(tmp_path / "b.tar")])
    assert result.exit_code == 0, result.output
    entry = studies.study_entry(other, study)
    assert [len(studies.epochs_of(other, entry.study_id, n)) for n in (0, 1)] == [3, 2]
    home = paths.home()
    files = {str(path.relative_to(home / "runs")).split("/", 1)[1] for path in home.rglob("trial-*.npz")}
    assert files == {"predictions/trial-00000.npz"}
    assert len([*home.rglob("trial-00001/*.pt")]) == 1  # it does not begin anew
    assert len([*(home / "artifacts").iterdir()]) == 1
    assert not [*home.glob(".restore*"), *home.glob("backup/*")]
    monkeypatch.chdir(tmp_path)  # where best.toml goes
    finished = runner.invoke(app, ["search", str(tmp_path / "study.toml"), "--workers", "1"])
    assert finished.exit_code == 0, finished.output
    for number, epochs in enumerate(wanted):
        again = studies.epochs_of(other, entry.study_id, number)
        for row, known in zip(again, epochs, strict=True):
            differing = {key for key in known if row[key] != known[key]}
            assert differing <= MAY_DIFFER, differing
    verified = runner.invoke(app, ["verify", study])
    assert verified.exit_code == 0, verified.output


def test_workers_of_the_time_before_are_fenced(engine, elsewhere, tmp_path):
    study = test_ledger.make_study(engine, max_trials=9)
    holder, idle = test_ledger.make_worker(engine, study), test_ledger.make_worker(engine, study)
    claim = holder.claim()
    backup.back_up(engine, tmp_path / "b.tar")
    late = test_ledger.make_worker(engine, study)
    late_claim = late.claim()

    other = elsewhere()
    backup.restore(other, tmp_path / "b.tar")
    storage = optuna_storage.optuna_storage(other)
    for worker in (holder, idle, late):
        worker.engine, worker.storage = other, storage  # the same URL, to a worker
        assert worker.claim() is None
        assert worker.stop_reason() == RESTORED
    for worker, lost in ((holder, claim), (late, late_claim)):
        with pytest.raises(LeaseLost):
            worker.renew(lost)
        with pytest.raises(LeaseLost):
            worker.record(lost, test_ledger.RESULT | {"epoch": 0}, 0.5)
        with pytest.raises(LeaseLost):
            worker.finish(lost, "complete", 0.5)
    new = test_ledger.make_worker(other, study)
    assert [new.claim().trial_number, new.claim([claim.trial_id]).trial_number] == [0, 1]
    with other.connect() as connection:
        ended = connection.execute(
            sa.select(ATTEMPTS.c.outcome, ATTEMPTS.c.reason).order_by("number")
        ).all()
    assert ended.count(("lost", RESTORED)) == 1


def test_numbers_go_on_after_the_last(engine, elsewhere, tmp_path):
    fill(engine, ["complete"] * 3, name="s")
    backup.back_up(engine, tmp_path / "b.tar")
    other = elsewhere()
    backup.restore(other, tmp_path / "b.tar")
    storage = optuna_storage.optuna_storage(other)
    optuna.load_study(study_name="s", storage=storage).ask({"x": SPACE})
    assert optuna.create_study(storage=storage, study_name="another").trials == []


SPACE = optuna.distributions.FloatDistribution(0, 1)


def test_a_backup_of_an_older_schema(engine, elsewhere, tmp_path, monkeypatch):
    fill(engine, ["complete", "pruned"], epochs=5, name="s")
    downgrade(engine)
    monkeypatch.setattr(schema, "require_schema", lambda _: "0004")
    backup.back_up(engine, tmp_path / "b.tar")
    monkeypatch.undo()
    other = elsewhere()
    backup.restore(other, tmp_path / "b.tar")
    assert schema.require_schema(other) == schema.head_revision()
    assert [len(studies.epochs_of(other, 1, number)) for number in (0, 1)] == [5, 1]


def entries(path):
    with tarfile.open(path) as tar:
        return [(entry, tar.extractfile(entry).read()) for entry in tar]


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for entry, data in members:
            tar.addfile(entry, io.BytesIO(data) if entry.isreg() else None)


def another(name, kind=tarfile.REGTYPE, data=b"x"):
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.linkname = kind, len(data), "/etc/passwd"
    return entry, data


def spoilt(members):
    """By what is wrong: the members of an archive."""
    table = next(i for i, (entry, data) in enumerate(members) if entry.name.endswith("trials"))
    entry, data = members[table]
    yield "has another digest", [*members[:table], (entry, b"9" + data[1:]), *members[table + 1 :]]
    yield "lacks a table", members[:table] + members[table + 1 :]
    yield "lacks its manifest", members[:-1]
    for name in ("files/runs/../../x", "files/runs/.hidden", "/etc/x", "files/runs/a//b", "x"):
        yield f"has {name}", [*members[:-1], another(name), members[-1]]
    yield "has a stranger", [*members[:-1], another("files/runs/s/trial-00000/x.pt"), members[-1]]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
        yield f"has a {kind}", [*members[:-1], another("files/runs/s/x", kind, b""), members[-1]]
    yield "has one twice", [members[table], *members]
    manifest, text = members[-1]
    for old, new in (
        (b'"format": 1', b'"format": 2'),
        (b'"created"', b'"made"   '),
        (b'"studies"', b'"pg_user"'),
        (b"{", b"["),
    ):
        assert old in text
        yield f"says {new}", [*members[:-1], (manifest, text.replace(old, new, 1))]


def test_nothing_of_a_spoilt_backup_is_restored(engine, home, elsewhere, tmp_path):
    fill(engine, ["complete"], epochs=2, name="s")
    whole = tmp_path / "whole.tar"
    backup.back_up(engine, whole)
    other = elsewhere()
    for what, members in spoilt(entries(whole)):
        write(tmp_path / "spoilt.tar", members)
        result = runner.invoke(app, ["db", "restore", str(tmp_path / "spoilt.tar")])
        assert result.exit_code == 2, what
        assert "is no whole backup" in result.output, what
    os.mkfifo(tmp_path / "pipe")
    result = runner.invoke(app, ["db", "restore", str(tmp_path / "pipe")])
    assert (result.exit_code, "is no file" in result.output) == (2, True)
    for size in (0, 100, 600, whole.stat().st_size // 2):
        (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:size])
        result = runner.invoke(app, ["db", "restore", str(tmp_path / "cut.tar")])
        assert (result.exit_code, len(result.output.splitlines())) == (2, 1), result.output
    assert schema.schema_revision(other) is None
    assert not paths.home().exists()


def test_only_an_empty_place_is_filled(engine, home, elsewhere, tmp_path):
    fill(engine, ["complete"], epochs=2, name="s")
    path = tmp_path / "b.tar"
    entry = studies.study_entry(engine, "s")
    picture = backup.RunFolder("s", entry.created).predictions(0)
    picture.parent.mkdir(parents=True)
    picture.touch()
    assert runner.invoke(app, ["db", "backup", str(path)]).exit_code == 0
    for words, expected in (
        (["restore", str(path)], "has 1 study; restore into a new one"),
        (["restore", str(tmp_path / "none.tar")], "No such file"),
        (["backup", str(path)], "overwrites nothing"),
        (["backup", str(tmp_path / "none" / "b.tar")], "no such folder"),
    ):
        result = runner.invoke(app, ["db", *words])
        assert result.exit_code == 2
        assert expected in result.output
    other = elsewhere()
    shutil.copytree(home / "runs", paths.home() / "runs")
    with pytest.raises(BackupError, match="exists; move it away"):
        backup.restore(other, path)
    assert studies.study_names(other) == []
    shutil.rmtree(paths.home() / "runs")
    backup.restore(other, path)  # what the attempt before has left is no hindrance
    assert studies.study_names(other) == ["s"]
    [copy] = paths.home().rglob("*.npz")
    assert {folder.stat().st_mode & 0o777 for folder in (copy.parent, copy.parents[1])} == {0o700}


def test_of_two_restores_at_once_one_is_refused(engine, home, elsewhere, tmp_path):
    fill(engine, ["complete"], epochs=2, name="s")
    backup.back_up(engine, tmp_path / "b.tar")
    other = elsewhere()

    def one(_):
        try:
            backup.restore(other, tmp_path / "b.tar")
        except BackupError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        [refused] = filter(None, pool.map(one, range(2)))
    assert "has 1 study" in refused or "another backup or restore" in refused
    assert studies.study_names(other) == ["s"]


def test_a_restore_waits_for_no_other(engine, elsewhere, tmp_path):
    """Both would fill the same folder."""
    fill(engine, ["complete"])
    backup.back_up(engine, tmp_path / "b.tar")
    other = elsewhere()
    with (
        backup.one_at_a_time(),
        pytest.raises(BackupError, match="another backup or restore is running"),
    ):
        backup.restore(other, tmp_path / "b.tar")


def test_a_deleted_study_is_restored_into_the_database_that_it_was_in(engine, home, tmp_path):
    fill(engine, ["complete"], epochs=2, name="s")  # its worker's row outlives it
    backup.back_up(engine, tmp_path / "b.tar")
    optuna.delete_study(study_name="s", storage=optuna_storage.optuna_storage(engine))
    backup.restore(engine, tmp_path / "b.tar")
    assert studies.study_names(engine) == ["s"]


@pytest.mark.parametrize("spoil", [lambda rows: rows + b"9\n", lambda rows: rows + rows, lambda _: b""])
def test_rows_that_postgresql_refuses_are_no_traceback(engine, home, elsewhere, tmp_path, spoil):
    fill(engine, ["complete"], epochs=2, name="s")
    backup.back_up(engine, tmp_path / "b.tar")
    *members, (manifest, text) = entries(tmp_path / "b.tar")
    number = next(i for i, (entry, _) in enumerate(members) if entry.name == "tables/trials")
    entry, rows = members[number]
    members[number] = (entry, spoil(rows))
    entry.size = len(spoil(rows))
    stated = json.loads(text)  # with the right digest
    digest = hashlib.sha256(spoil(rows)).hexdigest()
    stated["members"]["tables/trials"] = {"size": entry.size, "sha256": digest}
    text = json.dumps(stated).encode()
    manifest.size = len(text)
    write(tmp_path / "spoilt.tar", [*members, (manifest, text)])
    other = elsewhere()
    result = runner.invoke(app, ["db", "restore", str(tmp_path / "spoilt.tar")])
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1), result.output
    assert "nothing was kept" in result.output
    assert studies.study_names(other) == []
    assert not [*paths.home().rglob("*.npz")]


def test_a_backup_from_another_home_says_so(engine, home, tmp_path, caplog):
    fill(engine, ["complete"], epochs=2, name="s")
    backup.back_up(engine, tmp_path / "b.tar")
    assert "lacks the files of s" in caplog.text


def test_folders_that_come_and_go_do_not_end_a_backup(engine, home, tmp_path):
    """Workers make a trial's folder and remove it, while the backup looks for checkpoints."""
    ended = threading.Event()

    def come_and_go(number):
        folder = home / "runs" / "s-20261126-000000" / f"trial-{number:05d}"
        while not ended.is_set():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "attempt-0001.pt.sha256").touch()
            shutil.rmtree(folder)

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(come_and_go, number) for number in range(4)]
        try:
            for _ in range(300):
                with backup.hold_files() as hold_results:
                    hold_results()
        finally:
            ended.set()
        for worker in workers:
            worker.result()


def test_what_is_deleted_while_a_backup_is_written_is_in_it(engine, home, tmp_path, monkeypatch):
    fill(engine, ["complete", "complete"], epochs=2, name="s")
    runs = backup.RunFolder("s", studies.study_entry(engine, "s").created)
    runs.predictions(0).parent.mkdir(parents=True)
    runs.predictions(0).write_bytes(b"early")
    dump = backup.dump_tables

    def meanwhile(*arguments):
        found = dump(*arguments)
        runs.predictions(0).unlink()
        runs.predictions(1).write_bytes(b"late")
        with pytest.raises(BackupError, match="another backup"):
            backup.back_up(engine, tmp_path / "second.tar")
        return found

    monkeypatch.setattr(backup, "dump_tables", meanwhile)
    backup.back_up(engine, tmp_path / "b.tar")
    files = {entry.name: data for entry, data in entries(tmp_path / "b.tar")}
    assert {files[name] for name in files if name.endswith(".npz")} == {b"early", b"late"}
    assert not [*home.glob("backup/*")]

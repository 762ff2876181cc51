"""Back up a database with its files while workers run, and restore it.

The archive is a plain tar. It has each table as COPY writes it, so that any PostgreSQL reads it; then
checkpoints, predictions and pictures; and last `manifest.json` with the SHA-256 of each member.

Files are written once and never changed. So a hard link holds a file for the backup, even if the file
is deleted meanwhile. Checkpoints are held first; then all tables are read in one snapshot. So the tables
know every trial that has a checkpoint in the backup. Epochs after the checkpoint are trained again.

A restored database is a new incarnation: attempts that were open are lost, and workers from before the
restore get no more trials.
"""

import io
import logging
import os
import shutil
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import psycopg2
import sqlalchemy as sa
from filelock import FileLock, Timeout

from storage import paths, schema, url
from storage.archive import (
    FILE,
    FORMAT,
    MANIFEST,
    TABLES,
    BackupError,
    Manifest,
    Writer,
    open_member,
    read_backup,
)
from storage.clock import now
from storage.faults import is_transient
from storage.optuna_tables import (
    STUDY_NAMES,
    SYSTEM_ATTRIBUTES,
    TRIALS,
    TrialState,
)
from storage.outcome import RESTORED, Outcome
from storage.ownership import as_owner, private, require_own
from storage.paths import RunFolder, artifacts, files_in, make_private
from storage.tables import ATTEMPTS, STUDIES, WORKERS
from storage.words import counted

log = logging.getLogger(__name__)


def back_up(engine: sa.Engine, path: Path) -> Manifest:
    """Write an archive under a temporary name, check it, and then rename it.

    Raises BackupError, DatabaseError.
    """
    revision = schema.require_schema(engine)
    if path.exists():
        raise BackupError(f"{path} exists; a backup overwrites nothing: choose another name")
    if not path.absolute().parent.is_dir():
        raise BackupError(f"{path}: no such folder; make it first")
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        # The archive belongs to the calling user; temporary files in the home belong to its owner.
        with (
            private(),
            new.open("xb") as file,
            as_owner(paths.home()),
            one_at_a_time(),
            hold_files() as hold,
        ):
            with tarfile.open(fileobj=file, mode="w") as tar:
                writer = Writer(tar)
                columns, needed = dump_tables(engine, writer)
                hold()
                for held in (held for place in needed for held in _files(place)):
                    with held.open("rb") as content:
                        writer.add(f"files/{held.relative_to(_hold_folder())}", content)
                manifest = Manifest(
                    format=FORMAT,
                    created=datetime.now(UTC).isoformat(timespec="seconds"),
                    schema_revision=revision,
                    optuna=version("optuna"),
                    columns=columns,
                    members=writer.members,
                )
                writer.add(MANIFEST, io.BytesIO(manifest.model_dump_json(indent=1).encode()))
            file.flush()
            os.fsync(file.fileno())
        read_backup(new)
        new.rename(path)
    finally:
        new.unlink(missing_ok=True)
    return manifest


def restore(engine: sa.Engine, path: Path) -> Manifest:
    """Fill an empty database and the home folder from an archive, as a new incarnation.

    Raises BackupError, DatabaseError; then the database has no study still.
    """
    manifest = read_backup(path)
    require_own(paths.home())
    _refuse_unless_it_fits(engine, manifest)
    schema.upgrade(engine, manifest.schema_revision)
    with one_at_a_time():
        _fill(engine, path, manifest)
    schema.upgrade(engine)
    return manifest


def _fill(engine: sa.Engine, path: Path, manifest: Manifest) -> None:
    """Load the tables and move the files into place, in one transaction. Raises BackupError."""
    staging = paths.home() / ".restore"
    shutil.rmtree(staging, ignore_errors=True)  # the rest of a restore that was killed
    make_private(staging)
    try:
        with tarfile.open(path, mode="r:") as tar, engine.begin() as connection:
            connection.execute(sa.text(f"LOCK TABLE {STUDY_NAMES} IN EXCLUSIVE MODE"))
            _refuse_unless_empty(connection)  # another restore may have come first
            for name in manifest.members:
                if name.startswith("files/"):
                    target = staging / name
                    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    with target.open("xb") as file, open_member(tar, name) as source:
                        shutil.copyfileobj(source, file)
            connection.execute(sa.delete(WORKERS))  # they worked at studies that were deleted
            _load(connection, tar, manifest)
            _begin_incarnation(connection)
            _put_in_place(staging / "files")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _hold_folder() -> Path:
    return paths.home() / "backup"


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let only one process at a time back up or restore this home. Raises BackupError."""
    lock = FileLock(paths.home() / "backup.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BackupError("another backup or restore is running; wait for its end") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def hold_files() -> Iterator[Callable[[], None]]:
    """Hold all present files for a backup. The function that it yields adds the newer results.

    It adds no newer checkpoints: the tables may have been read before their trials began.
    """
    home, folder = paths.home(), _hold_folder()
    try:
        shutil.rmtree(folder, ignore_errors=True)  # the rest of a backup that was killed
        make_private(folder)

        def matching(*patterns: str) -> list[Path]:
            files = [*files_in(home / "runs"), *files_in(artifacts())]
            return [path for path in files if any(path.match(pattern) for pattern in patterns)]

        def hold(source: Path) -> None:
            target = folder / source.relative_to(home)
            # A leading dot marks a file that is still being written.
            if source.is_file() and not source.name.startswith(".") and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # it has just been deleted
                    _link(source, target)

        def hold_results() -> None:
            for path in matching("runs/*/predictions/*", "artifacts/*"):
                hold(path)

        for digest in matching("runs/*/trial-*/*.sha256"):
            hold(digest.with_suffix(""))
            hold(digest)
        for path in matching("runs/*/trial-*/*.npz"):  # those that the checkpoints name, and maybe newer
            hold(path)
        hold_results()
        yield hold_results
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def dump_tables(engine: sa.Engine, writer: Writer) -> tuple[dict[str, list[str]], list[Path]]:
    """Add all tables, read in one snapshot. Returns their columns, and the held paths they need."""
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        _prepare_copy(connection)
        columns = {}
        for table in TABLES:
            present = sa.inspect(connection).get_columns(table.name, schema=table.schema)
            names = columns[table.fullname] = [column["name"] for column in present]
            with tempfile.TemporaryFile(dir=_hold_folder()) as file:
                _copy(connection, table, names, "TO STDOUT", file)
                writer.add(f"tables/{table}", file)
        files = _needed_files(connection)
        return columns, [_hold_folder() / path.relative_to(paths.home()) for path in files]


def _files(held: Path) -> list[Path]:
    if held.is_dir():
        return sorted(held.iterdir())
    return [held] if held.exists() else []


def _needed_files(connection: sa.Connection) -> Iterator[Path]:
    """The files and folders that a search needs to go on, or a report: of the studies in the tables."""
    query = (
        sa.select(STUDY_NAMES.c.study_name, STUDIES.c.created, TRIALS.c.number, TRIALS.c.state)
        .join(STUDIES, STUDIES.c.study_id == STUDY_NAMES.c.study_id)
        .join(TRIALS, TRIALS.c.study_id == STUDY_NAMES.c.study_id)
    )
    elsewhere = set()
    for name, created, number, state in connection.execute(query):
        runs = RunFolder(name, created)
        if not runs.path.is_dir():
            elsewhere.add(name)
        if not state.is_finished():
            yield runs.checkpoints(number)
        elif state == TrialState.COMPLETE:
            yield runs.predictions(number)
    if elsewhere:
        log.warning(
            "the backup lacks the files of %s: no such folders in %s; is it the workers' ATELIER_HOME?",
            ", ".join(sorted(elsewhere)),
            paths.home() / "runs",
        )
    key = SYSTEM_ATTRIBUTES.c.key
    for picture in connection.scalars(sa.select(key).where(key.startswith("artifacts:"))):
        if FILE.fullmatch(f"files/artifacts/{picture.partition(':')[2]}"):
            yield artifacts() / picture.partition(":")[2]


def _prepare_copy(connection: sa.Connection) -> None:
    """Set no timeouts for COPY, and let every server write the same text, without rounding numbers."""
    for setting in (
        "statement_timeout = 0",
        "idle_in_transaction_session_timeout = 0",
        "client_encoding = 'UTF8'",
        "extra_float_digits = 1",
    ):
        connection.execute(sa.text(f"SET LOCAL {setting}"))


def _copy(
    connection: sa.Connection, table: sa.TableClause, names: list[str], way: str, file: IO[bytes]
) -> None:
    """Copy a table to a file, or from it. Raises BackupError, psycopg2.Error if the database is away."""
    columns = ", ".join(connection.dialect.identifier_preparer.quote_identifier(name) for name in names)
    cursor: Any = connection.connection.cursor()  # psycopg2's
    with cursor:
        try:
            cursor.copy_expert(f"COPY {table} ({columns}) {way}", file)
        except psycopg2.Error as error:
            if is_transient(error):
                raise
            raise BackupError(
                f"table {table}: {str(error).splitlines()[0]}; nothing was kept"
            ) from error


def _refuse_unless_it_fits(engine: sa.Engine, manifest: Manifest) -> None:
    """Raises BackupError or DatabaseError unless this database can take the backup."""
    if manifest.optuna != (here := version("optuna")):
        raise BackupError(
            f"the backup was made with Optuna {manifest.optuna}, this is {here}; install "
            f"{manifest.optuna}, restore, and then upgrade (optuna storage upgrade)"
        )
    if not schema.knows(manifest.schema_revision):
        raise BackupError(
            f"the backup has schema {manifest.schema_revision}, which this version of Atelier does not "
            "know; use the newer Atelier that made it"
        )
    revision = schema.schema_revision(engine)
    if revision is None:
        return
    with engine.connect() as connection:
        _refuse_unless_empty(connection)
    if revision != manifest.schema_revision:
        raise _occupied(engine, f"schema {revision}, not the backup's {manifest.schema_revision}")


def _refuse_unless_empty(connection: sa.Connection) -> None:
    """Raises BackupError if the database has studies."""
    if studies := connection.scalar(sa.select(sa.func.count()).select_from(STUDY_NAMES)):
        raise _occupied(connection.engine, counted(studies, "study"))


def _occupied(engine: sa.Engine, what: str) -> BackupError:
    return BackupError(
        f"the database {url.shown(engine.url)} has {what}; restore into a new one: set "
        "ATELIER_HOME or ATELIER_DATABASE_URL"
    )


def _load(connection: sa.Connection, tar: tarfile.TarFile, manifest: Manifest) -> None:
    """Fill the tables from the archive. Raises BackupError."""
    _prepare_copy(connection)
    for table in TABLES:
        if table.fullname not in manifest.columns:
            continue  # newer than the backup
        names = manifest.columns[table.fullname]
        if not set(names) <= set(table.columns.keys()):
            raise BackupError(f"the backup's table {table} has columns that Atelier does not know")
        with open_member(tar, f"tables/{table}") as file:
            _copy(connection, table, names, "FROM STDIN", file)
        _set_sequence(connection, table)


def _set_sequence(connection: sa.Connection, table: sa.TableClause) -> None:
    """Let the table's sequence, if it has one, go on after the rows that were loaded."""
    key = table.columns[0].name
    sequence = connection.exec_driver_sql(f"SELECT pg_get_serial_sequence('{table}', '{key}')").scalar()
    if sequence is not None:
        last = f"SELECT max({key}) AS id FROM {table}"
        connection.exec_driver_sql(f"SELECT setval('{sequence}', id) FROM ({last}) AS last WHERE id > 0")


def _begin_incarnation(connection: sa.Connection) -> None:
    """End the attempts and workers of before: they hold no trial now, and get no more."""
    connection.execute(
        sa.update(ATTEMPTS)
        .where(ATTEMPTS.c.released.is_(None))
        .values(released=ATTEMPTS.c.renewed, outcome=Outcome.LOST, reason=RESTORED)
    )
    connection.execute(
        sa.update(WORKERS).where(WORKERS.c.stopped.is_(None)).values(stopped=now(), reason=RESTORED)
    )


def _put_in_place(files: Path) -> None:
    """Move the restored run folders and pictures into the home. Raises BackupError."""
    home = paths.home()
    for folder in sorted(files.glob("runs/*")):
        target = home / folder.relative_to(files)
        if target.exists():
            raise BackupError(f"{target} exists; move it away, or restore with another ATELIER_HOME")
    for folder in sorted(files.glob("runs/*")):
        target = home / folder.relative_to(files)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # as RunFolder.make does
        folder.rename(target)
    for picture in sorted(files.glob("artifacts/*")):
        make_private(artifacts())
        picture.replace(artifacts() / picture.name)

"""Write and check a backup's archive: a tar of tables and files, and last a manifest of digests."""

import hashlib
import io
import os
import re
import tarfile
from pathlib import Path
from typing import IO

import pydantic

from storage.optuna_tables import OPTUNAS_TABLES, VERSION
from storage.tables import METADATA
from storage.words import counted

FORMAT = 1
MANIFEST = "manifest.json"
LONGEST_MANIFEST = 1 << 26  # bytes
# The name of a file in the archive: below the home folder, and no part of it begins with a dot.
FILE = re.compile(r"files/(runs|artifacts)(/[^./\0][^/\0]*)+")
# Parents first. Not Optuna's table of versions: each database writes its own.
TABLES = [table for table in (*OPTUNAS_TABLES, *METADATA.sorted_tables) if table is not VERSION]


class BackupError(ValueError):
    """A backup cannot be made or used; the message is one line."""


class Member(pydantic.BaseModel, extra="forbid", strict=True):
    """One file of the archive."""

    size: int
    sha256: str


class Manifest(pydantic.BaseModel, extra="forbid", strict=True):
    """The members of an archive, and the versions that made it."""

    format: int
    created: str
    schema_revision: str
    optuna: str
    columns: dict[str, list[str]]  # by table
    members: dict[str, Member]


class Writer:
    """Adds members to an archive, and lists them for the manifest."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.members: dict[str, Member] = {}

    def add(self, name: str, file: IO[bytes]) -> None:
        """Add a whole file under this name, as long as it is now."""
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = file.seek(0, os.SEEK_END), 0o600
        file.seek(0)
        source = _Hashing(file)
        self._tar.addfile(entry, source)
        self.members[name] = Member(size=entry.size, sha256=source.digest.hexdigest())


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        return data


def read_backup(path: Path) -> Manifest:
    """Check a whole archive against its manifest. Returns the manifest. Raises BackupError."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
        raise BackupError(f"{path} is no file; give a file that atelier db backup wrote")
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            return _check(tar, path.stat().st_size)
    except (tarfile.TarError, EOFError, UnicodeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise BackupError(
            f"{path} is no whole backup: {reason}; give a file that atelier db backup wrote"
        ) from error


def _check(tar: tarfile.TarFile, archive_bytes: int) -> Manifest:
    """The manifest, if it agrees with the members. Raises ValueError, TarError."""
    members = _contents(tar, archive_bytes)
    if MANIFEST not in members or members[MANIFEST].size > LONGEST_MANIFEST:
        raise ValueError(f"it has no {MANIFEST}")
    del members[MANIFEST]
    with open_member(tar, MANIFEST) as file:
        manifest = Manifest.model_validate_json(file.read())
    if manifest.format != FORMAT:
        raise ValueError(f"its format is {manifest.format}, this version of Atelier reads {FORMAT}")
    if unknown := manifest.columns.keys() - {table.fullname for table in TABLES}:
        raise ValueError(f"{min(unknown)!r} is no table of Atelier's")
    tables = {f"tables/{name}" for name in manifest.columns}
    if unknown := {name for name in members.keys() - tables if not FILE.fullmatch(name)}:
        raise ValueError(f"{min(unknown)!r} is no table and no file of a study")
    # A table that the manifest has columns of must be a member too.
    names = manifest.members.keys() | members.keys() | tables
    if wrong := {name for name in names if not _agree(manifest.members.get(name), members.get(name))}:
        raise ValueError(f"{counted(len(wrong), 'file')} differ from the manifest, first {min(wrong)!r}")
    return manifest


def _agree(stated: Member | None, present: Member | None) -> bool:
    return present is not None and present == stated


def _contents(tar: tarfile.TarFile, archive_bytes: int) -> dict[str, Member]:
    """All members by name, with the digests of their content. Raises ValueError, TarError."""
    members = {}
    for entry in tar:
        # We write no sparse files and no links. An entry may also claim more bytes than the archive has.
        is_whole = entry.offset_data + entry.size <= archive_bytes
        if entry.type != tarfile.REGTYPE or entry.issparse() or not is_whole:
            raise ValueError(f"{entry.name!r} is no whole file")
        if entry.name in members:
            raise ValueError(f"{entry.name!r} is there twice")
        with open_member(tar, entry) as file:
            digest = hashlib.file_digest(file, "sha256")
        members[entry.name] = Member(size=entry.size, sha256=digest.hexdigest())
    return members


def open_member(tar: tarfile.TarFile, entry: tarfile.TarInfo | str) -> io.BufferedReader:
    """Open a member for reading."""
    file = tar.extractfile(entry)
    assert isinstance(file, io.BufferedReader)  # `_contents` takes regular files only
    return file

"""What `atelier doctor` asks of the folders: ATELIER_HOME, which jobs share, and TMPDIR."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from search.doctor.check import Check, not_asked, note, ok, told, wrong
from storage.embedded import NoLocksError, lock_file
from storage.ownership import require_own
from storage.paths import home
from trainer.disk import file_system
from trainer.files import write_atomically

GB = 10**9
LEAST_FREE, LITTLE_FREE = 1 * GB, 10 * GB  # bytes
TRIED_BYTES = 1 << 20
QUOTA_SECONDS = 20
IN_MEMORY = ("tmpfs", "ramfs")
OTHERS_WRITE = 0o022
ELSEWHERE = "set ATELIER_HOME to another folder"


def home_folder() -> Iterator[Check]:
    """Whether the home can be used as searches use it: files, locks, syncs, room."""
    folder = home()
    require_own(folder)
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not place.is_dir():
        yield wrong("home", f"{place} is a file", ELSEWHERE)
        return
    mode = place.stat().st_mode & 0o777
    if place != folder:
        yield note("home", f"{folder} is not there yet; the first command that writes makes it")
    elif mode & OTHERS_WRITE:
        yield note("home", f"{folder}, where others may write (mode {mode:o})", f"chmod go-w {folder}")
    else:
        yield ok("home", f"{folder} (mode {mode:o})")
    yield _disk(place)
    yield _room("room", place, ELSEWHERE)
    try:
        trial = tempfile.TemporaryDirectory(dir=place, prefix=".doctor-")
    except OSError as error:
        yield wrong("write", f"cannot write to {place}: {error.strerror}", ELSEWHERE)
        return
    with trial as name:
        yield _write(Path(name))
        yield _lock(Path(name))


def _disk(place: Path) -> Check:
    """The kind of file system that a folder is on, as in ext4."""
    kind = file_system(place)
    if not kind:
        return not_asked("disk", f"no mount point above {place} is known")
    if kind in IN_MEMORY:
        remedy = f"{ELSEWHERE}, on a disk: at a restart of the machine, all would be gone"
        return wrong("disk", f"{place} is in main memory ({kind})", remedy)
    return ok("disk", kind)


def _room(name: str, place: Path, remedy: str) -> Check:
    disk = os.statvfs(place)
    free = disk.f_bavail * disk.f_frsize
    found = f"{free / GB:.1f} GB free in {place}"
    if disk.f_files and not disk.f_favail:
        return wrong(
            name, f"{found}, but no further file can be made", f"delete files there, or {remedy}"
        )
    if free < LEAST_FREE:
        return wrong(name, found, f"free some, or {remedy}")
    return (
        ok(name, found) if free >= LITTLE_FREE else note(name, found, "see what atelier db prune frees")
    )


def _write(folder: Path) -> Check:
    try:
        write_atomically(folder / "file", os.urandom(TRIED_BYTES))
    except OSError as error:
        found = f"a file of 1 MiB cannot be written and synced: {error.strerror}"
        return wrong("write", found, f"free some room, mend the file system, or {ELSEWHERE}")
    return ok("write", "a file was written, synced and renamed")


def _lock(folder: Path) -> Check:
    path = folder / "lock"
    try:
        with lock_file(path, fcntl.LOCK_EX):
            try:
                lock_file(path, fcntl.LOCK_EX | fcntl.LOCK_NB).close()
            except BlockingIOError:
                return ok("locks", "flock keeps a second one out")
    except NoLocksError as error:
        return told("locks", str(error).replace(str(folder), str(folder.parent)))
    return wrong("locks", "flock lets two processes have the same lock", ELSEWHERE)


def quota() -> Iterator[Check]:
    """What `quota` says of this user."""
    if shutil.which("quota") is None:
        yield not_asked("quota", "no command `quota` here")
        return
    try:
        answer = subprocess.run(
            ["quota", "-w"], capture_output=True, text=True, errors="replace", timeout=QUOTA_SECONDS
        )
    except subprocess.TimeoutExpired:
        yield not_asked("quota", f"quota did not answer in {QUOTA_SECONDS} s")
        return
    # device, blocks, quota, limit, grace, files, quota, limit; a star follows what is exceeded
    lines = [line.split() for line in answer.stdout.splitlines()]
    rows = [words for words in lines if words[1:] and words[1].rstrip("*").isdecimal()]
    exceeded = [words[0] for words in rows if any(word.endswith("*") for word in words)]
    if exceeded:
        yield wrong("quota", f"exceeded on {', '.join(exceeded)}", f"delete files, or {ELSEWHERE}")
    elif rows:
        yield ok("quota", f"kept on {', '.join(words[0] for words in rows)}")
    elif answer.returncode == 0:
        yield ok("quota", "none for this user")
    else:
        yield not_asked("quota", f"quota ended with {answer.returncode}: {answer.stderr.strip()}")


def temporary() -> Iterator[Check]:
    """The folder for temporary files."""
    yield _room("tmpdir", Path(tempfile.gettempdir()), "set TMPDIR to another folder")

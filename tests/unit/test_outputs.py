"""Where a command may write, and what it may replace."""

import os
import tempfile
import traceback
from pathlib import Path

import pytest

from dashboards.outputs import OutputError, check_folder, check_output, check_overwritable, mark
from trainer.files import new_file

NOBODY = 65534


@pytest.fixture
def closed():
    """A folder that only its owner may write to, and that others may read."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


def as_somebody_else(check):
    """Call a function in a process of another user, if this is root's. Returns whether it ended well."""
    if (child := os.fork()) == 0:
        try:
            if os.getuid() == 0:
                os.setuid(NOBODY)
            check()
        except BaseException:  # whatever it is: the child must not go on as a second pytest
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_what_may_not_be_written_is_said_before_any_work(closed):
    def check():
        for refuses in (
            lambda: check_output(closed / "new.csv"),
            lambda: check_folder(closed, mark("s"), "a report"),
            lambda: check_folder(closed / "new" / "deeper", mark("s"), "a report"),
        ):
            with pytest.raises(OutputError, match="nothing may be written there; choose another"):
                refuses()

    assert as_somebody_else(check)


def test_a_folder_that_may_be_listed_but_not_entered_is_refused(closed):
    closed.chmod(0o666)

    def check():
        with pytest.raises(OutputError, match="nothing may be written there"):
            check_folder(closed, mark("s"), "a report")

    assert as_somebody_else(check)


def test_a_folder_cannot_be_made_in_a_file(tmp_path):
    (file := tmp_path / "file").write_text("")
    for folder in (file, file / "sub", file / "sub" / "deeper"):
        with pytest.raises(OutputError, match="/file: is a file; give a folder"):
            check_folder(folder, mark("s"), "a report")


def test_hidden_files_do_not_close_a_folder(tmp_path):
    (tmp_path / "report.md").write_text(mark("s"))
    (tmp_path / ".DS_Store").write_bytes(b"of a desktop")
    if (child := os.fork()) == 0:
        with new_file(tmp_path / "report.md"):
            os._exit(1)  # as if it was killed
    os.waitpid(child, 0)
    assert len([*tmp_path.glob(".report.md.*")]) == 1
    check_folder(tmp_path, mark("s"), "a report")
    (tmp_path / "notes.md").write_text("by hand")
    with pytest.raises(OutputError, match=r"has notes\.md, which is not of a report; give another"):
        check_folder(tmp_path, mark("s"), "a report")


def test_a_file_is_replaced_only_by_the_same_study(tmp_path):
    file = tmp_path / "x.png"
    check_overwritable(file, mark("mine"), "a figure")
    file.write_text(f"picture {mark('mine')}")
    check_overwritable(file, mark("mine"), "a figure")
    with pytest.raises(OutputError, match="there is a file that is not a figure; give another name"):
        check_overwritable(file, mark("min"), "a figure")
    check_output(Path("/dev/null"))  # a device is written to, and replaced by nothing
    for path, said in ((tmp_path, "is a folder; give a file"), (file / "x", "no such folder")):
        with pytest.raises(OutputError, match=said):
            check_output(path)

"""Where a command may write, and what it may replace."""

import os
import tempfile
import traceback
from pathlib import Path

import pytest

from dashboards.outputs import OutputError, check_folder, check_output, check_overwritable, mark

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
        except BaseException:
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

"""The wheel, in an environment of its own: the command runs without the repository."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("study.max_trials=1", "train.epochs=3", "train.train_images=300")
DEMO = ("demo", "--workers", "1", *(word for setting in SMALL for word in ("--set", setting)))
INSTALL = ("install", "--quiet", "--no-deps", "--no-index", "--no-compile")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the working tree, built from a copy: a build leaves its own folders there."""
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(".*", "tests", "docs", "benchmarks", "__pycache__", "demo-data")
    shutil.copytree(ROOT, folder / "source", ignore=skipped)
    words = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder]
    pip(*words, folder / "source")
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A virtual environment with the wheel alone, which borrows the packages that it requires."""
    folder = tmp_path_factory.mktemp("installed") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip("--python", folder / "bin/python", *INSTALL, wheel)
    # A .pth file in that folder is not read, so the editable install there is not seen.
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    (folder / "installed").touch()  # for make
    return folder


def pip(*words):
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)


@pytest.fixture
def here(tmp_path):
    """An empty folder, of a user who has nothing of ours."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def run(environment, here):
    """Run a program of the environment in that folder."""

    def run(program, *words, before=(), folder=environment / "bin"):
        kept = {"PATH": os.environ["PATH"], "HOME": str(here.parent)}
        command = [*before, folder / program, *words]
        return subprocess.run(command, cwd=here, env=kept, capture_output=True, text=True)

    return run


@pytest.fixture
def atelier(run):
    return partial(run, "atelier")


def test_no_file_of_a_package_is_left_out(wheel):
    packages = ["search", "trainer", "storage", "dashboards", "studies"]
    written = {path for package in packages for path in (ROOT / package).rglob("*") if path.is_file()}
    ours = {str(path.relative_to(ROOT)) for path in written if path.suffix != ".pyc"}
    packed = {name for name in ZipFile(wheel).namelist() if ".dist-info" not in name}
    assert packed == ours | {"atelier.py", "atelier_command.py"}


def test_the_command_runs_from_the_wheel_alone(run, atelier, environment):
    assert f"Atelier {version('atelier')}\n" in atelier("--version").stdout
    found = run("python", "-c", "import search; print(search.__file__)").stdout
    assert found.startswith(str(environment))


def test_the_demo_ends_in_a_winner_and_says_what_to_type_next(atelier, here):
    searched = atelier(*DEMO)
    assert searched.returncode == 0, searched
    assert {path.name for path in here.iterdir()} == {".atelier", "best.toml", "demo-data"}
    said = searched.stderr
    for words in ("dashboard", "train best.toml", "predict best.run -o prediction.zip"):
        assert f": atelier {words}\n" in said
    again = atelier(*DEMO)  # what is there is neither drawn nor trained again
    assert again.returncode == 0, again
    assert "the pictures are" not in again.stderr


def test_a_ready_study_file_can_be_had_and_is_not_written_over(atelier, here):
    listed = atelier("example").stdout.splitlines()
    names = [line.split()[0] for line in listed]
    assert names == sorted(path.name for path in (ROOT / "studies").iterdir())
    assert atelier("example", "fashion.toml").returncode == 0
    written = (here / "fashion.toml").read_bytes()
    assert written == (ROOT / "studies/fashion.toml").read_bytes()
    (here / "fashion.toml").write_bytes(written := b"mine")
    again = atelier("example", "fashion.toml")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == "error: fashion.toml exists; remove it, or give another --output\n"
    assert (here / "fashion.toml").read_bytes() == written
    unknown = atelier("example", "demo")
    assert unknown.returncode == 2
    assert unknown.stderr.endswith("there are: demo.toml, fashion-cpu.toml, fashion.toml\n")


def test_a_torch_for_the_cpu_that_is_there_first_is_kept_and_no_cuda_is_wanted(wheel, tmp_path):
    """With the metadata alone, which is what pip decides by: no registry that tests reach has one."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    for known in Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
        if not known.name.startswith(("nvidia_c", "nvidia_n", "cuda_", "triton", "atelier")):
            shutil.copytree(known, packages / known.name)
    [torch] = packages.glob("torch-*.dist-info")
    install = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--no-index"]

    def would_install():
        asked = subprocess.run([*install, "--dry-run", wheel], capture_output=True, text=True)
        return [line for line in asked.stdout.splitlines() if line.startswith("Would install")]

    text = (torch / "METADATA").read_text()
    if "nvidia" in text:  # this torch is for CUDA, whose packages pip misses
        assert would_install() == []
    lines = [line for line in text.splitlines() if not re.search("cuda|nvidia|triton", line)]
    text = re.sub(r"(?m)^(Version: [\d.]+)$", r"\1+cpu", "\n".join(lines), count=1)
    (torch / "METADATA").write_text(text)
    torch.rename(torch.with_name(torch.name.replace(".dist-info", "+cpu.dist-info")))
    assert would_install() == [f"Would install atelier-{version('atelier')}"]


def test_what_is_packed_runs_elsewhere_without_a_network(wheel, environment, run, here, tmp_path):
    source, archive, place = wheel.parent / "source", tmp_path / "atelier.tar", tmp_path / "node's disk"
    make = ["make", "-C", source, "pack", f"VENV={environment}", f"PACK={archive}"]
    packed = subprocess.run(make, capture_output=True, text=True)
    assert packed.returncode == 0, packed
    place.mkdir()
    subprocess.run(["tar", "-C", place, "-xf", archive], check=True)
    moved = environment.rename(environment.with_name("gone"))
    try:
        unpacked = place / "atelier/bin"
        offline = ["unshare", "--net", *(["--map-root-user"] if os.geteuid() else [])]
        said = run("atelier", "--version", before=offline, folder=unpacked)
        assert f"Atelier {version('atelier')}\n" in said.stdout, said
        assert run("atelier", "example", "demo.toml", before=offline, folder=unpacked).returncode == 0
        assert (here / "demo.toml").exists()
        found = run("python", "-c", "import search; print(search.__file__)", folder=unpacked)
        assert found.stdout.startswith(str(place))
    finally:
        moved.rename(environment)

"""The rules of docs/design.md that a program can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "search": {"search", "trainer", "storage", "dashboards"},
    "dashboards": {"dashboards", "storage"},
    "storage": {"storage"},
    "trainer": {"trainer"},
}
FORBIDDEN = {
    "search": {"torch", "timm", "torchvision"},
    "dashboards": {"torch", "timm", "torchvision"},
    "storage": {"torch", "timm", "torchvision"},
    "trainer": {"optuna", "sqlalchemy"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        used = set(imports(path))
        assert used & MAY_IMPORT.keys() <= MAY_IMPORT[package], path
        assert not used & FORBIDDEN[package], path


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_text_file_has_its_encoding_from_us_and_not_from_the_locale(package):
    before = {"read_text": 0, "write_text": 1}  # arguments
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
            if name in before:
                named = any(one.arg == "encoding" for one in node.keywords)
                assert named or len(node.args) > before[name], f"{path}:{node.lineno}"


def test_commands_start_without_torch():
    code = (
        "import sys; from search.cli import VERBS, app\n"
        "for verb in VERBS:\n"
        "    try: app([verb, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "import search.study, search.slurm.submit, storage.status, search.export\n"
        "assert not {'torch', 'timm', 'torchvision'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)

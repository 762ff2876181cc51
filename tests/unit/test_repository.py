"""The rules for files and imports that CONTRIBUTING.md states and a program can check."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "search": {"search", "trainer", "storage", "dashboards"},
    "dashboards": {"dashboards", "storage", "trainer"},
    "storage": {"storage"},
    "trainer": {"trainer"},
}
FORBIDDEN = {
    "search": {"torch", "timm", "torchvision"},
    "dashboards": {"torch", "timm", "torchvision"},
    "storage": {"torch", "timm", "torchvision"},
    "trainer": {"optuna", "sqlalchemy"},
}
# These folders are the ends of what imports what: nobody below them knows them.
KNOWN_TO = {
    "search.cli": {"search.cli"},
    "search.doctor": {"search.doctor", "search.cli"},
    "search.verify": {"search.verify", "search.cli"},
    "dashboards.web": {"dashboards.web", "search.cli"},
}

MOST_LINES = 450  # of a file
MOST_LATE_IMPORTS = 16  # inside functions, in the whole project


def sources(*packages):
    """The files of the packages, with their syntax trees."""
    for package in packages or MAY_IMPORT:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def imports(tree):
    """The modules that a file imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def imported_at_once(tree):
    """What a file imports outside functions, also as `package.name`: that name may be a module's."""
    outside = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))])
    yield from imports(outside)
    for node in outside.body:
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_name(path):
    """The dotted name of a file's module; of `__init__.py` its package's."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def late_imports(tree):
    """The lines inside functions that import something."""
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.Lambda)):
            for node in ast.walk(function):
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if isinstance(node, (ast.Import, ast.ImportFrom)) or called.endswith("import_module"):
                    yield node.lineno


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    files = list(sources(package))
    assert files
    for path, tree in files:
        used = {module.split(".")[0] for module in imports(tree)}
        assert used & MAY_IMPORT.keys() <= MAY_IMPORT[package], path
        assert not used & FORBIDDEN[package], path


def test_only_the_layers_above_import_a_folder():
    for path, tree in sources():
        of = ".".join(path.relative_to(ROOT).parent.parts)
        for folder, importers in KNOWN_TO.items():
            known = [name for name in imports(tree) if f"{name}.".startswith(f"{folder}.")]
            assert not known or of in importers, f"{path} imports {known}"


def test_no_module_imports_itself_by_way_of_others():
    modules = {module_name(path): tree for path, tree in sources()}
    graph = {name: modules.keys() & {*imported_at_once(tree)} for name, tree in modules.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_layout_page_states_each_room_with_its_one_job():
    jobs = {
        str(path.relative_to(ROOT)): ast.get_docstring(tree).splitlines()[0]
        for path, tree in sources()
        if "migrations" not in path.parts and path.stem not in ("__init__", "__main__")
    }
    layout = (ROOT / "docs/design/layout.md").read_text()
    assert dict(re.findall(r"^\| `([\w/]+\.py)` \| (.+) \|$", layout, re.MULTILINE)) == jobs


def test_each_file_is_short_and_says_its_one_job_in_its_first_line():
    for path, _ in sources():
        if "versions" not in path.parts:  # a migration has its own form
            lines = path.read_text().splitlines() or [""]
            assert len(lines) <= MOST_LINES, path
            assert re.fullmatch(r'""".+[.:](""")?', lines[0]), path


def test_an_import_inside_a_function_has_its_reason():
    late = [(path, line) for path, tree in sources() for line in sorted(set(late_imports(tree)))]
    assert len(late) <= MOST_LATE_IMPORTS, late
    for path, line in late:
        assert "  # " in path.read_text().splitlines()[line - 1], f"{path}:{line}"


def test_no_module_takes_what_is_private_to_another():
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MAY_IMPORT:
                private = [alias.name for alias in node.names if re.match("_[a-z]", alias.name)]
                assert not private, f"{path}:{node.lineno}"


def test_optunas_tables_and_slurms_variables_have_one_owner():
    for path, tree in sources():
        names = set(imports(tree))
        assert "optuna.storages._rdb.models" not in names, path
        if path.parent == ROOT / "storage" and path.name != "optuna_storage.py":
            assert not [name for name in names if name.split(".")[0] == "optuna"], path
        if path.parent != ROOT / "search/slurm":
            texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
            assert not [text for text in texts if re.fullmatch("(SLURM|SBATCH)_[A-Z_]+", str(text))], (
                path
            )


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_text_file_has_its_encoding_from_us_and_not_from_the_locale(package):
    before = {"read_text": 0, "write_text": 1}  # arguments
    for path, tree in sources(package):
        for node in ast.walk(tree):
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


def test_who_trains_nothing_imports_neither_optuna_nor_an_orm():
    """Each takes as long as all the rest of a short command."""
    code = (
        "import sys; from search.cli import VERBS, load_verb\n"
        "trains = {'demo', 'search', 'worker', 'confirm'}\n"
        "for verb in VERBS.keys() - trains - {'dashboard'}: load_verb(verb)\n"
        "assert not {'optuna', 'sqlalchemy.orm', 'pandas', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

"""The documentation is easy to read, what it names exists, and GitHub's files are valid."""

import re
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
HABITS = sorted(ROOT.glob(".github/**/*.md"))  # their sentences are prompts, not prose
README_LINES = CONTRIBUTING_LINES = 100
MEDIAN, NINTH_DECILE = 15, 28  # words in a sentence, over all pages
CELL_WORDS = 20

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)]*)\)")
CODE = re.compile(r"`[^`]*`")
ITEM = re.compile(r"^ *(?:[-*]|\d+\.) ")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"”)]?\s+")
FOLDERS = "benchmarks|dashboards|docs|search|storage|studies|tests|trainer"
PATH = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*")
MAKE = re.compile(r"(?:`|^)make ([a-z][a-z-]*)", re.MULTILINE)
SECTION = re.compile(r"^#+ (.*)$", re.MULTILINE)


def prose(text):
    """The lines outside code blocks and comments."""
    return COMMENT.sub("", FENCE.sub("", text)).splitlines()


def is_table(line):
    return line.lstrip().startswith("|")


def blocks(text):
    """Paragraphs and list items, each as one text; without tables, headings and HTML."""
    block = []
    for line in [*prose(text), ""]:
        ends = not line.strip() or line.startswith(("#", "<", "---")) or is_table(line)
        if (ends or ITEM.match(line)) and block:
            yield " ".join(block)
            block = []
        if not ends:
            block.append(ITEM.sub("", line).strip())


def sentences(text):
    """What a reader reads in one go. A colon does not end a sentence, nor does a dot in code."""
    for block in blocks(text):
        plain = LINK.sub(r"\1", block)
        plain = CODE.sub(lambda code: re.sub(r"[.!?]", "", code[0]), plain)
        yield from filter(words, SENTENCE_END.split(plain))


def words(text):
    """How many words a text has: whatever has a letter or a digit in it."""
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def cells(text):
    for line in filter(is_table, prose(text)):
        row = CODE.sub(lambda code: code[0].replace(r"\|", ""), LINK.sub(r"\1", line))
        yield from row.strip().strip("|").split("|")


def anchor(heading):
    """The name by which a heading is linked to."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.fixture(scope="module")
def tracked():
    """Every file and folder of the repository, and those that wait to be added."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.split("\n") if listed.returncode == 0 else []
    paths = [Path(file) for file in files if file] or [p.relative_to(ROOT) for p in ROOT.rglob("*")]
    return {str(part) for path in paths for part in (path, *path.parents)}


def test_sentences_are_short():
    lengths = [words(sentence) for page in PAGES for sentence in sentences(page.read_text("utf-8"))]
    assert median(lengths) <= MEDIAN
    assert quantiles(lengths, n=10, method="inclusive")[-1] <= NINTH_DECILE


def test_no_sentence_is_missed_and_none_is_cut():
    text = (
        "# A heading of five words\n\nOne `a.b` two. Three\nfour [five](six.md)!\n\n- Six: seven\n"
        "  eight\n- Nine?\n\n```sh\nnot this. Nor this\n```\n| nor | this |\n<b>nor this</b>\n"
    )
    assert [words(sentence) for sentence in sentences(text)] == [3, 3, 3, 1]
    assert [*cells("| a | `b` c |\n")] == [" a ", " `b` c "]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_table_cells_are_short(page):
    assert not [cell for cell in cells(page.read_text("utf-8")) if words(cell) > CELL_WORDS]


@pytest.mark.parametrize(
    ("page", "most"), [("README.md", README_LINES), ("CONTRIBUTING.md", CONTRIBUTING_LINES)]
)
def test_the_first_pages_are_short(page, most):
    assert len((ROOT / page).read_text("utf-8").splitlines()) <= most


@pytest.mark.parametrize("page", [*PAGES, *HABITS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for _, target in LINK.findall("\n".join(prose(page.read_text("utf-8")))):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, section = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if section:
            headings = SECTION.findall(FENCE.sub("", linked.read_text("utf-8")))
            assert section in map(anchor, headings), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_of_the_repository_exist(page, tracked):
    for path in PATH.findall(page.read_text("utf-8")):
        assert path.rstrip("/.") in tracked, path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_targets_of_make_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(MAKE.findall(page.read_text("utf-8"))) <= targets


def test_pre_commit_runs_what_make_check_runs():
    rule = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    checked = [line.strip().replace("$(BIN)", ".venv/bin") for line in rule[1].splitlines()]
    [local] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == checked


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("github-workflows", "workflows/*.yml"),
        ("github-issue-forms", "ISSUE_TEMPLATE/[!c]*.yml"),
        ("github-issue-config", "ISSUE_TEMPLATE/config.yml"),
    ],
)
def test_github_understands_its_files(schema, pattern):
    files = [*(ROOT / ".github").glob(pattern)]
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout

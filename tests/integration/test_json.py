"""What --json prints is what docs/json.md says. `confirm` and `replay` are in test_confirm.py."""

import re

import pytest
from typer.testing import CliRunner

from search.cli import VERBS, app, load_verb
from tests.json_page import OF_VERBS, assert_documented
from tests.studies import fill

ELSEWHERE = {"confirm STUDY", "replay STUDY --trial N"}  # real trials, in test_confirm.py


@pytest.mark.parametrize("verb", [verb for verb in OF_VERBS if verb not in ELSEWHERE])
def test_what_is_printed_is_what_the_page_says(atelier, engine, accounts, demo, tmp_path, verb):
    fill(engine, ["complete", "running", "failed"], name="seen")
    places = {"STUDY.toml": "study.toml", "STUDY": "seen", "FOLDER": demo}
    words = [places.get(word, word) for word in verb.split()]
    if verb.startswith("data check"):  # so that there is a finding
        listed = (demo / "split" / "train.txt").read_text().splitlines()
        words[-1] = tmp_path / "copy"
        words[-1].mkdir()
        for child in demo.iterdir():
            (words[-1] / child.name).symlink_to(child)
        (words[-1] / "split").unlink()
        (words[-1] / "split").mkdir()
        for child in (demo / "split").iterdir():
            (words[-1] / "split" / child.name).write_bytes(child.read_bytes())
        (words[-1] / "split" / "train.txt").write_text("\n".join(listed[:1] * 2 + listed[2:]) + "\n")
    # What a verb finds here, such as a home in main memory, is not what this is about.
    printed = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    assert_documented(verb, printed.stdout)


def with_json():
    """Every verb that has the option, without its arguments."""
    for name in VERBS:
        command = load_verb(name)
        for words, one in [(name, command)] + [
            (f"{name} {sub}", one) for sub, one in getattr(command, "commands", {}).items()
        ]:
            if any("--json" in parameter.opts for parameter in one.params):
                yield words


def test_the_page_has_every_verb_with_the_option():
    assert {re.sub(" [A-Z-].*", "", verb) for verb in OF_VERBS} == {*with_json()}

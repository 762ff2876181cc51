"""What docs/json.md says that `--json` prints."""

import json
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "json.md"
BLOCK = PAGE.read_text().split("```")[1].replace("\n        ", " ")
OF_VERBS, OF_ITEMS = {}, {}  # keys by verb; by verb, names of lists and the keys of their items
for line in BLOCK.strip().splitlines():
    if not line.startswith(" "):
        verb = line.removeprefix("atelier ")
        OF_VERBS[verb], OF_ITEMS[verb] = set(), ([], set())
    elif ":" in line:
        OF_ITEMS[verb] = tuple(re.findall(r"\w+", part) for part in line.split(":"))
    else:
        OF_VERBS[verb] |= {*re.findall(r"\w+", line)}


def assert_documented(verb, text):
    """Check what a verb has printed. Returns it."""
    assert "NaN" not in text
    printed = json.loads(text)
    assert printed["version"] == 1
    assert printed.keys() == {"version", *OF_VERBS[verb]}
    lists, keys = OF_ITEMS[verb]
    for name in lists:
        items = printed[name] if isinstance(printed[name], list) else [printed[name]]
        assert items, f"there is no item of {name}, so this shows nothing"
        assert all(item.keys() == {*keys} for item in items)
    return printed

"""What docs/json.md says that `--json` prints."""

import json
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "json.md"
ROWS = [
    [re.findall("`(.*?)`", cell) for cell in line.split("|")[1:3]]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| `")
]
OF_VERBS = {names[0]: keys for names, keys in ROWS if len(names) == 1}
OF_ITEMS = {names[0]: (names[1:], keys) for names, keys in ROWS if len(names) > 1}


def assert_documented(verb, text):
    """Check what a verb has printed. Returns it."""
    assert "NaN" not in text
    printed = json.loads(text)
    assert printed["version"] == 1
    assert printed.keys() == {"version", *OF_VERBS[verb]}
    lists, keys = OF_ITEMS.get(verb.partition(" STUDY")[0].partition(" FOLDER")[0], ([], []))
    for name in lists:
        items = printed[name] if isinstance(printed[name], list) else [printed[name]]
        assert items, f"there is no item of {name}, so this shows nothing"
        assert all(item.keys() == {*keys} for item in items)
    return printed

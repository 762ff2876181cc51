"""Types of values in any file that a user writes, and the words for a wrong one."""

import datetime
import difflib
import json
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)
from pydantic_core import ErrorDetails

LONGEST_SHOWN = 80  # characters of a wrong value that a message repeats


class Table(BaseModel):
    """A table of a file that a user writes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def word(value: object) -> object:
    """Take a whole number as a name: some of SLURM's names look like numbers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _listed(value: object) -> object:
    """Take a text as the list of its lines."""
    return [line for line in value.splitlines() if line.strip()] if isinstance(value, str) else value


Word = Annotated[str, Field(min_length=1), BeforeValidator(word)]
Texts = Annotated[list[str], BeforeValidator(_listed)]


def as_typed(value: object) -> str:
    """A value as it may stand in a study file, shortened."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, float):
        return repr(value)
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


# What is allowed, by pydantic's type of the error. Pydantic fills in the braces.
ALLOWED = {
    "string_type": "a text in quotes",
    "string_too_short": "a text of {min_length} or more characters",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of 64 bits",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "too_short": "a list of {min_length} or more",
    "list_type": "a list, in [ ]",
    "dict_type": "a table",
    "model_type": "a table",
    "literal_error": "{expected}",
}


def in_our_words(problem: ErrorDetails) -> str:
    """What the file says, and what is allowed instead."""
    kind, value, limits = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "missing":
        return "missing, and needed"
    if kind == "value_error":
        return str(limits["error"])  # from a validator of ours
    if kind in ALLOWED:
        allowed = ALLOWED[kind].format(**limits)
    else:
        allowed = problem["msg"].removeprefix("Input should be ")
    message = f"found {as_typed(value)}; allowed is {allowed}"
    if kind == "literal_error":
        return message + near(str(value), re.findall(r"'(.*?)'", limits["expected"]))
    if kind == "string_type" and not isinstance(value, (bool, dict, list)):
        return f'{message}: write "{as_typed(value)}"'
    return message


def near(name: str, allowed: Iterable[str]) -> str:
    """A hint at the allowed name that was probably meant. Empty if none is similar."""
    matches = difflib.get_close_matches(name, list(allowed), 1)
    return f"; did you mean {matches[0]}?" if matches else ""


def unknown_key(name: str, allowed: Any) -> str:
    """The message about a key that does not exist."""
    return f"unknown key {name!r}{near(name, allowed)} (allowed: {', '.join(allowed)})"

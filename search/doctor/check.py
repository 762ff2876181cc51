"""One check of `atelier doctor`: its states, and what becomes of an error that it meets."""

import enum
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from dashboards.terminal import printable
from search.error_lines import one_line

# Passwords in URLs and in libpq's parameters. No text has one: this is for texts of other programs.
_SECRET = re.compile(r"(://[^:/@\s]*:)\S+(?=@)|(\bpass\w*\s*=\s*)('[^']*'|[^&\s]+)", re.IGNORECASE)


class State(enum.StrEnum):
    """What a check has come to."""

    OK = "ok"
    NOTE = "note"  # it works, but there is something to know
    WRONG = "wrong"
    NOT_ASKED = "not asked"  # nobody knows: this is never taken for ok


@dataclass(frozen=True)
class Check:
    """What was found in one place, and what to do next."""

    name: str
    state: State
    found: str
    next: str | None = None
    seconds: float | None = None  # of `clock`: by how much this machine's is ahead of the database's
    where: str = field(default_factory=socket.gethostname)


def ok(name: str, found: str) -> Check:
    return Check(name, State.OK, found)


def note(name: str, found: str, remedy: str | None = None) -> Check:
    return Check(name, State.NOTE, found, remedy)


def wrong(name: str, found: str, remedy: str) -> Check:
    return Check(name, State.WRONG, found, remedy)


def not_asked(name: str, why: str, remedy: str | None = None) -> Check:
    return Check(name, State.NOT_ASKED, why, remedy)


def told(name: str, sentence: str, state: State = State.WRONG) -> Check:
    """A check from an error's line, in which a semicolon separates what was found from the remedy."""
    found, _, remedy = sentence.partition("; ")
    return Check(name, state, found, remedy or "mend that, then ask again")


def ask(name: str, question: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The answers to a question. What it raises is the last one, so that it ends no other question."""
    try:
        for check in question():
            yield _clean(check)
    except Exception as error:  # every kind: a doctor is asked where things are broken
        yield _clean(_of_error(name, error))


def _of_error(name: str, error: Exception) -> Check:
    line = one_line(error)
    if line is not None:
        return told(name, line)
    what = f"{type(error).__name__}: {error}"
    return not_asked(name, f"this check itself failed: {what}", "report this line as an issue")


def _clean(check: Check) -> Check:
    return replace(check, found=_safe(check.found), next=_safe(check.next) if check.next else None)


def _safe(text: str) -> str:
    """The text in one line, without passwords."""
    return printable(_SECRET.sub(lambda found: f"{found[1] or found[2]}***", text))

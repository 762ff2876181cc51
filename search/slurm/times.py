"""Lengths of time in the forms of SLURM, and as people write them."""

import re

TIME = re.compile(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", re.ASCII)
TIME_IN_WORDS = re.compile(
    r"((\d{1,9}) *d(?:ays?)?)? *((\d{1,9}) *h(?:(?:ou)?rs?)?)? *"
    r"((\d{1,9}) *m(?:in(?:ute)?s?)?)? *((\d{1,9}) *s(?:ec(?:ond)?s?)?)?",
    re.ASCII | re.IGNORECASE,
)
NO_LIMIT = ("UNLIMITED", "INFINITE")


def slurm_seconds(time: str) -> int | None:
    """A time limit in seconds, from M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. None for other texts."""
    match = TIME.fullmatch(time)
    if match is None:
        return None
    days, *parts = (None if group is None else int(group) for group in match.groups())
    numbers = [part for part in parts if part is not None]
    if days is None and len(numbers) < 3:
        numbers = [0, *numbers]  # minutes come first
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return ((days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds


def seconds_in_words(value: object) -> int | None:
    """A time as people write it, as in "8h" or "1 day 30 min", in seconds. SLURM reads none of these."""
    match = TIME_IN_WORDS.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or not match[0]:
        return None
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups()[1::2])
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def clock(seconds: int) -> str:
    """A time in SLURM's form."""
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"

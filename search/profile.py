"""The [slurm.*] tables of a study file: what to ask SLURM for, in the forms that SLURM accepts."""

import datetime
import re
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator, model_validator

from search.slurm.times import NO_LIMIT, clock, seconds_in_words, slurm_seconds
from search.typed import Table, Texts, Word, as_typed, word
from trainer.config import Whole

EITHER_CASE = re.ASCII | re.IGNORECASE
GPUS = re.compile(r"(?P<all>\d{1,9})|[\w.-]*[a-z_][\w.-]*(:(?P<some>\d{1,9}))?", EITHER_CASE)
MEMORY = re.compile(r"\d{1,18}([KMGT]B?)?", EITHER_CASE)
MEMORY_IN_WORDS = re.compile(r"(\d+) *([KMGT])i?B?", EITHER_CASE)
DEFAULT_MEMORY = "12G"


class SlurmProfile(Table):
    """One [slurm.NAME] table. A number needs no quotes."""

    qos: Word | None = None
    partition: Word | None = None
    account: Word | None = None
    cpus: Whole = Field(1, ge=1)
    gpus: int | str = 1  # a text names a type: "a100:1"
    memory: str = DEFAULT_MEMORY  # a bare number is MiB
    time: str = "08:00:00"  # a bare number is minutes
    warning: Whole = Field(300, ge=0)  # seconds before the end at which SLURM warns the workers
    setup: Texts = Field([])  # shell lines before the worker starts: module load, activation
    options: Texts = Field([])  # further options of sbatch, as in "--constraint=a100"

    @field_validator("gpus", mode="before")
    @classmethod
    def _gpus(cls, value: object) -> int | str:
        text = word(value)
        match = GPUS.fullmatch(text.removeprefix("gpu:")) if isinstance(text, str) else None
        if match is None:
            raise ValueError(
                f"found {as_typed(value)}; allowed is a whole number, or one with a type of GPU, as in "
                '"a100:1"'
            )
        count = int(match["all"] or match["some"] or 1)
        return count if match["all"] or not count else match[0]

    @field_validator("memory", mode="before")
    @classmethod
    def _memory(cls, value: object) -> str:
        text = word(value)
        if isinstance(text, str) and MEMORY.fullmatch(text):
            return text
        near = MEMORY_IN_WORDS.fullmatch(text.strip()) if isinstance(text, str) else None
        advice = f'write "{near[1]}{near[2].upper()}"' if near else 'as in 4096 or "12G"'
        raise ValueError(
            f"found {as_typed(value)}; allowed is a number of MiB, or one with K, M, G or T: {advice}"
        )

    @field_validator("time", mode="before")
    @classmethod
    def _time(cls, value: object) -> str:
        if isinstance(value, datetime.time) and not value.microsecond:
            return value.isoformat()  # TOML's
        text = word(value)
        if isinstance(text, str) and (slurm_seconds(text) is not None or text.upper() in NO_LIMIT):
            return text
        seconds = seconds_in_words(value)
        advice = 'as in 480 or "08:00:00"' if seconds is None else f'write "{clock(seconds)}"'
        raise ValueError(
            f"found {as_typed(value)}; allowed are minutes, hours:minutes:seconds or "
            f"days-hours:minutes:seconds: {advice}"
        )

    @field_validator("warning", mode="before")
    @classmethod
    def _warning(cls, value: object) -> object:
        in_slurms_form = isinstance(value, str) and ":" in value
        seconds = slurm_seconds(str(value)) if in_slurms_form else seconds_in_words(value)
        if seconds is not None:
            raise ValueError(f"found {as_typed(value)}; allowed is a number of seconds: write {seconds}")
        return value

    @field_validator("options")
    @classmethod
    def _with_dashes(cls, options: list[str]) -> list[str]:
        for option in options:
            if not option.startswith("-"):
                raise ValueError(
                    f"found {as_typed(option)}; allowed are options of sbatch with their dashes, as in "
                    '"--constraint=a100"'
                )
        return options

    @field_validator("*")
    @classmethod
    def _one_line_each(cls, value: object) -> object:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isprintable():
                raise ValueError(f"{text!r} has unprintable characters; one line each")
        return value

    @model_validator(mode="after")
    def _warned_in_time(self) -> "SlurmProfile":
        seconds = slurm_seconds(self.time)
        if seconds and self.warning >= seconds:  # a time of 0 means no limit
            raise ValueError(
                f"warning = {self.warning} s leaves nothing of time = {self.time!r}; give a shorter one"
            )
        return self


def _each_with_a_name(profiles: object) -> object:
    for key, value in profiles.items() if isinstance(profiles, dict) else ():
        if key in SlurmProfile.model_fields and not isinstance(value, dict):
            raise ValueError(
                f"found {key} in [slurm] itself; write it into [slurm.tuning], or another name"
            )
    return profiles


Profiles = Annotated[dict[str, SlurmProfile], BeforeValidator(_each_with_a_name)]

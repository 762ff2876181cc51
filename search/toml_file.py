"""Read a study file: its TOML, the overrides of --set, and where in the file an error is."""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ValidationError,
)

from search.errors import InputError
from search.profile import SlurmProfile
from search.study_config import Range, StudyConfig
from search.typed import in_our_words, unknown_key
from trainer.config import TrainConfig
from trainer.text import TextError, read_text

Model = TypeVar("Model", bound=BaseModel)

READY = Path(__file__).parents[1] / "studies"  # of the clone, or beside the installed packages
# Values are printed, compared and handed on. TOML promises integers of 64 bits. Python cannot print one
# of 5,000 digits, nor a table inside 1,000 others.
LARGEST_INTEGER, DEEPEST = 2**63 - 1, 20


def load_study_file(path: Path, overrides: list[str] | None = None) -> StudyConfig:
    """Read a study file; `overrides` are `table.key=value`. Raises InputError."""
    tables = read_toml(path)
    if "train" in tables and not {"study", "space"} & tables.keys():
        raise InputError(f"{path} is the configuration of one run; train it with: atelier train {path}")
    for override in overrides or []:
        _override(tables, override)
    file = validate(StudyConfig, tables, path)
    if file.train.get("train_on", "train") != "train":
        raise InputError(
            f"{path}: train.train_on = {file.train['train_on']!r}: a search needs the validation split; "
            "allowed is 'train'; give --train-on to: atelier train"
        )
    if "folds" in file.train:
        raise InputError(f"{path}: train.folds: only a confirmation has folds; leave it out")
    for params in file.corners():
        validate(TrainConfig, {**file.train, **params}, path, "train", dict.fromkeys(params, "space"))
    file.check_rungs()
    file.check_first()
    return file


def read_toml(path: Path) -> dict[str, Any]:
    """Raises InputError."""
    try:
        return _parse(read_text(path), str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; ready ones are listed by: atelier example") from None
    except TextError as error:
        raise InputError(str(error)) from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML: {error}; mend that: a text has straight quotes") from None


def _parse(text: str, place: str) -> dict[str, Any]:
    """Raises TOMLDecodeError, and InputError for TOML beyond the limits above."""
    large = InputError(f"{place}: an integer is too large; allowed are 64 bits")
    deep = InputError(f"{place}: tables or lists are nested too deeply; allowed are {DEEPEST} levels")
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:
        raise large from None
    except RecursionError:
        raise deep from None
    level: list[Any] = [tables]
    for _ in range(DEEPEST):
        if any(isinstance(value, int) and abs(value) > LARGEST_INTEGER for value in level):
            raise large
        level = [inner for value in level for inner in _parts(value)]
    if level:
        raise deep
    return tables


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _override(tables: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    *parents, name = path.strip().split(".")
    if not equals or not parents:
        raise InputError(f"--set {text!r}: expected table.key=value, as in train.epochs=10")
    try:
        parsed = _parse(f"value = {value}", f"--set {path.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare string
    table: Any = tables
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {text!r}: {parent} = {table!r} is not a table")
    table[name] = parsed


def validate(
    model: type[Model],
    values: dict[str, Any],
    path: Path | str,
    table: str = "",
    tables: Mapping[str, str] | None = None,
) -> Model:
    """Build a model from a file's values.

    They stand in `table`. For some keys `tables` names another. Raises InputError with one problem, in
    one line. A key that does not exist comes before all others.
    """
    try:
        return model(**values)
    except ValidationError as error:
        problem = min(error.errors(), key=lambda error: error["type"] != "extra_forbidden")
        key = str(problem["loc"][0]) if problem["loc"] else ""
        where = [name for name in [(tables or {}).get(key, table)] if name]
        location = ".".join(where + [str(p) for p in _without_branches(problem["loc"])])
        if problem["type"] == "extra_forbidden":
            name = str(problem["loc"][-1])
            message = unknown_key(name, _keys_at(model, problem["loc"][:-1]))
        else:
            message = in_our_words(problem)
        place = f"{path}: {location}" if location else str(path)
        raise InputError(f"{place}: {message}".replace("\n", " ")) from error


def _without_branches(location: tuple[int | str, ...]) -> Iterator[int | str]:
    """A location without what pydantic adds: which type of several it tried."""
    for depth, part in enumerate(location):
        tried = isinstance(part, str) and (part.startswith(("list[", "function-")) or part == "Range")
        if not tried and not (part in ("float", "int") and depth == len(location) - 1):
            yield part


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            return list(Range.model_fields) if "space" in location else list(SlurmProfile.model_fields)
        model = field.annotation
    return list(model.model_fields)

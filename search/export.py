"""The winner as a file that `atelier train` runs unchanged."""

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import tomli_w

from dashboards.status import Status, TrialRow
from search.study import InputError
from storage.ledger import StudyEntry, curve
from trainer.config import TrainConfig

PACKAGES = ("atelier", "torch", "torchvision", "timm", "optuna", "numpy", "pillow")


def pick(status: Status, number: int | None) -> TrialRow:
    """The trial to export: the best one, or the given one. Raises InputError."""
    if number is None:
        if status.best is None:
            raise InputError(
                f"study {status.study!r} has no complete trial yet; see: atelier status {status.study}"
            )
        return status.best
    for row in status.trials:
        if row.number == number:
            return row
    raise InputError(
        f"study {status.study!r} has no trial {number}; it has {len(status.trials)}, from 0"
    )


def export_trial(
    engine: sa.Engine,
    entry: StudyEntry,
    row: TrialRow,
    output: Path,
) -> None:
    """Write a trial's configuration.

    Raises InputError if it has not all its parameters yet, OSError if the file cannot be written.
    """
    missing = entry.settings["space"].keys() - row.params.keys()
    if missing:
        raise InputError(
            f"trial {row.number} has no {', '.join(sorted(missing))} yet; choose another with --trial"
        )
    config = TrainConfig(**entry.settings["train"] | entry.settings["places"] | row.params)
    text = bundle(config, entry, row, curve(engine, entry.study_id, row.number))
    output.write_text(text, encoding="utf-8")


def bundle(config: TrainConfig, entry: StudyEntry, row: TrialRow, curve: list[float]) -> str:
    """TOML text: [train] holds every resolved setting, [origin] says where they come from."""
    origin: dict[str, Any] = {
        "study": entry.name,
        "trial": row.number,
        "state": row.state,
        "score": row.value,
        "curve": curve,
        "seed": config.seed,
        "dataset": entry.dataset,
        "git_commit": git_commit(),
        "exported": datetime.now(UTC).replace(microsecond=0),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    return tomli_w.dumps({"train": _present(config.model_dump()), "origin": _present(origin)})


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}  # TOML has no null


def git_commit() -> str | None:
    """The commit of this program's source, if it is a checkout; "-dirty" if it was changed."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None

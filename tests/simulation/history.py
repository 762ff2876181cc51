"""What happened in a simulation, line by line, with Optuna's ids renumbered."""

import datetime
import hashlib
import re
from typing import Any

ID = re.compile(r".*_id(_\d+)?$")


class History:
    """Lines of (worker, boundary, statement, values, rows). `digest` is the same for the same lines."""

    def __init__(self, keep: bool = False) -> None:
        self.lines: list[str] | None = [] if keep else None
        self._hash = hashlib.sha256()
        self._ids: dict[tuple[str, Any], int] = {}

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def add(self, *parts: object) -> None:
        """A line."""
        line = "\t".join(map(str, parts))
        self._hash.update(line.encode())
        if self.lines is not None:
            self.lines.append(line)

    def add_statement(
        self, actor: Any, statement: str, parameters: Any, cursor: Any, error: Exception | None
    ) -> None:
        """A statement with its values, and its rows or its error."""
        if error is not None:
            outcome: object = f"{type(error).__name__} {getattr(error, 'pgcode', None)}"
        elif cursor is not None and cursor.description:
            names = [column.name for column in cursor.description]
            outcome = [
                [self._normal(name, value) for name, value in zip(names, row, strict=True)]
                for row in cursor.fetchall()
            ]
            if cursor.rowcount:
                cursor.scroll(0, "absolute")
        else:
            outcome = None if cursor is None else cursor.rowcount
        text = " ".join(statement.split())
        self.add(actor.process.name, actor.name, text, self._values(parameters), outcome)

    def _values(self, parameters: Any) -> Any:
        if isinstance(parameters, dict):
            return {name: self._normal(name, value) for name, value in parameters.items()}
        return parameters

    def _normal(self, name: str, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool) and ID.match(name):
            kind = re.sub(r"_\d+$", "", name)
            return "#", self._ids.setdefault((kind, value), len(self._ids))
        if isinstance(value, datetime.datetime) and value.tzinfo is None:
            return "time"  # Optuna's own clock
        return value

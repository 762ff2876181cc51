"""Weak spots to plant: each is a few words changed in today's source, and the simulation must find it.

Some are faults that the project once had. A plant whose words are no longer in the source fails loudly.
"""

import importlib
import inspect
import sys
import textwrap
from typing import Any

import sqlalchemy as sa

from storage import recording

Edit = tuple[str, str, str]  # a function's path, words that stand in it once, other words

PLANTS: dict[str, list[Edit]] = {
    "claim-without-study-lock": [
        ("storage.ledger.Ledger.claim", "self.study_id, with_for_update=True)", "self.study_id)")
    ],
    "fence-without-lock": [
        ("storage.ledger.Ledger._fence", ".where(self._is_open(claim)).with_for_update()", ""),
        ("storage.ledger.Ledger.finish", "claim.attempt), with_for_update=True)", "claim.attempt))"),
    ],
    "finish-without-fence": [
        (
            "storage.ledger.Ledger.finish",
            "attempt = self._fence(session, claim)",
            "assert attempt is not None",
        )
    ],
    "digest-not-checked": [
        (
            "trainer.checkpoint.Checkpoints.newest_first",
            "if expected == [hashlib.sha256(data).hexdigest().encode()]:",
            "if expected:",
        )
    ],
    "lease-by-the-workers-clock": [
        (
            "storage.attempts.lock_open_attempt",
            "Attempt.lease_until > now()",
            'Attempt.lease_until > sa.func.to_timestamp(__import__("time").time())',
        )
    ],
    "snapshot-after-clear": [
        ("search.trial.Trial.__init__", "worker.ledger.renew(claim)", "None"),
        ("trainer.checkpoint.Checkpoints.withdraw", "if self._last_saved is not None:", "if False:"),
        ("search.worker.Worker._sweep", "remove(path for", "list(path for"),
    ],
    "lost-connection-is-final": [("storage.faults._is_away", "error.connection_invalidated", "False")],
    "record-not-repeatable": [("storage.recording.RECORD", "ON CONFLICT DO NOTHING", "")],
    "finish-not-repeatable": [
        (
            "storage.ledger.Ledger.finish",
            "return  # an earlier call did it, and its reply was lost",
            "pass",
        )
    ],
    "record-without-fence": [
        ("storage.recording.RECORD", "AND worker_id = :worker_id AND released IS NULL", "")
    ],
    "trial-added-by-optuna": [
        (
            "storage.ledger.Ledger._new_trials",
            "add_trial(session, self.study_id)",
            "[self.storage.create_new_trial(self.study_id)]",
        )
    ],
    "sign-off-keeps-trials": [
        ("storage.ledger.Ledger.sign_off", "release_all(connection, self.worker_id, reason)", "pass")
    ],
    "unseen-trial-not-read": [
        (
            "search.claims.Claims.sample",
            "storage.get_all_trials(self._ledger.study_id, deepcopy=False)",
            "pass",
        )
    ],
    "no-sweep": [("search.worker.Worker._sweep", "remove(path for", "list(path for")],
    "predictions-not-synced": [("trainer.files.write_atomically", "os.fsync(file.fileno())", "pass")],
    "silent-slurm-means-gone": [
        (
            "search.slurm.queue.probe_liveness",
            'decide: {error}")\n        return liveness',
            'decide: {error}")\n        return {one.worker_id: False for one in asked}',
        )
    ],
    "decision-not-taken-again": [
        (
            "search.trial.Trial._conclude",
            "self.claim.last_epoch or self.claim.promoted",
            "self.claim.last_epoch + 1",
        )
    ],
}


def plant(name: str) -> None:
    """Plant it in this process. Raises AssertionError if the source has other words."""
    for path, old, new in PLANTS[name]:
        owner, attribute, value = _find(path)
        if isinstance(value, sa.TextClause):
            assert old in value.text, f"{path}: no {old!r}"
            columns = [one for one in recording._COLUMNS if f":{one.name}" in value.text]
            bound = [sa.bindparam(one.name, type_=one.type) for one in columns]
            changed: Any = sa.text(value.text.replace(old, new)).bindparams(*bound)
        else:
            changed = _edited(path, value, old, new)
        setattr(owner, attribute, changed)
        for module in list(sys.modules.values()):  # those that have imported it by its name
            if vars(module).get(attribute) is value and not inspect.isclass(owner):
                setattr(module, attribute, changed)


def _find(path: str) -> tuple[Any, str, Any]:
    """The owner of a path, the attribute's name, and its value."""
    parts = path.split(".")
    depth = next(n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in sys.modules)
    owner: Any = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:-1]:
        owner = getattr(owner, part)
    return owner, parts[-1], inspect.getattr_static(owner, parts[-1])


def _edited(path: str, value: Any, old: str, new: str) -> Any:
    """The function with other words in its source, compiled among the globals of its module."""
    function = inspect.unwrap(value)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{path} has {source.count(old)} times {old!r}"
    code = compile(source.replace(old, new), f"<plant in {path}>", "exec")
    place: dict[str, Any] = {}
    exec(code, vars(sys.modules[function.__module__]), place)
    return place[function.__name__]

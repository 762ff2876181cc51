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

Edit = tuple[str, str, str]  # the path of a function or of SQL, words that stand in it once, other words

PLANTS: dict[str, list[Edit]] = {
    "claim-without-study-lock": [("storage.ledger.Ledger.claim", "row.with_for_update()", "row")],
    "fence-without-lock": [
        ("storage.ledger.Ledger._fence", "attempt.with_for_update()", "attempt"),
        ("storage.attempts.lock_attempt", ".with_for_update()", ""),
    ],
    "finish-without-fence": [
        (
            "storage.ledger.Ledger.finish",
            "attempt is None or attempt.worker_id != self.worker_id or attempt.released is not None",
            "attempt is None",
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
            "ATTEMPTS.c.lease_until > now()",
            'ATTEMPTS.c.lease_until > sa.func.to_timestamp(__import__("time").time())',
        ),
        (
            "storage.trial_queue.UNFINISHED_TRIALS",
            "OR attempt.lease_until <=",
            "OR true OR attempt.lease_until <=",
        ),
    ],
    "snapshot-after-clear": [
        ("search.trial.Trial.__init__", "worker.ledger.renew(claim)", "None"),
        ("trainer.checkpoint.Checkpoints.withdraw", "self._last_saved:", "[]:"),
        ("search.worker.Worker._sweep", "remove(path for", "list(path for"),
    ],
    "lost-connection-is-final": [
        (
            "storage.faults._is_away",
            "error.connection_invalidated:\n        return True",
            "error.connection_invalidated:\n        return False",
        )
    ],
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
            "storage.ledger.Ledger.claim",
            "add_trial(connection, self.study_id)",
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
            "[storage.get_trial(claim.trial_id)]",
        )
    ],
    "no-sweep": [("search.worker.Worker._sweep", "remove(path for", "list(path for")],
    "predictions-not-synced": [("trainer.files.new_file", "os.fsync(file.fileno())", "pass")],
    "silent-slurm-means-gone": [
        (
            "search.slurm.queue.probe_liveness",
            'decide: {error}")\n        return liveness',
            'decide: {error}")\n        return {one.worker_id: False for one in asked}',
        )
    ],
    "budget-read-at-two-moments": [
        (
            "storage.trial_queue.TrialQueue.enqueued",
            "count, waiting = self._count_and_waiting",
            "count = self._count_and_waiting[0]; del self._count_and_waiting; "
            "waiting = self._count_and_waiting[1]",
        )
    ],
    "decision-not-taken-again": [
        (
            "search.trial.Trial._decide",
            "result.epoch < last or (result.epoch == last and self.claim.promoted)",
            "result.epoch <= last",
        )
    ],
    "promoted-judged-again": [
        (
            "search.trial.Trial._decide",
            " or (result.epoch == last and self.claim.promoted):",
            ":",
        )
    ],
    "read-only-is-a-bug": [
        ("storage.faults.classify", "if key in AGAIN:", "if key in AGAIN and key != READ_ONLY:"),
        ("storage.database._leave_read_only", "context.is_disconnect = True", "pass"),
    ],
    "optuna-told-afterwards": [
        (
            "storage.recording.RECORD",
            ":intermediate_value_type FROM held",
            ":intermediate_value_type FROM held WHERE false",
        ),
        (
            "storage.ledger.Ledger.record",
            "return self._renew(",
            "tell = self.storage.set_trial_intermediate_value\n"
            '    told = claim.trial_id, result["epoch"], value\n'
            "    return (lambda *a, **k: (self._renew(*a, **k), tell(*told))[0])(",
        ),
    ],
    "predictions-after-the-end": [
        (
            "search.trial.Trial._finish",
            "predictions = [",
            "worker.ledger.finish(self.claim, outcome, value, reason)\n        predictions = [",
        )
    ],
    "once-paused-always-paused": [
        ("storage.trial_queue.UNFINISHED_TRIALS", "later.number > pause.number", "false"),
        ("storage.trial_queue.LAST_EPOCHS_OF_PAUSED", "later.number > pause.number", "false"),
        ("storage.trial_queue.PAUSED_TRIALS", "later.number > pause.number", "false"),
    ],
    "orphan-trial-never-taken": [
        (
            "storage.trial_queue.UNFINISHED_TRIALS",
            "AND trials.trial_id NOT IN",
            "AND trials.trial_id IN (SELECT trial_id FROM atelier.attempt) AND trials.trial_id NOT IN",
        )
    ],
    "out-of-memory-fails-trial": [
        ("search.blame.Blame.judge", "if is_out_of_memory(error):", "if False:")
    ],
    "disk-full-charged-to-trial": [
        (
            "search.blame.Blame.judge",
            "if isinstance(error, types):",
            "if isinstance(error, types) and not isinstance(error, OSError):",
        )
    ],
    "release-without-fence": [
        (
            "storage.ledger.Ledger.release",
            "if attempt.released is not None:",
            "if False:",
        )
    ],
    "damaged-digest-is-text": [
        (
            "trainer.checkpoint.Checkpoints.newest_first",
            "_digest_path(path).read_bytes().split()[:1]",
            '[one.encode() for one in _digest_path(path).read_text("utf-8").split()[:1]]',
        )
    ],
    "register-not-repeatable": [("storage.ledger.Ledger.register", ".on_conflict_do_nothing()", "")],
    "told-trial-ended-again": [
        (
            "storage.ledger.Ledger.finish",
            "ended_elsewhere = close_if_ended(connection, *key, trial.state)",
            "ended_elsewhere = None",
        )
    ],
    "deleted-study-at-claim": [("storage.ledger.Ledger.claim", "one_or_none()", "one()")],
    "enqueued-over-budget": [
        (
            "storage.trial_queue.TrialQueue.enqueued",
            " if count - len(waiting) < self._study.max_trials else []",
            "",
        )
    ],
    "completing-job-is-gone": [
        (
            "search.slurm.queue._is_at_work",
            "if job.state in UNDECIDED:\n        return None",
            "if job.state in UNDECIDED:\n        return False",
        )
    ],
    "hidden-jobs-mean-gone": [
        ("search.slurm.queue.probe_liveness", "if listing.find(own_job) is None:", "if False:")
    ],
    "flag-completing-ignored": [
        ("search.slurm.queue._job", '"COMPLETING" if "COMPLETING" in flags else state', "state")
    ],
    "dead-of-spent-study-stay-open": [
        (
            "storage.ledger.Ledger.claim",
            "close_the_dead(connection, self.study_id, liveness, self.worker_id, held)",
            "pass",
        )
    ],
    "folder-not-synced": [("trainer.files.new_file", "os.fsync(folder)", "pass")],
    "time-of-transactions-begin": [
        (
            "storage.ledger.Ledger.claim",
            "study = connection.execute(",
            'connection.info["begun"] = connection.scalar(sa.select(now()))\n'
            "        study = connection.execute(",
        ),
        (
            "storage.attempts.open_attempt",
            "claimed=now(),\n            renewed=now(),",
            'claimed=connection.info["begun"],\n            renewed=connection.info["begun"],',
        ),
    ],
    "backup-of-many-moments": [("storage.backup.dump_tables", "REPEATABLE READ", "READ COMMITTED")],
    "backup-lacks-newer-predictions": [
        ("storage.backup.hold_files", "yield hold_results", "yield lambda: None")
    ],
    "optunas-lost-transaction-is-a-bug": [
        ("storage.faults._is_away", "PoolTimeoutError, PendingRollbackError", "PoolTimeoutError")
    ],
    "error-of-lost-trial-ends-worker": [
        (
            "search.trial.Trial._charge",
            "except LeaseLost as lost:",
            "except LeaseLost as lost:\n        raise",
        )
    ],
    "cleared-folder-ends-worker": [
        ("search.trial.Trial._end_attempt", "and fault is Fault.MACHINE:", "and False:")
    ],
    "swept-folder-ends-worker": [
        (
            "storage.ledger.Ledger.release",
            "if close_if_ended(connection, *key, trial.state) is not None:",
            "if False:",
        )
    ],
    "vanished-checkpoint-ends-worker": [
        (
            "trainer.checkpoint.Checkpoints.newest_first",
            "continue  # another worker has just replaced it",
            "raise",
        )
    ],
    "sweeps-later-attempts": [
        (
            "trainer.checkpoint.Checkpoints._sweep",
            'leftover.name.removeprefix(".") < f"attempt-{self.attempt + 1:04d}"',
            "True",
        )
    ],
    "deleted-study-at-end": [("storage.attempts.lock_attempt", "one_or_none()", "one()")],
    "offer-error-ends-worker": [
        ("search.claims.Claims._obtain", "return Offer(claim, error, [])", "raise")
    ],
    "attempt-judged-unlocked": [("storage.attempts.lock_open_attempt", ".with_for_update()", "")],
    "end-takes-the-released": [
        (
            "storage.ledger.Ledger.claim",
            "if claim is None and is_over:",
            "if claim is None and not held and not queue.somebody_is_at_work():",
        ),
        ("storage.study_end.prune_the_rest", "if not spent:", "if False:"),
    ],
    "parameters-not-read-back": [
        (
            "search.claims.Claims.sample",
            "params = storage.get_trial(claim.trial_id).params",
            "params = trial.params",
        )
    ],
    "end-asked-late": [
        (
            "storage.ledger.Ledger.claim",
            "if claim is None and is_over:",
            "if claim is None and not held and not queue.somebody_is_at_work():",
        )
    ],
    "damaged-renamed-twice": [
        ("trainer.checkpoint.Checkpoints.newest_first", "with suppress(FileNotFoundError):", "if True:")
    ],
    "replaced-workers-checkpoint-counts": [
        (
            "trainer.checkpoint.Checkpoints.save",
            "attempt-{self.attempt:04d}-epoch",
            "attempt-0001-epoch",
        ),
        ("trainer.run.Run._agrees", "return all(", "return True or all("),
        ("trainer.checkpoint.Checkpoints.withdraw", "self._last_saved:", "[]:"),
    ],
    "locks-in-another-order": [
        (
            "storage.ledger.Ledger._take",
            "attempt = lock_open_attempt(connection, trial_id)",
            "lock_trial(connection, trial_id)\n    attempt = lock_open_attempt(connection, trial_id)",
        )
    ],
    "nan-ranks-first": [
        ("storage.ledger.Ledger.record", "None if math.isnan(value) else value", "value")
    ],
    "diverged-goes-on": [
        (
            "search.trial.Trial._decide",
            "if not self._on_record(result).finite:",
            "if False:",
        )
    ],
    "claim-not-repeatable": [
        ("storage.ledger.Ledger._take", "if attempt.worker_id == self.worker_id:", "if False:"),
        ("storage.ledger.Ledger.sign_off", "release_all(connection, self.worker_id, reason)", "pass"),
    ],
    "release-not-repeatable": [
        (
            "storage.ledger.Ledger.release",
            "attempt.worker_id != self.worker_id:",
            "attempt.worker_id != self.worker_id or attempt.released is not None:",
        )
    ],
    "only-newest-checkpoint-kept": [
        ("trainer.checkpoint.Checkpoints.save", "older[: 1 - KEPT]", "older")
    ],
    "claim-ahead-left-open": [
        ("search.worker.Worker._release_all", "self.claims.finish_claiming()", "pass"),
        ("storage.ledger.Ledger.sign_off", "release_all(connection, self.worker_id, reason)", "pass"),
    ],
    "second-ctrl-c-keeps-trials": [
        ("search.worker.Worker._work", 'self._release_all("stopped at once")', "pass"),
        ("storage.ledger.Ledger.sign_off", "release_all(connection, self.worker_id, reason)", "pass"),
    ],
    "added-trial-counts-as-complete": [
        ("storage.trial_queue.TrialQueue._has_complete", "TRAINED_HERE,", "")
    ],
    "budget-asked-at-claims-only": [
        ("storage.ledger.Ledger._renew", "SPENT if spent else None", "None")
    ],
    "cleared-before-the-end": [
        (
            "search.trial.Trial._finish",
            "worker.ledger.finish(",
            "self._checkpoints.clear()\n    worker.ledger.finish(",
        )
    ],
    "crowded-charged-to-trial": [
        ("search.blame.Blame.judge", "if is_out_of_memory(error) and in_company:", "if False:")
    ],
    "stopped-study-ends-as-done": [
        ("search.claims.Claims.next", "if reason := self._ledger.stop_reason():", "if reason := None:")
    ],
    "withdraw-hits-another": [
        (
            "storage.ledger.Ledger.withdraw",
            "self._is_open(claim)",
            "ATTEMPTS.c.trial_id == claim.trial_id, ATTEMPTS.c.number == claim.attempt, "
            "ATTEMPTS.c.released.is_(None)",
        )
    ],
    "strange-line-means-gone": [
        ("search.slurm.queue.probe_liveness", "if job is None and listing.strange:", "if False:")
    ],
    "strange-state-means-gone": [
        (
            "search.slurm.queue._is_at_work",
            '"its lease decides"\n        )\n        return None',
            '"its lease decides"\n        )\n        return False',
        )
    ],
    "open-study-not-retried": [("search.study.open_study", "@retrying\n", "")],
    "enter-study-not-repeatable": [("storage.studies.enter_study", ".on_conflict_do_nothing()", "")],
    "read-only-session-kept": [
        ("storage.database._leave_read_only", "context.is_disconnect = True", "pass")
    ],
    "upgrade-counts-without-lock": [
        (
            "storage.schema._refuse_if_held",
            'connection.exec_driver_sql(f"LOCK TABLE {SCHEMA}.attempt IN SHARE ROW EXCLUSIVE MODE")',
            "pass",
        )
    ],
    "checkpoint-before-record": [
        (
            "search.trial.Trial._record",
            "decision = self._decide(result, waited)",
            "if snapshot: self._queue(self._worker.writer, self._writes, self._save, snapshot)\n"
            "    return self._decide(result, waited)",
        )
    ],
    "released-before-saved": [
        (
            "search.trial.Trial._release_later",
            "writer = self._worker.writer",
            "writer = self._worker.writer\n"
            "    self._queue(writer, self._writes, self._release, outcome, reason)",
        )
    ],
    "given-back-before-record": [
        (
            "search.trial.Trial.give_back",
            "self._worker.recorder, self._records, self._release_later, snapshot, outcome, reason",
            "self._worker.writer, self._writes, self._release_later, snapshot, outcome, reason",
        )
    ],
    "saved-at-rungs-only": [
        ("search.trial.Trial._conclude", "self._unsaved.is_due()", "False"),
    ],
    "own-leaving-trial-claimed": [
        ("search.worker.Worker._held", "[*self.trials, *self.leaving]", "self.trials")
    ],
    "study-over-before-the-last-end": [
        ("search.worker.Worker._begin_new", "elif self.leaving and not self.trials:", "elif False:")
    ],
    "decision-not-waited-for": [
        (
            "search.worker.Worker.train",
            "for trial in self.trials if not trial.awaited}",
            "for trial in self.trials}",
        ),
        (
            "search.worker.Worker.fill",
            "for trial in self.trials if not trial.awaited]",
            "for trial in self.trials]",
        ),
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
        elif isinstance(value, str):
            assert value.count(old) == 1, f"{path} has {value.count(old)} times {old!r}"
            changed = value.replace(old, new)
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

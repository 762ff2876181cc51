"""`atelier verify` finds what is planted, and nothing where nothing is."""

import hashlib
import json
import math
import re
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
import torch
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from typer.testing import CliRunner

from search.cli import app
from search.exit_codes import ExitCode
from search.verify import look
from search.verify.evidence import gather
from search.verify.rules import RULES, Finding, Holds, violations
from storage import database
from storage.outcome import RESTORED
from storage.paths import artifacts, image_cache
from storage.prune import remove, superfluous
from storage.studies import update_study
from tests.chaos.checker import References, half_written
from tests.chaos.search import STUDY
from tests.conftest import as_superuser, copied_database
from trainer.predictions import Predictions

TRIALS = 4
ALL = f"study 'ended': {TRIALS} trials, all {{}} rules hold\n"
FIRST = "(SELECT min(trial_id) FROM public.trials WHERE state = 'COMPLETE')"
BEST = "(SELECT trial_id FROM atelier.epoch WHERE epoch = 1 ORDER BY value DESC LIMIT 1)"


class Ended:
    """A study that has ended undisturbed, and copies of its database in which something is planted."""

    def __init__(self, server, url):
        self._server, self.url = server, url
        self.references = References()
        self.first = self.number(f"SELECT number FROM public.trials WHERE trial_id = {FIRST}")
        self.best = self.number(f"SELECT number FROM public.trials WHERE trial_id = {BEST}")

    @contextmanager
    def connection(self, *statements):
        """What is planted is rolled back."""
        engine = database.connect(make_url(self.url))
        with engine.connect() as connection:
            for statement in statements:
                assert connection.execute(sa.text(statement)).rowcount != 0
            yield connection
        engine.dispose()

    def number(self, query):
        with self.connection() as connection:
            return connection.execute(sa.text(query)).scalar_one()

    def broken(self, *statements, reference=None, change=lambda evidence: evidence):
        """The rules that are broken of such a study, if nobody but its workers touched it."""
        with self.connection(*statements) as connection:
            evidence = change(gather(connection, "ended"))
        return {one.rule for one in violations(evidence, Holds.UNDISTURBED, reference)}

    @contextmanager
    def copy(self, *statements):
        """The same in a database of its own, which is that of the environment."""
        url = copied_database(self._server, "planted", "ended")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ATELIER_DATABASE_URL", url)
            engine = database.connect()
            with engine.begin() as connection:
                for statement in statements:
                    assert connection.execute(sa.text(statement)).rowcount != 0
            yield engine
            engine.dispose()


def verify(*words, code=0):
    result = CliRunner().invoke(app, ["verify", *words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def ended(server, template, demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATELIER_DATABASE_URL", copied_database(server, "ended", template))
        patch.setenv("ATELIER_HOME", str(folder / "home"))
        patch.setenv("OMP_NUM_THREADS", "1")
        study = folder / "study.toml"
        text = STUDY.format(name="ended", data=demo, checkpoint_seconds=20).replace(
            "100000", str(TRIALS)
        )
        # So that a trial has one attempt, and the search is the same each time.
        study.write_text(text.replace("promote", "asha").replace('"random"', '"qmc"'))
        result = CliRunner().invoke(app, ["worker", str(study)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        # The original takes no more connections once it is copied.
        url = copied_database(server, "undisturbed", "ended")
        patch.setenv("ATELIER_DATABASE_URL", url)
        yield Ended(server, url)
    as_superuser(
        server,
        *(
            f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"
            for name in ("ended", "undisturbed", "planted")
        ),
    )
    torch.set_num_threads(threads)  # the worker has set its own


def test_nothing_is_found_where_nothing_is(ended):
    assert ended.broken(reference=ended.references.curve) == set()
    assert ended.number("SELECT count(*) FROM public.trials") == TRIALS
    rules = sum(rule.holds <= Holds.ENDED for rule in RULES) - 1  # nothing is trained
    assert verify("ended").output == ALL.format(rules)
    known = json.loads(verify("ended", "--json").stdout)
    assert (known["trials"], known["ended"], known["findings"]) == (TRIALS, True, [])
    assert len(known["rules"]) == rules


LATEST = "(SELECT min(trial_id) FROM public.trials WHERE state = 'RUNNING')"
OF_FIRST = f"WHERE trial_id = {FIRST}"
ANOTHER_WORKER = "INSERT INTO atelier.worker (id, host, pid, process) VALUES ('b', 'b', 1, 'b:1:1')"
# An attempt before the only one of the first complete trial; then the statement says what it was like.
BEFORE = (
    ANOTHER_WORKER,
    "UPDATE atelier.worker SET started = started - interval '1 h' WHERE id = 'b'",
    f"UPDATE atelier.attempt SET number = 2 {OF_FIRST}",
    f"UPDATE atelier.epoch SET attempt = 2 {OF_FIRST}",
    "INSERT INTO atelier.attempt SELECT trial_id, 1, study_id, 'b', "
    "claimed - interval '2 s', claimed - interval '1 s', "
    "claimed - interval '1 ms', claimed - interval '1 s', 'lost' "
    f"FROM atelier.attempt {OF_FIRST}",
)
EARLIER = f"{OF_FIRST} AND number = 1"
# What is planted: the statements, the rule that finds it, and what it says of the first complete trial.
PLANTED = {
    "a trial that is gone": (
        ["UPDATE public.trials SET number = 7 WHERE number = 1"],
        "trials_are_numbered_without_a_gap",
        "the study has a trial 2 where trial 1 is to be; rows were lost or changed; go on with a "
        "backup: atelier db restore FILE",
    ),
    "an attempt that is gone": (
        [
            f"UPDATE atelier.attempt SET number = 2 {OF_FIRST}",
            f"UPDATE atelier.epoch SET attempt = 2 {OF_FIRST}",
        ],
        "attempts_are_numbered_without_a_gap",
        "has the attempts [2]; rows were lost",
    ),
    "a second holder": (
        [*BEFORE, f"UPDATE atelier.attempt SET released = released + interval '2 s' {EARLIER}"],
        "an_attempt_begins_when_the_one_before_has_ended",
        "had attempt 2 before attempt 1 had ended; see what its workers did: atelier logs ended --tri",
    ),
    "a second open attempt": (
        [*BEFORE, f"UPDATE atelier.attempt SET released = NULL, outcome = NULL {EARLIER}"],
        "an_attempt_begins_when_the_one_before_has_ended",
        "had attempt 2 before attempt 1 had ended; ",
    ),
    "a successor that did not wait for the lease": (
        [*BEFORE, f"UPDATE atelier.attempt SET lease_until = lease_until + interval '2 ms' {EARLIER}"],
        "a_lost_trial_is_taken_when_its_lease_has_ended",
        "had attempt 2 within the lease of 1; ",
    ),
    "a lease that nobody gave back": (
        [f"UPDATE atelier.attempt SET released = NULL {OF_FIRST}"],
        "an_attempt_that_has_ended_says_how",
        "has attempt 1 with no end and the outcome complete; ",
    ),
    "an end that nobody knows": (
        [f"UPDATE atelier.attempt SET outcome = 'done' {OF_FIRST}"],
        "an_attempt_that_has_ended_says_how",
        "has attempt 1 with an unknown outcome, 'done'; ",
    ),
    "a worker of before a restore": (
        [f"UPDATE atelier.worker SET stopped = started, reason = '{RESTORED}'"],
        "a_worker_takes_trials_while_it_is_signed_on",
        "had attempt 1 after its worker had signed off; ",
    ),
    "a worker that is gone": (
        [
            "ALTER TABLE atelier.attempt DROP CONSTRAINT attempt_worker_id_fkey",
            f"UPDATE atelier.attempt SET worker_id = 'x' {OF_FIRST}",
        ],
        "a_worker_takes_trials_while_it_is_signed_on",
        "has attempt 1 of a worker that is not on record; ",
    ),
    "rows of another study": (
        [f"UPDATE atelier.epoch SET study_id = 99 {OF_FIRST}"],
        "rows_are_of_the_study_of_their_trial",
        "has rows of study 99, and is of another; ",
    ),
    "a lost trial": (
        [f"UPDATE public.trials SET state = 'RUNNING' {OF_FIRST}"],
        "a_trial_ends_once",
        "is RUNNING in Optuna, and its last attempt is complete; ",
    ),
    "a second end": (
        [*BEFORE, f"UPDATE atelier.attempt SET outcome = 'pruned' {EARLIER}"],
        "a_trial_ends_once",
        "goes on after attempt 1, which ended it; ",
    ),
    "a parameter that is gone": (
        [f"DELETE FROM public.trial_params {OF_FIRST} AND param_name = 'lr'"],
        "a_trained_trial_has_parameters_of_the_space",
        "was trained without lr; rows were lost",
    ),
    "a duplicated epoch": (
        [
            "ALTER TABLE atelier.epoch DROP CONSTRAINT epoch_pkey",
            f"INSERT INTO atelier.epoch SELECT * FROM atelier.epoch {OF_FIRST} AND epoch = 1",
        ],
        "epochs_are_on_record_once",
        "has the epochs [0, 1, 1, 2, 3, 4, 5] of 6 on record; ",
    ),
    "a lost epoch": (
        [
            f"DELETE FROM atelier.epoch {OF_FIRST} AND epoch = 2",
            f"DELETE FROM public.trial_intermediate_values {OF_FIRST} AND step = 2",
        ],
        "epochs_are_on_record_once",
        "has the epochs [0, 1, 3, 4, 5] of 6 on record; ",
    ),
    "the last epoch lost": (
        [
            f"DELETE FROM atelier.epoch {OF_FIRST} AND epoch = 5",
            f"DELETE FROM public.trial_intermediate_values {OF_FIRST} AND step = 5",
        ],
        "a_complete_trial_has_its_epochs_and_its_score",
        "is complete after 5 of 6 epochs; ",
    ),
    "an epoch of nobody": (
        [f"UPDATE atelier.epoch SET attempt = 7 {OF_FIRST} AND epoch = 5"],
        "an_epoch_is_of_an_attempt",
        "has epoch 5 of attempt 7, after 1; ",
    ),
    "an epoch of who was replaced": (
        [f"UPDATE atelier.epoch SET recorded = recorded + interval '1 h' {OF_FIRST} AND epoch = 5"],
        "an_epoch_is_of_an_attempt",
        "has epoch 5 of attempt 1, which was not open then; ",
    ),
    "a step back in the stream": (
        [f"UPDATE atelier.epoch SET stream_epoch = 1 {OF_FIRST} AND epoch = 2"],
        "a_trial_goes_forward_through_the_stream",
        "went through the epochs [0, 1, 1, 3, 4, 5] of the stream; see whether its curve can be "
        "believed: atelier replay ended --trial ",
    ),
    "an epoch that Optuna was told twice": (
        [
            "ALTER TABLE public.trial_intermediate_values DROP CONSTRAINT "
            "trial_intermediate_values_trial_id_step_key",
            "INSERT INTO public.trial_intermediate_values SELECT trial_intermediate_value_id + 10000, "
            "trial_id, step, intermediate_value, intermediate_value_type "
            f"FROM public.trial_intermediate_values {OF_FIRST} AND step = 1",
        ],
        "optuna_was_told_the_same",
        "has other values of an epoch twice in Optuna than on record; ",
    ),
    "an epoch of which Optuna was told another value": (
        [
            "UPDATE public.trial_intermediate_values SET intermediate_value = 0.5 "
            f"{OF_FIRST} AND step IN (1, 3)"
        ],
        "optuna_was_told_the_same",
        "has other values of the epochs [1, 3] in Optuna than on record; ",
    ),
    "a value that is not the accuracy": (
        [f"UPDATE atelier.epoch SET val_accuracy = 0.25 {OF_FIRST} AND epoch = 2"],
        "a_value_is_what_the_numbers_give",
        " in epoch 2, not 0.25; ",
    ),
    "another score": (
        [f"UPDATE public.trial_values SET value = value + 1e-9 {OF_FIRST}"],
        "a_complete_trial_has_its_epochs_and_its_score",
        "has the score [0.",
    ),
    "two scores": (
        [
            "INSERT INTO public.trial_values SELECT trial_value_id + 10000, trial_id, 1, 0.5, "
            f"value_type FROM public.trial_values {OF_FIRST}"
        ],
        "an_ended_trial_has_one_score",
        "is COMPLETE with the scores [0.",
    ),
    "a loss that was not the end": (
        [f"UPDATE atelier.epoch SET train_loss = 'NaN' {OF_FIRST} AND epoch = 3"],
        "training_ends_where_the_loss_is_not_finite",
        "went on after epoch 3, where its loss was not finite; ",
    ),
}


GIVEN_UP = (
    f"UPDATE public.trials SET state = 'PRUNED' WHERE trial_id = {BEST}",
    "UPDATE atelier.attempt SET outcome = 'pruned', "
    f"reason = 'paused after 2 epochs, and never among the best' WHERE trial_id = {BEST}",
    "UPDATE public.trial_values SET value = (SELECT value FROM atelier.epoch WHERE epoch = 1 "
    f"AND trial_id = {BEST}) WHERE trial_id = {BEST}",
    "UPDATE public.trials SET datetime_complete = datetime_complete + interval '1 h' "
    f"WHERE trial_id = {BEST}",
    f"DELETE FROM public.trial_intermediate_values WHERE step > 1 AND trial_id = {BEST}",
    f"DELETE FROM atelier.epoch WHERE epoch > 1 AND trial_id = {BEST}",
)
PLANTED |= {
    "one of the best that waited to the end": (
        GIVEN_UP,
        "none_of_the_best_was_given_up",
        "was given up as never among the best, but 0 of 4 were better after epoch 1; ",
    ),
    "a trial that was given up although none had completed": (
        [
            *GIVEN_UP,
            "UPDATE public.trials SET datetime_complete = datetime_complete - interval '1 day' "
            f"WHERE trial_id = {BEST}",
        ],
        "none_of_the_best_was_given_up",
        "was given up before any trial had completed; ",
    ),
    "a score of a pruned trial that is not its own": (
        [*GIVEN_UP, f"UPDATE public.trial_values SET value = 0.5 WHERE trial_id = {BEST}"],
        "an_ended_trial_has_one_score",
        "was pruned with the score [0.5], after a value of 0.",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_in_the_database_is_found(ended, planted):
    statements, rule, words = PLANTED[planted]
    with ended.copy(*statements):
        findings = json.loads(verify("ended", "--json", code=1).stdout)["findings"]
    lines = {str(Finding(**one)): one["rule"] for one in findings}
    assert rule in {found for line, found in lines.items() if words in line}, lines


def test_in_every_rules_way_something_is_planted():
    planted = {rule for _, rule, _ in PLANTED.values()} | {rule for *_, rule, _ in FILES} | OTHERS
    assert planted == {rule.name for rule in RULES}


def test_nothing_is_found_in_a_study_of_an_earlier_version(ended):
    with ended.copy(
        "UPDATE atelier.epoch SET val_hits = NULL, val_log_loss = NULL",
        "UPDATE atelier.study SET attributes = NULL, settings = settings - 'search' - 'images'",
        "UPDATE atelier.worker SET log = NULL, started = date_trunc('s', started)",
    ):
        assert verify("ended").stdout


@contextmanager
def put(path, data):
    before = path.read_bytes() if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data) if data is not None else path.unlink()
    try:
        yield
    finally:
        path.unlink(missing_ok=True) if before is None else path.write_bytes(before)
        with suppress(OSError):  # other files are in it
            path.parent.rmdir()


def run_folder(ended):
    with ended.connection() as connection:
        return gather(connection, "ended").runs


def first_predictions(ended, tmp_path):
    """Where they are, those that are damaged, and those of another run."""
    path, other = run_folder(ended).predictions(ended.first), tmp_path / "other.npz"
    own = Predictions.load(path)
    all_right = np.broadcast_to(own.labels, own.classes.shape)
    replace(own, classes=all_right).save(other)
    return path, path.read_bytes()[:-20], other.read_bytes()


# Files that are put there, by their path in the run folder; the rule, and what it says.
FILES = [
    (
        "trial-00000/attempt-0001-epoch-0001-step-00000004.pt",
        "nothing_is_left",
        "trial 0 has ended and left ",
    ),
    (
        "predictions/trial-00099.npz",
        "nothing_is_left",
        "which belongs to no trial; remove it: atelier db prune",
    ),
    (
        "trial-00000/attempt-0007-epoch-0001-step-00000004.pt",
        "a_checkpoint_is_of_an_attempt_on_record",
        "which no attempt on record wrote; move that file away; ",
    ),
    (
        "trial-00000/attempt-0001-epoch-0008-step-00000004.pt.damaged",
        "a_checkpoint_is_of_an_attempt_on_record",
        "of epochs that are not on record; ",
    ),
    (
        "trial-00077/attempt-0001-epoch-0001-step-00000004.pt",
        "a_checkpoint_is_of_an_attempt_on_record",
        "and no trial 77; ",
    ),
]


@pytest.mark.parametrize(("name", "rule", "words"), FILES)
def test_a_file_that_is_not_to_be_there_is_found(ended, name, rule, words):
    path = run_folder(ended).path / name
    with put(path, b""):
        lines = verify("ended", code=1).stdout.splitlines()
        assert [line for line in lines if words in line and str(path) in line]
        assert rule in ended.broken()
    assert verify("ended").stdout


def test_predictions_of_another_run_are_found_and_removed_ones_are_no_fault(ended, tmp_path):
    path, damaged, other = first_predictions(ended, tmp_path)
    for data, words in (
        (damaged, "has damaged predictions: "),
        (other, "has the predictions of another run"),
    ):
        with put(path, data):
            [line] = verify("ended", code=1).stdout.splitlines()
            assert line.startswith(f"trial {ended.first} {words}")
    with put(path, None):
        assert verify("ended").stdout  # as after `atelier db prune`
        assert ended.broken() == {"a_complete_trial_has_its_predictions"}


def test_a_damaged_checkpoint_is_found_unless_it_is_the_newest(ended):
    folder = run_folder(ended).checkpoints(ended.first)
    interrupted = (
        f"UPDATE public.trials SET state = 'RUNNING' {OF_FIRST}",
        f"UPDATE atelier.attempt SET outcome = 'released' WHERE trial_id = {LATEST}",
        f"DELETE FROM public.trial_values WHERE trial_id = {LATEST}",
    )
    with ended.copy(*interrupted), ExitStack() as files:
        for epochs, digest in ((4, hashlib.sha256(b"x").hexdigest()), (5, "of something else")):
            path = folder / f"attempt-0001-epoch-{epochs:04d}-step-00000004.pt"
            files.enter_context(put(path, b"x"))
            files.enter_context(put(path.with_name(f"{path.name}.sha256"), digest.encode()))
        assert verify("ended").stdout
        with put(folder / "attempt-0001-epoch-0004-step-00000004.pt", b"y"):
            [line] = verify("ended", code=1).stdout.splitlines()
    assert line.startswith(
        f"trial {ended.first} has {folder}/attempt-0001-epoch-0004-step-00000004.pt, which"
    )


def test_what_a_second_look_does_not_find_was_a_race(ended, monkeypatch):
    path, looks = run_folder(ended).path / FILES[0][0], []

    def later(*arguments):
        looks.append(arguments)
        if len(looks) == 2:
            path.unlink()
        return gather(*arguments)

    monkeypatch.setattr(look, "gather", later)
    with put(path, b""):
        assert "all " in verify("ended").stdout
    assert len(looks) == 2


def test_what_is_half_written_goes_with_a_prune_a_day_later(ended):
    runs, engine = run_folder(ended), database.connect(make_url(ended.url))
    picture, log = artifacts() / ".picture.1234", runs.logs / ".log.1234"
    with put(picture, b""), put(log, b""):
        assert verify("ended").stdout  # somebody may be writing it
        remove(superfluous(engine, 1, runs, keep=None))
        assert [path for path in (picture, log) if path.exists()] == [picture, log]
        assert not [*half_written(engine, 1, runs)]
        assert not [path for path in (picture, log) if path.exists()]
    with put(image_cache() / "half.partial", b""):
        [left] = half_written(engine, 1, runs)
        assert "half.partial" in left
    engine.dispose()


# The rules that are not in the tables above: by the tests below, and by one in test_confirm.py.
OTHERS = {
    "a_rerun_has_the_parameters_of_the_plan",
    "the_budget_of_trials_is_used_up",
    "no_trial_has_failed",
    "every_trial_was_ended_by_a_worker",
    "the_budget_of_gpu_hours_is_kept",
    "trials_stop_where_the_strategy_decides",
    "a_complete_trial_has_its_predictions",
    "a_curve_is_that_of_an_undisturbed_run",
    "predictions_are_of_the_epochs_on_record",
    "an_older_checkpoint_is_whole",
}


@pytest.mark.parametrize(
    ("statements", "rules"),
    [
        (["UPDATE atelier.study SET max_trials = max_trials - 1"], {"the_budget_of_trials_is_used_up"}),
        (["UPDATE atelier.study SET max_trials = max_trials + 1"], {"the_budget_of_trials_is_used_up"}),
        (
            ["UPDATE atelier.study SET max_trials = max_trials + 1, max_gpu_seconds = 1e6"],
            {"the_budget_of_trials_is_used_up"},
        ),
        (
            [f"UPDATE public.trials SET state = 'FAIL' {OF_FIRST}"],
            {"no_trial_has_failed", "every_trial_was_ended_by_a_worker", "a_trial_ends_once"},
        ),
        (
            [f"UPDATE atelier.attempt SET released = NULL, outcome = NULL {OF_FIRST}"],
            {"every_trial_was_ended_by_a_worker"},
        ),
        (
            [
                "UPDATE atelier.study SET max_gpu_seconds = 100",
                f"UPDATE atelier.attempt SET claimed = claimed - interval '2 h' {OF_FIRST}",
                "UPDATE atelier.worker SET started = started - interval '2 h'",
            ],
            {"the_budget_of_gpu_hours_is_kept"},
        ),
    ],
)
def test_what_is_planted_in_an_undisturbed_study_is_found(ended, statements, rules):
    assert ended.broken(*statements) == rules


def test_the_pause_of_a_worker_counts_as_gpu_time_only_once_it_goes_on(ended):
    """Until then only its lease did, so the others were not told that the hours are spent."""
    late = "(SELECT max(released) FROM atelier.attempt) + interval"
    attempt = f"claimed = claimed - interval '1 h', released = {late} '3 s'"
    paused = [
        "UPDATE atelier.study SET max_gpu_seconds = 3000",
        f"DELETE FROM atelier.epoch {OF_FIRST} AND epoch > 0",
        f"UPDATE atelier.epoch SET recorded = {late} '2 s' {OF_FIRST}",
        "INSERT INTO atelier.epoch SELECT (jsonb_populate_record("  # more of them, for the others
        "row, jsonb_build_object('epoch', row.epoch + 10))).* FROM atelier.epoch AS row",
        f"UPDATE atelier.attempt SET {attempt} {OF_FIRST}",
    ]
    assert "the_budget_of_gpu_hours_is_kept" not in ended.broken(*paused)
    paused[0] = "UPDATE atelier.study SET max_gpu_seconds = 100"
    assert "the_budget_of_gpu_hours_is_kept" in ended.broken(*paused)


def test_a_trial_that_was_stopped_elsewhere_than_at_a_rung_is_found(ended):
    def by(**settings):
        return lambda evidence: replace(
            evidence,
            config=evidence.config.model_copy(
                update={"study": evidence.config.study.model_copy(update=settings)}
            ),
        )

    for settings in ({"rungs": [2]}, {"strategy": "none"}, {"audit": 1.0}):
        assert ended.broken(change=by(**settings)) == {"trials_stop_where_the_strategy_decides"}


@pytest.mark.parametrize("column", ["train_loss", "val_accuracy", "val_log_loss", "lr"])
def test_a_curve_that_is_off_by_one_bit_is_found(ended, column):
    where = f"{OF_FIRST} AND epoch = 2"
    value = ended.number(f"SELECT {column} FROM atelier.epoch {where}")
    off = f"UPDATE atelier.epoch SET {column} = {math.nextafter(value, 2)!r} {where}"
    assert ended.broken(off, reference=ended.references.curve) == {
        "a_curve_is_that_of_an_undisturbed_run"
    }


def test_nothing_is_found_in_what_users_do(engine, make_worker, monkeypatch, tmp_path):
    short = ("train.epochs=1", "train.warmup_epochs=0")
    worker = make_worker("study.max_trials=7", *short)
    study = worker.study
    study.enqueue_trial({"momentum": 0.9})  # refused
    study.enqueue_trial({"lr": 1.5e-3})
    study.add_trial(optuna.create_trial(params={}, distributions={}, values=[0.999]))
    study.add_trial(optuna.create_trial(state=TrialState.FAIL))
    study.tell(study.ask(), 0.7)
    asked = study.ask()
    asked.report(0.3, 0)
    study.tell(asked, state=TrialState.PRUNED)
    assert worker.run() == ExitCode.DONE
    live = make_worker("study.max_trials=9", *short).ledger
    live.register()
    held = live.claim()
    study.tell(held.trial_number, state=TrialState.FAIL)  # while a worker holds it
    live.claim([held.trial_id])
    update_study(engine, live.study_id, max_trials=1)
    said = verify("tiny").output
    assert re.fullmatch(r"study 'tiny': 9 trials, all \d+ rules hold\n", said)
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "elsewhere"))
    note, said = sorted(verify("tiny").output.splitlines())
    assert note.startswith("note: no file was looked at, since the study's are not in ATELIER_HOME (")
    assert said.startswith("study 'tiny': 9 trials, all ")


def test_a_study_that_is_not_there(engine):
    said = (
        "no study 'none' in the database, which has none yet; start one with: atelier search STUDY.toml"
    )
    assert verify("none", code=2).stderr == f"error: {said}\n"

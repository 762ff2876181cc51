"""Wrong input: one line, exit code 2, nothing left behind."""

import os
import shutil
import socket
import stat
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import alembic.command
import pytest
import sqlalchemy as sa
import tomli_w
import torch
from typer.testing import CliRunner

from search.cli import app
from search.confirm.plan import plan_confirmation
from search.errors import InputError
from search.study import open_study
from search.toml_file import load_study_file
from storage import migrate, optuna_storage, schema, studies
from storage.tables import ATTEMPTS
from tests.chaos.harness import small_disk
from tests.integration.test_ledger import complete_trial, make_worker
from tests.studies import fill
from trainer.dataset import read_dataset
from trainer.demo import write_demo
from trainer.images import READER

TRAIN_KEY, STUDY_KEY = "[train]\n", "[study]\n"


def put(old, new):
    return lambda text: text.replace(old, new, 1)


def add(table, line):
    return lambda text: text.replace(table, table + line + "\n", 1)


RANGE = "lr = { low = 1e-3, high = 2e-3, log = true }"

# (what is done to a good study file, what the line must name)
STUDY_FILES = {
    "not toml": (put("[study]", "[study"), "not TOML"),
    "no study table": (put("[study]", "[studies]"), "study"),
    "no name": (put('name = "tiny"', ""), "study.name"),
    "empty name": (put('"tiny"', '""'), "study.name"),
    "a name of a file": (put('"tiny"', '"tiny.toml"'), "would be taken for a file; leave out the .toml"),
    "unprintable name": (put('"tiny"', '"a\\u0007b"'), "unprintable"),
    "misspelt study key": (put("max_trials", "max_trails"), "did you mean max_trials"),
    "misspelt train key": (put("warmup_epochs", "warmup_epoch"), "did you mean warmup_epochs"),
    "misspelt space key": (put("lr =", "l_r ="), "did you mean lr"),
    "misspelt range key": (put("high =", "hihg ="), "high"),
    "unknown table": (put("[space]", "[other]\nx = 1\n[space]"), "other"),
    "no trials": (put("max_trials = 2", "max_trials = 0"), "study.max_trials"),
    "trials as text": (put("max_trials = 2", 'max_trials = "many"'), "study.max_trials"),
    "negative gpu hours": (add(STUDY_KEY, "max_gpu_hours = -1"), "max_gpu_hours"),
    "unknown sampler": (add(STUDY_KEY, 'sampler = "tpee"'), "study.sampler"),
    "unknown strategy": (put('"none"', '"ashaa"'), "study.strategy"),
    "unknown score": (add(STUDY_KEY, 'score = "mean"'), "study.score"),
    "rungs out of order": (add(STUDY_KEY, "rungs = [2, 1]"), "rungs"),
    "rung after the end": (add(STUDY_KEY, "rungs = [9]"), "rungs"),
    "a strategy under its old name and its new one": (add(STUDY_KEY, 'pruner = "asha"'), "pruner"),
    "a first point of nothing": (add(STUDY_KEY, "first = [{ l_r = 0.001 }]"), "did you mean lr"),
    "a first point outside": (
        add(STUDY_KEY, "first = [{ lr = 1.0 }]"),
        "study.first has lr = 1.0; allowed is 0.001 to 0.002",
    ),
    "a first choice that is none": (
        add(STUDY_KEY, "first = [{ batch_size = 33 }]"),
        "study.first has batch_size = 33; allowed is [32, 64]",
    ),
    "no share of trials": (add(STUDY_KEY, "audit = 2"), "study.audit"),
    "low above high": (put("low = 1e-3", "low = 1.0"), "low = 1.0 is above"),
    "log of zero": (put("low = 1e-3", "low = 0.0"), "log"),
    "range without high": (put(", high = 2e-3", ""), "high"),
    "range of nan": (put("low = 1e-3", "low = nan"), "low"),
    "empty choices": (put("[32, 64]", "[]"), "batch_size = []; a list needs numbers"),
    "the same choice twice": (put("[32, 64]", "[64, 64.0]"), "each of them once"),
    "choices of words": (put("[32, 64]", '["a"]'), "a list needs numbers"),
    "choices of booleans": (put(RANGE, "lr = [0.001, true]"), "a list needs numbers"),
    "range of batch sizes": (put("[32, 64]", "{ low = 16, high = 64 }"), "[64, 128, 256]"),
    "a number as space": (put(RANGE, "lr = 0.1"), "lr = 0.1; write { low"),
    "a list as all of space": (
        lambda text: (
            "space = [1]\n" + text.replace("[space]\n" + RANGE + "\nbatch_size = [32, 64]\n", "")
        ),
        "space: needs a table",
    ),
    "more trials than can be": (put("max_trials = 2", "max_trials = 99999999999999"), "max_trials"),
    "a name too long for a folder": (put('"tiny"', '"' + "\U0001f600" * 60 + '"'), "too long"),
    "two lines in a SLURM setting": (
        lambda text: text + '[slurm.tuning]\nqos = "a\\nb"\n',
        "slurm.tuning.qos",
    ),
    "empty space": (put(RANGE + "\nbatch_size = [32, 64]", ""), "space"),
    "batch size of zero": (put("[32, 64]", "[0, 64]"), "batch_size"),
    "negative batch size": (put("[32, 64]", "[64, -32]"), "batch_size"),
    "fractional batch size": (put("[32, 64]", "[32.5]"), "batch_size"),
    "dropout of one": (add("[space]\n", "dropout = { low = 0.1, high = 1.0 }"), "dropout"),
    "both in space and train": (add(TRAIN_KEY, "lr = 0.1"), "lr stands in"),
    "no epochs": (put("epochs = 3", "epochs = 0"), "epochs"),
    "warm-up too long": (put("warmup_epochs = 1", "warmup_epochs = 3"), "warmup_epochs = 3"),
    "negative seed": (add(TRAIN_KEY, "seed = -1"), "seed"),
    "unknown smoothing": (add(TRAIN_KEY, 'smoothing = "more"'), "smoothing"),
    "unknown precision": (add(TRAIN_KEY, 'precision = "fp8"'), "precision"),
    "tiny image": (put("image_size = 32", "image_size = 3"), "image_size"),
    "unknown backbone": (put("test_resnet", "test_resnot"), "did you mean"),
    "unknown backbone tag": (put("test_resnet", "test_resnet.nobody"), "no weights 'nobody'"),
    "backbone of another family": (put("test_resnet", "vit_tiny_patch16_224"), "allowed are timm's"),
    "unknown stage": (put('"layer4"', '"layer9"'), "allowed is one of stem"),
    "missing weights": (put('weights = "none"', 'weights = "w.pth"'), "no such file"),
    "a folder for weights": (put('weights = "none"', 'weights = "/"'), "is a folder; give the file"),
    "missing dataset": (put('data = "', 'data = "/nowhere'), "does not exist"),
    "a search without validation": (add(TRAIN_KEY, 'train_on = "train+val"'), "needs the validation"),
    "a search on folds": (add(TRAIN_KEY, "folds = 3"), "only a confirmation has folds"),
    "too many training images": (add(TRAIN_KEY, "train_images = 999"), "allowed is 1 to 150"),
    "a last batch of one image": (
        add(TRAIN_KEY, "train_images = 65"),
        "batch_size = 32 or 64: the last batch of 65 training images has 1 image",
    ),
    "a last batch of one image, of the second batch size": (
        put("[32, 64]", "[64, 149]"),
        "batch_size = 149: the last batch of 150 training images has 1 image",
    ),
    "batches of one image": (put("[32, 64]", "[64, 1, 32]"), "batch_size = 1: the last batch"),
    "an image size that a backbone does not take": (
        lambda text: put("test_resnet", "resnetaa34d")(put("image_size = 32", "image_size = 48")(text)),
        "image_size = 48: resnetaa34d takes no images of that size",
    ),
}

runner = CliRunner()


def assert_one_line(result, expected):
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.output.strip().splitlines()
    assert len(lines) == 1, result.output
    assert expected in lines[0]
    assert lines[0].startswith("error: ")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder; the embedded server would be started in it."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("ATELIER_DATABASE_URL", raising=False)
    monkeypatch.delenv("ATELIER_HOME", raising=False)
    return work


def with_own_lists(dataset, copy):
    """A dataset with the same images, whose lists can be spoilt."""
    shutil.copytree(dataset / "split", copy / "split")
    (copy / "img").symlink_to(dataset / "img")


@pytest.fixture
def nothing_written(folder):
    yield
    assert [path.name for path in folder.iterdir()] == []


@pytest.mark.usefixtures("nothing_written")
@pytest.mark.parametrize("case", STUDY_FILES)
def test_a_wrong_study_file(case, study_text, tmp_path):
    change, expected = STUDY_FILES[case]
    text = change(study_text)
    assert text != study_text
    path = tmp_path / "study.toml"
    path.write_text(text)
    assert_one_line(runner.invoke(app, ["search", str(path)]), expected)


@pytest.mark.usefixtures("nothing_written")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["search", "no.toml"], "no such file"),
        (["worker", "no.toml"], "no such file"),
        (["worker", "{study}", "--set", "train.train_images=65"], "batch_size = 32 or 64: the last"),
        (["worker", "{study}", "--set", "space.batch_size=[64,149]"], "batch_size = 149: the last"),
        (["train", "no.toml"], "no such file"),
        (["status", "nobody"], "no database in"),
        (["status", "no.toml"], "no.toml: no such file"),
        (["export", "nobody"], "no database in"),
        (["trials", "nobody"], "no database in"),
        (["search", "{study}", "--set", "epochs"], "expected table.key=value"),
        (["search", "{study}", "--set", "train.epocs=3"], "did you mean epochs"),
        (["search", "{study}", "-o", "no/where.toml"], "no such folder"),
        (["search", "{study}", "-o", "."], "is a folder"),
        (["search", "{study}", "--set", "study.name.x=3"], "is not a table"),
        (["search", "{study}", "--set", "space.lr.low=1"], "low = 1.0 is above"),
        (["data", "demo", "{study}/x"], "cannot be made"),
        (["db", "check"], "no database in"),
        (["stop", "nobody"], "no database in"),
        (["logs", "nobody"], "no database in"),
        (["plot", "nobody", "-o", "a.png"], "no database in"),
        (["dashboard", "--host", "0.0.0.0"], "atelier user add NAME"),
        (["dashboard", "--host", "::"], "atelier user add NAME"),
        (["dashboard", "--certificate", "{study}"], "go together"),
        (["dashboard", "--certificate", "no.pem", "--key", "no.pem"], "no.pem: no such file"),
        (["dashboard", "--prefix", "a/"], "write it as in /node/login1/8080"),
        (["dashboard", "--prefix", "/../x"], "write it as in /node/login1/8080"),
        (["dashboard", "--certificate", "{study}", "--key", "{study}"], "are no PEM certificate"),
        (["dashboard", "--prefix", "/atelier"], "begins as a path of the dashboard"),
        (["user", "remove", "nobody"], "no user 'nobody'; there are: none"),
        (["user", "add", "vera", "--role", "king", "--password-file", "{study}"], "viewer and editor"),
        (["user", "add", "vera", "--password-file", "no.txt"], "no.txt"),
        (["user", "add", " ", "--password-file", "{study}"], "choose another"),
        (["submit", "{study}"], "[slurm.tuning]"),
        (["train", "{study}"], "is a study file"),
        (["data", "demo", "{data}"], "not empty"),
        (["data", "demo", "{study}"], "is a file; name a new folder"),
        (["data", "demo", "x", "--train", "99999999999999999999"], "allowed is 1000000 or less"),
        (["search", "{data}"], "is a folder; give a text file"),
        (
            ["example", "demo.toml", "-o", "no/where.toml"],
            "no/where.toml: no such folder; make it first",
        ),
        (["example", "demo.toml", "-o", "{data}"], "is a folder; give a file"),
    ],
)
def test_a_wrong_command_line(words, expected, study_text, demo, tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(study_text)
    words = [word.format(study=path, data=demo) for word in words]
    assert_one_line(runner.invoke(app, words), expected)


def broken_image(data):
    (data / "img/00003.jpg").write_bytes(b"no picture")


def animation(data):
    from PIL import Image

    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(data / "img/00003.jpg", "GIF", save_all=True, append_images=frames[1:])


def huge_image(data):
    from PIL import Image

    Image.new("1", (20000, 20000)).save(data / "img/00003.jpg", "PNG")


def missing_image(data):
    (data / "img/00003.jpg").unlink()


def label_out_of_range(data):
    path = data / "split/train_attr.txt"
    path.write_text("7 0 0 0 0 0\n" + path.read_text().split("\n", 1)[1])


def word_as_label(data):
    path = data / "split/val_attr.txt"
    path.write_text("a 0 0 0 0 0\n" + path.read_text().split("\n", 1)[1])


def missing_row(data):
    path = data / "split/train_attr.txt"
    path.write_text(path.read_text().split("\n", 1)[1])


def missing_list(data):
    (data / "split/val.txt").unlink()


@pytest.mark.usefixtures("nothing_written")
@pytest.mark.parametrize(
    ("damage", "where", "what"),
    [
        (broken_image, "train.txt:4", "is of no known kind, or damaged"),
        (animation, "train.txt:4", "2 pictures in one file"),
        (huge_image, "train.txt:4", "too large; allowed are 25,000,000 pixels"),
        (missing_image, "train.txt:4", "no such image"),
        (label_out_of_range, "train_attr.txt:1", "label 7 in column 1, allowed is 0 to 6"),
        (word_as_label, "val_attr.txt:1", "expected 6 indices"),
        (missing_row, "train_attr.txt:19", "19 rows for 20 images"),
        (missing_list, "val.txt", "no such file"),
    ],
)
def test_a_broken_dataset(damage, where, what, study_text, demo, tmp_path):
    data = tmp_path / "data"
    write_demo(data, 20, 10, 0)
    damage(data)
    path = tmp_path / "study.toml"
    path.write_text(study_text.replace(str(demo), str(data)))
    assert_one_line(runner.invoke(app, ["search", str(path)]), what)
    listed = runner.invoke(app, ["data", "check", str(data)])
    assert listed.exit_code == 2
    assert any(where in line and what in line for line in listed.output.splitlines())


@pytest.mark.usefixtures("nothing_written")
@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://nobody@127.0.0.1:9/atelier", "cannot reach the database"),
        ("postgresql://u:secret@127.0.0.1:9/x", "cannot reach the database"),
        ("sqlite:///x.db", "only PostgreSQL"),
        ("what is this", "is not a URL"),
        ("postgresql://h:port/x", "is not a URL"),
        ("postgresql://u@127.0.0.1/x?foo=bar", "cannot reach the database"),
        ("postgresql://u:secret@db.invalid/x", "may be unencrypted (sslmode=prefer)"),
        ("postgresql://u@localhost/x?hostaddr=192.0.2.1", "may be unencrypted (sslmode=prefer)"),
        ("postgresql://u@/x?host=/tmp,db.invalid", "may be unencrypted (sslmode=prefer)"),
        ("postgresql:///x?service=far", "may be unencrypted (sslmode=prefer)"),
        ("postgresql://u@127.invalid/x", "may be unencrypted (sslmode=prefer)"),
        ("postgresql://u:secret@127.0.0.1/x?host=db.invalid", "may be unencrypted"),
        ("postgresql://u:secret@db.invalid/x?sslmode=disable", "cannot reach the database"),
        ("postgresql://u:secret@db.invalid/x?sslmode=verify-full", "cannot reach the database"),
    ],
)
def test_a_database_that_cannot_be_used(url, expected, monkeypatch):
    monkeypatch.setenv("ATELIER_DATABASE_URL", url)
    for command in (["status", "x"], ["db", "check"], ["export", "x"]):
        result = runner.invoke(app, command)
        assert_one_line(result, expected)
        assert "secret" not in result.output


def test_a_database_of_a_newer_schema(engine):
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE atelier.alembic_version SET version_num = '9999'"))
    checked = runner.invoke(app, ["db", "check"])
    assert checked.exit_code == 2
    assert "9999" in checked.output.splitlines()[-1]
    assert_one_line(runner.invoke(app, ["status", "x"]), "9999")


def downgrade(engine):
    with engine.begin() as connection:
        alembic.command.downgrade(migrate.config(schema.migrations(), connection), "0004")


def test_a_database_of_an_older_schema(engine, study_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where best.toml would go
    fill(engine, ["complete", "running"], name="s")
    downgrade(engine)
    (tmp_path / "study.toml").write_text(study_text)
    study = str(tmp_path / "study.toml")
    for command in (["search", study], ["worker", study], ["status", "s"], ["db", "check"]):
        checked = runner.invoke(app, command)
        assert checked.exit_code == 2
        assert "has schema 0004" in checked.output.splitlines()[-1]
        assert "atelier db upgrade" in checked.output.splitlines()[-1]
    assert_one_line(runner.invoke(app, ["db", "upgrade"]), "hold 1 trial;")
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE atelier.attempt SET released = now() WHERE released IS NULL"))
    assert runner.invoke(app, ["db", "upgrade"]).output == "schema 0004 -> 0008\n"
    assert runner.invoke(app, ["db", "upgrade"]).output == "schema 0008 -> 0008\n"
    assert runner.invoke(app, ["status", "s"]).exit_code == 0


def test_a_trial_that_is_claimed_while_an_upgrade_begins(engine):
    fill(engine, ["waiting"], name="s")
    downgrade(engine)
    with ThreadPoolExecutor() as other, engine.connect() as worker:
        claim = (
            "INSERT INTO atelier.attempt (trial_id, number, study_id, worker_id, lease_until) "
            "SELECT trial_id, 99, study_id, 'worker of s', now() + interval '1 minute' FROM trials"
        )
        worker.execute(sa.text(claim))
        upgrade = other.submit(runner.invoke, app, ["db", "upgrade"])
        waits = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'relation'")
        while not worker.scalar(waits):
            assert not upgrade.done(), upgrade.result().output
        worker.commit()
        assert_one_line(upgrade.result(), "hold 1 trial;")
    assert schema.schema_revision(engine) == "0004"


def test_a_study_that_does_not_exist(engine):
    assert_one_line(runner.invoke(app, ["status", "nobody"]), "no study 'nobody'")


def test_a_study_with_other_settings_or_other_data(engine, demo, study_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "study.toml"
    path.write_text(study_text)
    storage = optuna_storage.optuna_storage(engine)
    write_demo(tmp_path / "other", train=12, val=6, test=0)
    open_study(load_study_file(path), engine, storage, read_dataset(demo))
    open_study(load_study_file(path, ["study.max_trials=9"]), engine, storage, read_dataset(demo))
    with pytest.raises(InputError, match=r"made with train.epochs = 3, the file says 4"):
        open_study(load_study_file(path, ["train.epochs=4"]), engine, storage, read_dataset(demo))
    with pytest.raises(InputError, match="another dataset"):
        open_study(load_study_file(path), engine, storage, read_dataset(tmp_path / "other"))
    assert_one_line(runner.invoke(app, ["export", "tiny"]), "no complete trial")
    assert_one_line(runner.invoke(app, ["export", "tiny", "--trial", "7"]), "no trial 7")


def test_a_worker_that_joins_a_study_whose_batches_cannot_be_trained(
    folder, engine, demo, study_text, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.setenv("ATELIER_HOME", str(folder / "home"))
    Path("study.toml").write_text(study_text)
    file = load_study_file(Path("study.toml"), ["train.train_images=65"])
    open_study(file, engine, optuna_storage.optuna_storage(engine), read_dataset(demo), lead=True)
    assert_one_line(runner.invoke(app, ["worker", "tiny"]), "batch_size = 32 or 64: the last batch")
    with engine.connect() as connection:
        assert connection.execute(sa.select(ATTEMPTS)).all() == []


def test_a_confirmation_needs_the_batches_of_its_candidates_only(engine):
    fill(engine, ["complete"] * 9)
    file = plan_confirmation(engine, studies.study_entry(engine, "filled"), 2, None)
    sizes = {one["params"]["batch_size"] for one in file.candidates}
    assert file.batch_sizes == sizes < {64, 128, 256}
    assert file.largest.batch_size == max(sizes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing", "no study 'missing'; see: atelier status"),
        ("empty", "'empty' has no complete trial; wait for one, or leave it out"),
    ],
)
def test_a_warm_start_from_nothing(engine, demo, study_text, tmp_path, name, expected):
    path = tmp_path / "study.toml"
    path.write_text(study_text)
    storage = optuna_storage.optuna_storage(engine)
    open_study(load_study_file(path, ["study.name=empty"]), engine, storage, read_dataset(demo))
    file = load_study_file(path, [f'study.warm_start=["{name}"]'])
    with pytest.raises(InputError, match=expected):
        open_study(file, engine, storage, read_dataset(demo))
    assert studies.study_names(engine) == ["empty"]


@pytest.mark.parametrize(("before", "after"), [("none", "{file}"), ("{file}", "none")])
def test_a_study_with_other_weights(engine, demo, study_text, tmp_path, before, after):
    (tmp_path / "w.pth").write_bytes(b"weights")
    path = tmp_path / "study.toml"
    path.write_text(study_text)
    storage = optuna_storage.optuna_storage(engine)
    first, second = (f"train.weights={w.format(file=tmp_path / 'w.pth')}" for w in (before, after))
    open_study(load_study_file(path, [first]), engine, storage, read_dataset(demo))
    with pytest.raises(InputError, match=r"made with train.weights ="):
        open_study(load_study_file(path, [second]), engine, storage, read_dataset(demo))
    with pytest.raises(InputError, match=r"made with study.score = mean-last-5"):
        open_study(
            load_study_file(path, [first, "study.score=best"]), engine, storage, read_dataset(demo)
        )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-o", "a.pdf"], "allowed are files that end in .png, .svg, .html"),
        (["-o", "a.png", "--kind", "pie"], "allowed are curves, compare, history"),
        (
            ["-o", "a.png", "--kind", "compare", "--by", "size"],
            "--by 'size': allowed are batch_size, dropout",
        ),
        (
            ["-o", "a.png", "--trials", "3,x"],
            "--trials 'x': write numbers and ranges of trials, as in 3,5-9",
        ),
        (["-o", "a.png", "--trials", ""], "--trials '': write numbers"),
        (["-o", "a.png", "--trials", "2-0"], "--trials '2-0': the smaller number comes first"),
        (["-o", "a.png", "--trials", "99"], "no epoch on record of trial 99; leave"),
        (["-o", "a.png", "--trials", "0-4,9-99999"], "no epoch on record of trials 3-4, 9-99999; leave"),
        (["-o", "a.png", "--trials", "0", "--top", "2"], "--trials and --top both choose trials"),
        (
            ["-o", "a.png", "--kind", "history", "--trials", "0"],
            "--trials has no meaning with --kind hist",
        ),
        (["-o", "a.png", "--kind", "history", "--top", "3"], "--top has no meaning with --kind history"),
        (["-o", "a.png", "--by", "dropout"], "--by has no meaning with --kind curves"),
        (
            ["-o", "a.png", "--kind", "compare", "--smooth", "0.5"],
            "--smooth has no meaning with --kind compare",
        ),
        (["-o", "no/where.png"], "no such folder; make it first"),
    ],
)
def test_a_figure_that_cannot_be_drawn(engine, folder, words, expected, monkeypatch):
    fill(engine, ["complete"] * 3)
    monkeypatch.setenv("ATELIER_DATABASE_URL", engine.url.render_as_string(hide_password=False))
    assert_one_line(runner.invoke(app, ["plot", "filled", *words]), expected)
    assert list(folder.iterdir()) == []


def test_a_dashboard_that_cannot_be_served(database_url, folder, monkeypatch):
    monkeypatch.setenv("ATELIER_HOME", str(folder / "home"))
    short, good = folder / "short", folder / "good"
    short.write_text("123456789\n")
    good.write_text("correct horse battery\n")
    add = ["user", "add", "vera", "--password-file"]
    assert_one_line(runner.invoke(app, [*add, str(short)]), "at least 10 characters")
    (folder / "bytes").write_bytes(b"\xff\xff")
    assert_one_line(runner.invoke(app, [*add, str(folder / "bytes")]), "byte 0xff is no UTF-8")
    (folder / "long").write_text("x" * 2000)
    assert_one_line(runner.invoke(app, [*add, str(folder / "long")]), "at most 1000 characters")
    assert runner.invoke(app, [*add, str(good)]).exit_code == 0
    assert stat.S_IMODE((folder / "home" / "dashboard.json").stat().st_mode) == 0o600
    assert runner.invoke(app, ["user", "list"]).output == "vera: viewer\n"
    open_to_all = ["dashboard", "--host", "0.0.0.0"]
    assert_one_line(runner.invoke(app, open_to_all), "would send passwords in clear")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = ["dashboard", "--port", str(taken.getsockname()[1])]
        assert_one_line(runner.invoke(app, words), "choose another --port or --host")
    (folder / "home" / "dashboard.json").write_text("{")
    assert_one_line(runner.invoke(app, ["dashboard"]), "add the users again")


@pytest.mark.usefixtures("nothing_written")
def test_weights_that_are_no_weights(study_text, tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(study_text)
    (tmp_path / "junk.pth").write_bytes(Random(0).randbytes(3000))
    result = runner.invoke(app, ["search", str(path), "--weights", str(tmp_path / "junk.pth")])
    assert_one_line(result, "is of no known kind; allowed is a safetensors file or")


def test_a_home_that_cannot_be_used(folder, study_text, tmp_path, monkeypatch):
    path = tmp_path / "study.toml"
    path.write_text(study_text)
    for home in (path, path / "sub", "/proc/x"):
        monkeypatch.setenv("ATELIER_HOME", str(home))
        for command in (["search", str(path)], ["db", "start"]):
            result = runner.invoke(app, command)
            assert_one_line(result, "cannot use")
    assert [item.name for item in folder.iterdir()] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_disk(folder, tiny):
    config = {"train": tiny.model_dump(exclude_none=True)}
    (folder / "c.toml").write_text(tomli_w.dumps(config))
    command = [sys.executable, "-m", "atelier_command", "train", str(folder / "c.toml")]
    with small_disk(folder / "full", "256k"):
        environment = os.environ | {"ATELIER_HOME": str(folder / "full")}
        # In a process of its own, which a write to a mapped file would end by a signal.
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        left = [path for path in (folder / "full").rglob("*") if path.suffix not in ("", ".lock")]
    assert result.returncode == 2, result.stderr
    found = "error: No space left on device for 0.5 MB of prepared images, in ATELIER_HOME"
    assert found in result.stderr.splitlines()[-1]
    assert left == []


def test_a_longer_warmup_than_the_run(folder, tiny):
    config = tiny.model_copy(update={"warmup_epochs": 2})
    Path("c.toml").write_text(tomli_w.dumps({"train": config.model_dump(exclude_none=True)}))
    words = ["train", "c.toml", "--epochs", "2", "--warmup-epochs", "2"]
    assert_one_line(runner.invoke(app, words), "warmup_epochs = 2")


def test_a_checkpoint_that_does_not_fit(tiny, folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    values = {k: v for k, v in tiny.model_dump().items() if v is not None}
    Path("c.toml").write_text(tomli_w.dumps({"train": values | {"epochs": 2}}))
    assert runner.invoke(app, ["train", "c.toml"]).exit_code == 0
    before = sorted(os.listdir("c.run"))
    Path("c.toml").write_text(tomli_w.dumps({"train": values | {"epochs": 2, "lr": 0.5}}))
    assert_one_line(runner.invoke(app, ["train", "c.toml"]), "made with lr = 0.001")
    assert sorted(os.listdir("c.run")) == before


def change_of(key, value):
    """A bundle with another value somewhere: `table.key`."""

    def changed(tables):
        *parents, name = key.split(".")
        table = tables
        for parent in parents:
            table = table[parent]
        table[name] = value
        return tables

    return changed


@pytest.mark.parametrize(
    ("change", "words", "expected"),
    [
        (change_of("format", 99), [], "has format 99, this version reads 1"),
        (change_of("train.from_the_future", 1), [], "unknown key 'from_the_future'"),
        (change_of("slurm.final.cpu", 1), [], "did you mean cpus"),
        (
            change_of("origin", {"dataset": "0" * 64, "reader": READER}),
            [],
            "is not the dataset of the search",
        ),
        (change_of("origin.weights", "SHA-256 0"), [], "is not the weights of the search"),
        (dict, ["--train-on", "val"], "train_on"),
        (dict, ["--train-on", "train+val", "--data", "{no_val}"], "val.txt: no such file"),
        (dict, ["--warmup-epochs", "9"], "warmup_epochs = 9"),
        (dict, ["--stretch-warmup"], "--stretch-warmup goes with --epochs"),
        (
            dict,
            ["--epochs", "9", "--stretch-warmup", "--warmup-epochs", "2"],
            "--stretch-warmup and --warmup-epochs 2 are two lengths of the warm-up; give one of them",
        ),
        (
            change_of("train.warmup_epochs", 2),
            ["--epochs", "2"],
            "--epochs 2: the warm-up of 2 epochs leaves nothing of it; add --stretch-warmup, "
            "for one of 1, or --warmup-epochs, 0 to 1",
        ),
        (dict, ["--epochs", "1", "--dry-run"], "leaves nothing of it; add --warmup-epochs 0"),
        (dict, ["--profile", "final"], "--profile goes with --submit"),
        (dict, ["--run", "{demo}"], "is not empty and not a run's folder"),
        (dict, ["--epochs", "9", "--data", "nowhere"], "does not exist"),
        (dict, ["--submit", "--profile", "none"], "the file has final"),
        (dict, ["--submit", "--data", "nowhere"], "does not exist"),
        (change_of("train.train_images", 999), ["--submit"], "allowed is 1 to 150"),
        (
            change_of("train.train_images", 381),
            ["--submit", "--train-on", "train+val"],
            "allowed is 1 to 230",
        ),
        (change_of("train.train_images", 65), [], "or image_size = 64, or trainable = 'head'"),
        (change_of("train.train_images", 1), [], "the last batch of 1 training images has 1 image"),
        (change_of("train.batch_size", 149), [], "allowed is another batch_size or train_images"),
        (change_of("train.batch_size", 229), ["--train-on", "train+val"], "of 230 training images"),
        (change_of("train.batch_size", 1), [], "batch_size = 1: the last batch of 150 training"),
    ],
)
def test_a_final_run_that_cannot_begin(folder, tiny, demo, tmp_path, change, words, expected):
    no_val = tmp_path / "no_val"
    with_own_lists(demo, no_val)
    (no_val / "split" / "val.txt").unlink()
    tables = {
        "format": 1,
        "train": tiny.model_dump(exclude_none=True),
        "slurm": {"final": {}},
        "origin": {},
    }
    Path("c.toml").write_text(tomli_w.dumps(change(tables)))
    words = [word.format(no_val=no_val, demo=demo) for word in words]
    assert_one_line(runner.invoke(app, ["train", "c.toml", *words]), expected)
    assert not Path("c.run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["search", "one.toml"],
            "one.toml is the configuration of one run; train it with: atelier",
        ),
        (["submit", "one.toml"], "one.toml is the configuration of one run"),
        (["search", "{run}/best.safetensors"], "best.safetensors: is a safetensors file; give a text"),
        (["train", "one.run"], "one.run is a folder; give the configuration that atelier export wrote"),
        (["train", "study.toml"], "is a study file with a [space]; run it with: atelier search"),
        (["predict", "one.toml"], "one.toml is a configuration; its run is one.run: give that"),
        (
            ["predict", "{run}/best.safetensors", "--data", "pack.zip"],
            "a zip archive (unpack it first), n",
        ),
        (["predict", "pack.zip"], "pack.zip: is a zip archive (unpack it first); give a run of"),
        (["predict", "{run}", "--split", "val", "--scores", "pack.zip"], "is a zip archive"),
    ],
)
def test_the_container_of_what_is_wanted(folder, finished_run, study_text, words, expected):
    Path("one.run").mkdir()
    Path("one.toml").write_text('[train]\ndata = "data"\n')
    Path("study.toml").write_text(study_text)
    with zipfile.ZipFile("pack.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("é" * 40, "é" * 4000)
    result = runner.invoke(app, [word.format(run=finished_run) for word in words])
    assert_one_line(result, expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "nowhere: no such run"),
        (["{unfinished}"], "the run is not finished"),
        (["{junk}"], "cannot be read"),
        (["{run}", "--data", "{no_test}"], "test.txt: no such file; give --split train or val"),
        (["{run}", "--split", "tset"], "tset.txt: no such file; give --split train or val or test"),
        (["{run}", "--data", "nowhere"], "does not exist"),
        (["{run}", "--data", "{other}"], "has other attributes than the run was trained on"),
        (["{run}", "--tta", "rotate"], "allowed are none and flip"),
        (["{run}", "--split", "val", "--scores", "{short}"], "short.txt:79: 79 rows for 80 images"),
        (["{run}", "--split", "val", "--scores", "{high}"], "high.txt:1: label 9 in column 1"),
        (["{run}", "--split", "val", "--scores", "nowhere"], "nowhere: no such file"),
        (["{run}", "-o", "nowhere/p.zip"], "nowhere/p.zip: no such folder"),
    ],
)
def test_a_prediction_that_cannot_be_made(folder, finished_run, demo, tmp_path, words, expected):
    rows = (demo / "split" / "val_attr.txt").read_text().splitlines()
    names = ("no_test", "other", "short.txt", "high.txt", "junk.safetensors")
    places = {name.partition(".")[0]: tmp_path / name for name in names} | {"run": finished_run}
    places["junk"].write_bytes(b"junk")
    places["short"].write_text("\n".join(rows[:-1]) + "\n")
    places["high"].write_text("\n".join(["9 0 0 0 0 0", *rows[1:]]) + "\n")
    (tmp_path / "unfinished").mkdir()
    places["unfinished"] = tmp_path / "unfinished"
    shutil.copy(finished_run / "best.safetensors", places["unfinished"])
    for name in ("no_test", "other"):
        with_own_lists(demo, places[name])
    (places["no_test"] / "split" / "test.txt").unlink()
    names = places["other"] / "split" / "list_attr_cloth.txt"
    names.write_text(names.read_text().replace("floral", "flowery"))
    words = [word.format(**places) for word in words]
    assert_one_line(runner.invoke(app, ["predict", *words]), expected)
    assert not Path("prediction.zip").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["export", "tiny"], "has no complete trial yet"),
        (["export", "tiny", "--trial", "7"], "has no trial 7; it has 1, from 0"),
        (["logs", "tiny", "--trial", "7"], "has no trial 7; it has 1, from 0"),
        (["confirm", "tiny"], "has no complete trial yet"),
        (["confirm", "tiny", "--show"], "nothing of study 'tiny' is confirmed yet"),
        (["confirm", "tiny", "--json"], "nothing of study 'tiny' is confirmed yet"),
        (["confirm", "tiny", "--array", "0-3"], "--array goes with --submit"),
        (
            ["confirm", "tiny", "--show", "--submit"],
            "leave out --top, --seeds, --folds, --within and --submit",
        ),
        (
            ["trials", "tiny", "--format", "csv", "-o", "no/t.csv"],
            "no/t.csv: no such folder; make it first",
        ),
        (["trials", "tiny", "--format", "csv", "-o", "."], ".: is a folder; give a file"),
        (["plot", "tiny", "-o", "no/p.png"], "no/p.png: no such folder; make it first"),
        (["confirm", "nobody"], "no study 'nobody' in the database, which has: tiny; name one of these"),
        (["report", "tiny"], "has no complete trial yet"),
        (["worker", "nobody"], "no study 'nobody'"),
        (["worker", "tiny", "--set", "train.epochs=1"], "--set goes with a study file"),
    ],
)
def test_a_study_with_nothing_to_export(
    engine, demo, study_text, folder, tmp_path, monkeypatch, words, expected
):
    (tmp_path / "s.toml").write_text(study_text)
    file = load_study_file(tmp_path / "s.toml")
    study, _ = open_study(file, engine, optuna_storage.optuna_storage(engine), read_dataset(demo))
    study.ask()
    url = engine.url.render_as_string(hide_password=False)
    monkeypatch.setenv("ATELIER_DATABASE_URL", url)
    assert_one_line(runner.invoke(app, words), expected)
    assert list(folder.iterdir()) == []


def test_a_confirmation_on_another_dataset(engine, demo, study_text, folder, tmp_path, monkeypatch):
    (tmp_path / "s.toml").write_text(study_text)
    file = load_study_file(tmp_path / "s.toml")
    study, _ = open_study(file, engine, optuna_storage.optuna_storage(engine), read_dataset(demo))
    worker = make_worker(engine, study)
    complete_trial(worker, file, {"lr": 1e-3, "batch_size": 32}, score=0.5)
    write_demo(tmp_path / "other", train=20, val=10, test=5, seed=3)
    url = engine.url.render_as_string(hide_password=False)
    monkeypatch.setenv("ATELIER_DATABASE_URL", url)
    monkeypatch.setenv("ATELIER_HOME", str(tmp_path / "home"))
    result = runner.invoke(app, ["confirm", "tiny", "--data", str(tmp_path / "other")])
    assert_one_line(result, "was made on another dataset")
    assert studies.study_names(engine) == ["tiny"]

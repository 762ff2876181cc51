"""What may be typed into a study file: taken as SLURM would, or one line that says what to write."""

import datetime
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from search.cli import app
from search.confirm.plan import recorded
from search.errors import InputError
from search.export import load_bundle
from search.profile import SlurmProfile
from search.slurm.script import render_script
from search.study_config import Range, StudyConfig, StudySettings
from search.toml_file import load_study_file
from search.typed import in_our_words
from storage.studies import StudyEntry
from trainer.config import TrainConfig

# pydantic's own words, in any of its texts.
PYDANTICS = re.compile(
    r"Input should|String should|List should|Value error|valid (integer|string|number)"
)


def lines(script, option):
    return [line for line in script.splitlines() if line.startswith(f"#SBATCH --{option}=")]


def rendered(profile):
    return render_script(profile, "0", ["run"], Path("/w"), {}, "log")


@pytest.fixture
def load(study_text, tmp_path):
    """Loads the study file with lines added to tables, or with a text replaced."""

    def loaded(slurm="", study="", train="", replace=("", "")):
        text = study_text.replace(*replace, 1).replace("[study]\n", f"[study]\n{study}\n")
        text = text.replace("[train]\n", f"[train]\n{train}\n")
        (tmp_path / "s.toml").write_text(f"{text}\n[slurm.tuning]\n{slurm}\n")
        return load_study_file(tmp_path / "s.toml")

    return loaded


@pytest.mark.parametrize(
    ("typed", "option", "asked"),
    [
        ("time = 480", "time", "480"),
        ('time = "480"', "time", "480"),
        ("time = 08:00:00", "time", "08:00:00"),
        ('time = "2-12"', "time", "2-12"),
        ('time = "UNLIMITED"', "time", "UNLIMITED"),
        ("time = 0", "time", "0"),
        ("memory = 4096", "mem", "4096"),
        ('memory = "12g"', "mem", "12g"),
        ('gpus = "a100:1"', "gres", "gpu:a100:1"),
        ('gpus = "gpu:a100:2"', "gres", "gpu:a100:2"),
        ('gpus = "1g.5gb:1"', "gres", "gpu:1g.5gb:1"),
        ('gpus = "2"', "gres", "gpu:2"),
        ("gpus = 2", "gres", "gpu:2"),
        ("gpus = 0", "gres", None),
        ('gpus = "0"', "gres", None),
        ('gpus = "a100:0"', "gres", None),
        ("qos = 5", "qos", "5"),
        ("partition = 7", "partition", "7"),
        ("account = 1234", "account", "1234"),
        ('cpus = "7"', "cpus-per-task", "7"),
        ('warning = "60"', "signal", "B:USR2@60"),
        ('options = "--constraint=a100"', "constraint", "a100"),
        ('options = ["-C a100", "--x=1"]', "x", "1"),
    ],
)
def test_what_slurm_would_take_is_taken(load, typed, option, asked):
    script = rendered(load(typed).slurm["tuning"])
    assert lines(script, option) == ([] if asked is None else [f"#SBATCH --{option}={asked}"])


def test_a_text_is_a_list_of_its_lines(load):
    profile = load('setup = "module load cuda"').slurm["tuning"]
    assert profile.setup == ["module load cuda"]
    profile = load('setup = """\nmodule load cuda\n\nsource env\n"""').slurm["tuning"]
    assert profile.setup == ["module load cuda", "source env"]
    assert load(study='warm_start = "earlier"').study.warm_start == ["earlier"]


def test_a_number_in_quotes_is_a_number(load):
    file = load(replace=("max_trials = 2", 'max_trials = "100"'))
    assert file.study.max_trials == 100
    quoted = load(replace=("low = 1e-3, high = 2e-3", 'low = "1e-4", high = "1e-2"')).space["lr"]
    assert quoted == Range(low=1e-4, high=1e-2, log=True)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ('time = "8h"', 'time: found "8h"; * write "08:00:00"'),
        ('time = "1 day 30 min"', '* write "24:30:00"'),
        ('time = "2d"', '* write "48:00:00"'),
        ('time = "soon"', 'time: found "soon"; allowed are minutes, * as in 480 or "08:00:00"'),
        ("time = 8.5", "time: found 8.5; allowed are minutes"),
        ("time = -1", "time: found -1;"),
        ("time = true", "time: found true;"),
        ("time = 2026-01-01", "time: found 2026-01-01;"),
        ("time = 08:00:00.5", "time: found 08:00:00.5"),
        (f'time = "{"9" * 5000}"', 'time: found "999'),
        ('memory = "12GiB"', 'memory: found "12GiB"; * write "12G"'),
        ('memory = "12 gib"', '* write "12G"'),
        ("memory = 12.5", "memory: found 12.5; allowed is a number of MiB"),
        ("memory = true", "memory: found true;"),
        ('memory = "all"', 'memory: found "all";'),
        ("gpus = true", "gpus: found true;"),
        ("gpus = 1.5", "gpus: found 1.5;"),
        ("gpus = -1", "gpus: found -1;"),
        ('gpus = "a100:x"', 'gpus: found "a100:x"; allowed is a whole number, *"a100:1"'),
        ("gpus = [1]", "gpus: found [1];"),
        ("qos = true", "qos: found true; allowed is a text in quotes"),
        ("qos = 1.5", 'qos: found 1.5; allowed is a text in quotes: write "1.5"'),
        ('qos = ""', 'qos: found ""; allowed is a text of 1 or more'),
        ("account = 2026-01-01", 'account: found 2026-01-01; * write "2026-01-01"'),
        ("cpus = true", "cpus: found true; allowed is a number"),
        ("cpus = 0", "cpus: found 0; allowed is 1 or more"),
        ("cpus = [7]", "cpus: found [7]; allowed is a whole number"),
        ("cpus = {n = 7}", "cpus: found a table; allowed is a whole number"),
        ('cpus = "all"', 'cpus: found "all"; allowed is a whole number'),
        ('warning = "5min"', 'warning: found "5min"; allowed is a number of seconds: write 300'),
        ('warning = "00:05:00"', "* write 300"),
        ("warning = true", "warning: found true;"),
        ("setup = 5", "setup: found 5; allowed is a list, in [ ]"),
        ("setup = [5]", 'setup.0: found 5; allowed is a text in quotes: write "5"'),
        ('options = ["constraint=a100"]', 'options: found "constraint=a100"; *dashes'),
        ('options = "constraint=a100"', 'options: found "constraint=a100"; *dashes'),
    ],
)
def test_a_profile_that_slurm_would_not_take(load, typed, expected):
    with pytest.raises(InputError, match=_pattern(expected)) as raised:
        load(typed)
    assert_ours(raised.value, "slurm.tuning.")


@pytest.mark.parametrize(
    ("study", "expected"),
    [
        ('score = "meanlast5"', "study.score: found \"meanlast5\"; *'best'*; did you mean mean-last-5?"),
        ("sampler = true", "study.sampler: found true; allowed is 'tpe'"),
        ('max_gpu_hours = "10h"', 'study.max_gpu_hours: found "10h"; allowed is a number'),
        ("max_gpu_hours = 10:00:00", "study.max_gpu_hours: found 10:00:00; allowed is a number"),
        ("max_gpu_hours = nan", "study.max_gpu_hours: found nan; allowed is a finite number"),
        ("max_gpu_hours = 0", "study.max_gpu_hours: found 0; allowed is more than 0"),
        ("max_failures = true", "study.max_failures: found true; allowed is a number"),
        ("audit = true", "study.audit: found true; allowed is a number"),
        ("audit = 2", "study.audit: found 2; allowed is 1.0 or less"),
        ("rungs = 1", "study.rungs: found 1; allowed is a list"),
        ("rungs = [true]", "study.rungs.0: found true; allowed is a number"),
        ("first = {lr = 0.001}", "study.first: found a table; allowed is a list"),
        ("first = [{lr = true}]", "study.first.0.lr: found true; allowed is a number"),
        ('first = [{lr = "x"}]', 'study.first.0.lr: found "x"; allowed is a number'),
        ("warm_start = 5", "study.warm_start: found 5; allowed is a list"),
    ],
)
def test_a_study_table_with_wrong_types(load, study, expected):
    with pytest.raises(InputError, match=_pattern(expected)) as raised:
        load(study=study)
    assert_ours(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('name = "tiny"', "name = 5", 'study.name: found 5; allowed is a text in quotes: write "5"'),
        ('name = "tiny"', "name = 2026-01-01", 'study.name: found 2026-01-01; * write "2026-01-01"'),
        ("max_trials = 2", "max_trials = true", "study.max_trials: found true; allowed is a number"),
        ("max_trials = 2", "max_trials = 2.5", "study.max_trials: found 2.5; allowed is a whole number"),
        ("max_trials = 2", "max_trials = [1]", "study.max_trials: found [1]; allowed is a whole number"),
        ("max_trials = 2", "max_trials = 1_000_001", "found 1000001; allowed is 1000000 or less"),
        ('"none"', '"promot"', 'study.strategy: found "promot"; *; did you mean promote?'),
        ("low = 1e-3", "low = true", "space.lr.low: found true; allowed is a number"),
        ("low = 1e-3", 'low = "a"', 'space.lr.low: found "a"; allowed is a number'),
        ("log = true", 'log = "maybe"', 'space.lr.log: found "maybe"; allowed is true or false'),
        ("[32, 64]", "64", "space: batch_size = 64; write a list, as in [64]"),
        ("[32, 64]", '"64"', 'space: batch_size = "64"; write a list'),
        ("[32, 64]", "[true]", "space: batch_size = [true]; a list needs numbers"),
        ("epochs = 3", "epochs = true", "train.epochs: found true; allowed is a number"),
        ("epochs = 3", "epochs = 1.5", "train.epochs: found 1.5; allowed is a whole number"),
        ("epochs = 3", 'epochs = "all"', 'train.epochs: found "all"; allowed is a whole number'),
        ('weights = "none"', "weights = false", "train.weights: found false; allowed is a text"),
        ("[slurm.tuning]", "[slurm]\ncpus = 7", "slurm: found cpus in [slurm] itself; write it into"),
        ("[slurm.tuning]", "[[slurm.tuning]]", "slurm.tuning: found [{}]; allowed is a table"),
        ("[train]", "[train]\nseed = 4294967296", "train.seed: found 4294967296; allowed is less than"),
        ("[train]", "[train]\ncompile = true", "train.compile: found true; allowed is 'auto'"),
        ("[train]", "[train]\nallow_tf32 = 5", "train.allow_tf32: found 5; allowed is true or false"),
        (
            "[train]",
            "[train]\nimage = 8h",
            "not TOML: *; mend that: a text has straight quotes",
        ),
    ],
)
def test_other_tables_with_wrong_types(study_text, tmp_path, old, new, expected):
    text = f"{study_text}\n[slurm.tuning]\n"
    assert old in text
    (tmp_path / "s.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=_pattern(expected)) as raised:
        load_study_file(tmp_path / "s.toml")
    assert_ours(raised.value)


def test_a_bundle_is_read_with_the_same_words(tmp_path):
    path = tmp_path / "best.toml"
    path.write_text('[train]\ndata = "d"\nseed = true\n')
    with pytest.raises(InputError, match=r"train\.seed: found true; allowed is a number"):
        load_bundle(path)
    path.write_text('[train]\ndata = "d"\n[slurm.final]\nmemory = "12 GB"\ntime = 480\n')
    with pytest.raises(InputError, match=r'slurm\.final\.memory: found "12 GB"; .* write "12G"'):
        load_bundle(path)
    path.write_text('[train]\ndata = "d"\n[slurm.final]\nmemory = 4096\ntime = 480\n')
    final = load_bundle(path).slurm["final"]
    assert (final.memory, final.time) == ("4096", "480")


def _pattern(expected):
    return ".*".join(map(re.escape, expected.split("*")))


def assert_ours(error, location=""):
    text = str(error)
    assert len(text.splitlines()) == 1
    assert len(text) < 600
    assert location in text
    assert not PYDANTICS.search(text)


ODD = [
    *("", "x", "1e400", "nan", "9" * 5000, True, False, -1, 0, 1.5, 10**18, float("inf"), float("nan")),
    *(datetime.time(8), datetime.date(2026, 1, 1), datetime.datetime(2026, 1, 1), [], [1], [[]], {}),
    *({"low": 1}, {"x": {}}, ["x", True], [{}], "a\nb", "\0"),
]


@pytest.mark.parametrize("model", [StudySettings, SlurmProfile, TrainConfig, Range, StudyConfig])
def test_whatever_is_typed_pydantic_does_not_speak(model):
    """Every field with every odd value: each type of error that occurs is one that we have words for."""
    refused = 0
    for name in model.model_fields:
        for value in ODD:
            try:
                model(**{name: value})
            except ValidationError as error:
                for problem in error.errors():
                    if problem["type"] != "extra_forbidden":
                        assert not PYDANTICS.search(in_our_words(problem)), problem
                        refused += problem["loc"][:1] == (name,)
    assert refused > 5 * len(model.model_fields)


def entry(slurm):
    """A study on record."""
    return StudyEntry(
        study_id=1,
        name="old",
        max_trials=2,
        settings={
            "study": {"score": "mean-last-5"},
            "space": {"lr": {"low": 0.001, "high": 0.01, "log": True}},
            "train": {"epochs": 3, "warmup_epochs": 1},
            "places": {"data": "d", "weights": "none"},
            "slurm": slurm,
        },
        dataset="f" * 64,
        attributes=[],
        optuna_version="5",
        created=datetime.datetime.now(datetime.UTC),
        trunks={},
    )


def test_a_record_is_read_back_as_it_was_written(load):
    written = load('gpus = "a100:2"\ntime = 480\nmemory = 4096\nqos = 5\nsetup = "x"').slurm
    dumped = {name: profile.model_dump() for name, profile in written.items()}
    assert StudyConfig.from_record(entry(dumped)).slurm == written


def test_a_record_of_an_earlier_version_goes_on_working():
    old = {
        "qos": None,
        "cpus": 7,
        "gpus": 1,
        "memory": "12GB",
        "time": "8h",
        "warning": 300,
        "setup": [],
    }
    file = StudyConfig.from_record(entry({"tuning": old}))
    script = rendered(file.slurm["tuning"])
    assert lines(script, "mem") == ["#SBATCH --mem=12GB"]
    assert file.model_dump()["slurm"]["tuning"]["time"] == "8h"
    old_entry = entry({"tuning": old})
    old_entry.settings["confirms"] = {
        "study": "s",
        "candidates": [{"number": 0, "params": {"lr": 0.002}}],
    }
    assert recorded(old_entry).slurm == file.slurm


USAGE = [
    (["serch"], "no such command 'serch'", "atelier --help"),
    (["--foo"], "no such option: --foo", "atelier --help"),
    (["trials"], "missing argument 'study'", "atelier trials --help"),
    (["status", "a", "b"], "unexpected extra argument", "atelier status --help"),
    (["status", "-x"], "no such option: -x", "atelier status --help"),
    (["status", "x", "--json=3"], "'--json' does not take a value", "atelier status --help"),
    (["search", "s", "--wrokers", "3"], "--workers", "atelier search --help"),
    (["search", "s", "--workers"], "'--workers' requires an argument", "atelier search --help"),
    (
        ["search", "s", "--workers", "x"],
        'error: --workers: found "x"; allowed is a whole number',
        "atelier search --help",
    ),
    (["search", "s", "--workers", "0"], 'found "0"; allowed is 1 or more', "atelier search --help"),
    (["plot", "x", "-o", "a.png", "--smooth", "2"], "0.95 or less", "atelier plot --help"),
    (["plot", "x"], "missing option '-o' / '--output'", "atelier plot --help"),
    (["db", "serch"], "no such command 'serch'", "atelier db --help"),
    (["db", "--x"], "no such option: --x", "atelier db --help"),
    (["db", "backup"], "missing argument 'file'", "atelier db backup --help"),
    (["db", "start", "--port"], "'--port' requires an argument", "atelier db start --help"),
    (["db", "start", "--port", "99999"], "allowed is 65535 or less", "atelier db start --help"),
    (["user", "add"], "missing argument 'name'", "atelier user add --help"),
    (["data", "demo", "d", "--train", "a\nb"], "allowed is a whole number", "atelier data demo --help"),
    (["s\x1b[31m"], "no such command 's\\x1b[31m'", "atelier --help"),
]


@pytest.mark.parametrize(("words", "expected", "see"), USAGE)
def test_a_wrong_option_is_one_line(words, expected, see):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert line.endswith(f"; see: {see}")
    assert not PYDANTICS.search(line)


@pytest.mark.parametrize(("words", "expected", "see"), [USAGE[2], USAGE[13]])
def test_a_process_says_the_same(words, expected, see):
    command = [sys.executable, "-m", "atelier_command", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert line.endswith(f"; see: {see}")


@pytest.mark.parametrize("words", [[], ["db"], ["--help"], ["db", "--help"], ["search", "--help"]])
def test_help_stays_help(words):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == (0 if "--help" in words else 2)
    assert result.output.startswith("Usage: ")
    assert "error" not in result.output.splitlines()[-1]

"""The long run and the submission: real processes, signals and SIGKILL."""

import os
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch

from search.export import changed, load_bundle
from search.toml_file import load_study_file
from tests.integration.conftest import end_of, wait_for_epoch
from trainer.dataset import read_dataset
from trainer.demo import write_demo
from trainer.run import learning_rate


def test_a_run_interrupted_three_times_ends_with_the_same_weights(config, start, tmp_path):
    whole = start(config, "--run", "whole")
    assert end_of(whole) == 0, whole.output.read_text()
    interruptions = [(1, signal.SIGINT, 130), (2, signal.SIGKILL, -9), (3, signal.SIGTERM, 3)]
    for epoch, number, code in interruptions:
        run = start(config, "--run", "broken")
        wait_for_epoch(run, epoch)
        os.kill(run.pid, number)
        assert end_of(run) == code, run.output.read_text()
        assert not (tmp_path / "broken" / "last.safetensors").exists()
    last = start(config, "--run", "broken")
    assert end_of(last) == 0, last.output.read_text()
    for name in ("best.safetensors", "last.safetensors"):
        broken, unbroken = ((tmp_path / run / name).read_bytes() for run in ("broken", "whole"))
        assert broken == unbroken, name
    curves = [(tmp_path / run / "curve.csv").read_text().splitlines() for run in ("broken", "whole")]
    columns = [[line.split(",")[:8] for line in lines] for lines in curves]
    assert columns[0] == columns[1]
    for figure in ("curve", "confusion", "errors"):
        assert (tmp_path / "whole" / f"{figure}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "warmup", "said"),
    [
        ([], 1, "with a warm-up of 1 as before; --stretch-warmup makes it 2"),
        (["--stretch-warmup"], 2, "with a warm-up of 2 instead of 1"),
        (["--warmup-epochs", "3"], 3, "with a warm-up of 3 instead of 1"),
    ],
)
def test_another_length_keeps_the_warmup_unless_asked_and_that_is_said(
    config, atelier, words, warmup, said
):
    text = config.read_text().replace("image_size = 96", "image_size = 32")
    config.write_text(text)  # 4 epochs, 1 of them warm-up
    result = atelier("train", "c.toml", "--epochs", "8", *words)
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert notes == [f"note: the schedule has 8 epochs instead of 4, {said}"]
    rates = [float(line.split("lr ")[1].split()[0]) for line in result.stdout.splitlines()]
    ends = np.arange(1, 9) - 1 / 5  # where the last step of 5 begins
    cosine = (1 + np.cos(np.pi * (ends - warmup) / (8 - warmup))) / 2
    expected = 0.001 * np.where(ends < warmup, ends / warmup, cosine)
    assert rates == pytest.approx(expected.tolist(), rel=0.005)  # three digits are printed


def test_the_reports_run_is_its_search_with_another_length(tmp_path):
    """120 epochs, of which 5 are warm-up to 0.005, as report.txt has it; the cosine is torch's own."""
    study = load_study_file(Path(__file__).parents[2] / "studies" / "fashion.toml")
    values = study.config(study.study.first[0]).model_dump(exclude_none=True)
    (tmp_path / "c.toml").write_text(tomli_w.dumps({"train": values}))
    bundle = load_bundle(tmp_path / "c.toml")
    assert (bundle.config.epochs, bundle.config.warmup_epochs) == (30, 5)
    config, [note] = changed(bundle, {"epochs": 120}, tmp_path / "c.toml")
    assert note == (
        "note: the schedule has 120 epochs instead of 30, with a warm-up of 5 as before; "
        "--stretch-warmup makes it 20"
    )
    steps = 40  # of an epoch: 5,000 images
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.005)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=115 * steps)
    expected = [0.005 * step / (5 * steps) for step in range(5 * steps)]
    for _ in range(115 * steps):
        expected += cosine.get_last_lr()
        optimizer.step()
        cosine.step()
    rates = [learning_rate(step / steps, config) for step in range(120 * steps)]
    assert rates == pytest.approx(expected, abs=1e-12)
    chosen = {0: 0, 1: 0.001, 2.5: 0.0025, 5: 0.005, 62.5: 0.0025, 120: 0}
    assert [learning_rate(epoch, config) for epoch in chosen] == pytest.approx([*chosen.values()])


def test_two_runs_do_not_work_in_one_folder(config, start, atelier):
    run = start(config)
    wait_for_epoch(run, 1)
    os.kill(run.pid, signal.SIGSTOP)  # so that it is still there when the other gives up
    assert "another atelier train is at work in it" in atelier("train", "c.toml", code=2).stderr
    os.kill(run.pid, signal.SIGCONT)
    assert end_of(run) == 0, run.output.read_text()


def test_the_last_run_learns_from_the_validation_images_too(config, atelier, tmp_path, demo):
    config.write_text(config.read_text().replace("image_size = 96", "image_size = 32"))
    result = atelier("train", "c.toml", "--train-on", "train+val")
    assert "note: it trains on the validation images too, so nothing is validated" in result.stderr
    assert "val loss" not in result.stdout
    models = sorted(path.name for path in (tmp_path / "c.run").glob("*.safetensors"))
    assert models == ["last.safetensors"]
    assert (tmp_path / "c.run" / "curve.png").stat().st_size > 10_000
    atelier("predict", "c.run")
    assert len(checked(tmp_path / "prediction.zip", demo, "test")) == 10


def test_a_loss_that_diverges_ends_the_run(config, atelier, tmp_path):
    text = config.read_text().replace("image_size = 96", "image_size = 32")
    config.write_text(text.replace("epochs = 3", "epochs = 1").replace("lr = 0.001", "lr = 1e30"))
    atelier("train", "c.toml", "--run", "short", "--warmup-epochs", "0", code=2)
    assert not list((tmp_path / "short").glob("*.safetensors"))  # nothing to predict with
    config.write_text(text.replace("lr = 0.001", "lr = 1e30"))
    error = atelier("train", "c.toml", code=2).stderr
    assert error.strip().splitlines()[-1] == (
        "error: the loss is not finite in epoch 1: first the logits of every category, in step 3 of 5; "
        "training diverged: lower lr or weight_decay; give another --run"
    )
    again = atelier("train", "c.toml", code=2).stderr
    assert "the log of an earlier start of this run says what it was; give another --run" in again


def test_the_script_of_a_final_run_can_be_looked_at(config, atelier, tmp_path):
    with config.open("a") as file:
        file.write('[slurm.final]\nqos = "q_dmsai"\n')
    script = atelier("train", "c.toml", "--epochs", "9", "--dry-run").stdout
    assert "#SBATCH --qos=q_dmsai" in script
    assert "--array" not in script
    assert script.splitlines()[-1].endswith(
        f"train --epochs 9 --run {tmp_path}/c.run -- {tmp_path}/c.toml"
    )
    stretched = atelier("train", "c.toml", "--epochs", "9", "--stretch-warmup", "--dry-run").stdout
    assert stretched.splitlines()[-1].endswith(
        f"train --epochs 9 --run {tmp_path}/c.run --stretch-warmup -- {tmp_path}/c.toml"
    )
    assert not (tmp_path / "c.run").exists()


def checked(archive, dataset, split):
    """An independent reading of a submission: classes by image."""
    with zipfile.ZipFile(archive) as file:
        assert file.namelist() == ["prediction.txt"]
        lines = file.read("prediction.txt").decode("ascii").split("\n")
    listing = (dataset / "split" / f"{split}.txt").read_text().split()
    assert lines.pop() == ""  # the last line ends too
    assert len(lines) == len(listing)
    rows = [[int(word) for word in line.split(" ")] for line in lines]
    assert all(len(row) == 6 for row in rows)
    assert all(0 <= v < size for row in rows for v, size in zip(row, (7, 3, 3, 4, 6, 3), strict=True))
    return dict(zip(listing, map(tuple, rows), strict=True))


def test_from_a_finished_study_to_a_submission_without_hand_edits(atelier, study_text, tmp_path):
    """More images than are predicted at once; the file follows the order of test.txt, whatever it is."""
    data = tmp_path / "many"
    write_demo(data, train=200, val=60, test=300)
    old = next(line for line in study_text.splitlines() if line.startswith("data"))
    text = study_text.replace(old, f'data = "{data}"')
    # A network that tells images apart after so few epochs.
    (tmp_path / "study.toml").write_text(text.replace("test_resnet", "resnet10t"))
    atelier("search", "study.toml")
    atelier("export", "tiny", "-o", "best.toml")
    atelier("train", "best.toml", "--epochs", "4")
    said = atelier("predict", "best.run", "--split", "test", "-o", "prediction.zip").stderr
    assert "300 images of test" in said
    first = checked(tmp_path / "prediction.zip", data, "test")
    assert len(set(first.values())) > 1  # so the order matters

    listing = data / "split" / "test.txt"
    turned = listing.read_text().splitlines()[::-1]
    listing.write_text("\n".join(turned) + "\n")
    atelier("predict", "best.run", "-o", "turned.zip")
    assert checked(tmp_path / "turned.zip", data, "test") == first

    # The validation images' accuracies are those of the run's best epoch.
    val = data / "split" / "val_attr.txt"
    result = atelier("predict", "best.run", "--split", "val", "--scores", val, "-o", "val.zip")
    assert "note: the run learned from, or was chosen by, the images of val" in result.stderr
    scored = result.stdout
    rows = {line[:27].strip(): line[27:].split() for line in scored.splitlines()}
    for words in rows.values():
        value, low, high = (float(words[index]) for index in (0, 3, 5))
        assert 0 <= low <= value <= high <= 1
        assert low < high
    classes = np.array(list(checked(tmp_path / "val.zip", data, "val").values()))
    right = classes == read_dataset(data).splits["val"].labels
    assert float(rows["overall accuracy"][0]) == pytest.approx(right.mean(), abs=1e-4)
    assert float(rows["sleeve"][0]) == pytest.approx(right[:, 1].mean(), abs=1e-4)
    curve = (tmp_path / "best.run" / "curve.csv").read_text().splitlines()
    column = curve[0].split(",").index("val_accuracy")
    best = max(float(line.split(",")[column]) for line in curve[1:])
    value, low, high = (float(rows["average per-class accuracy"][i]) for i in (0, 3, 5))
    assert value == pytest.approx(best, abs=1e-4)
    assert low < value < high
    flipped = atelier("predict", "best.run", "--tta", "flip", "-o", "flip.zip")
    assert "300 images" in flipped.stderr
    assert checked(tmp_path / "flip.zip", data, "test") != first

"""Labels of -1: left out of loss, weights, metrics and intervals, as NumPy and scikit-learn would."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, log_loss
from torch.nn.functional import cross_entropy, log_softmax
from typer.testing import CliRunner

from dashboards.charts import attribute_rows
from search.cli import app
from search.confirm.intervals import compare, hits, of_hits, per_class_accuracy, selection_bias
from search.predict import _by_image
from trainer.check import check_dataset
from trainer.checkpoint import Checkpoints
from trainer.dataset import DatasetError, read_dataset
from trainer.loop import train
from trainer.loss import AttributeLoss, class_counts, class_weights
from trainer.metrics import per_class_accuracy as trained_accuracy
from trainer.metrics import validation_metrics
from trainer.predictions import UNKNOWN, Predictions
from trainer.workspace import Workspace

SIZES = (7, 3, 3, 4, 6, 3)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets and weights. A third of the targets is unknown, and all of category 2."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(60, sum(SIZES), generator=generator) * 3
    targets = torch.stack([torch.randint(size, (60,), generator=generator) for size in SIZES], 1)
    targets[torch.rand(targets.shape, generator=generator) < 0.33] = -1
    targets[:, 2] = -1
    weights = torch.rand(sum(SIZES), generator=generator) + 0.1
    return logits, targets, weights


def slices(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(*(torch.split(t, [*SIZES], t.dim() - 1) for t in tensors), strict=True))


@pytest.mark.parametrize("smoothing", ["report", "uniform"])
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.3])
def test_the_loss_equals_a_loop_in_numpy(batch, smoothing, epsilon):
    logits, targets, weights = (tensor.numpy().astype(np.float64) for tensor in batch)
    expected, first = [], 0
    for category, size in enumerate(SIZES):
        numerator = denominator = 0.0
        for row, label in zip(logits[:, first : first + size], targets[:, category], strict=True):
            if label < 0:
                continue
            log_p = row - np.log(np.exp(row).sum())
            for c in range(size):
                truth = (c == label) * (1 - epsilon)
                truth += epsilon * (0.5 if smoothing == "report" else 1 / size)
                numerator -= weights[first + c] * truth * log_p[c]
            denominator += weights[first + int(label)]
        expected.append(numerator / denominator if denominator else 0.0)
        first += size
    loss = AttributeLoss(SIZES, batch[2], epsilon, smoothing)
    assert loss.by_category(batch[0], batch[1]).tolist() == pytest.approx(expected, abs=1e-5)
    assert float(loss(batch[0], batch[1])) == pytest.approx(np.mean(expected), abs=1e-5)
    assert expected[2] == 0


def test_loss_and_gradient_are_pytorchs_with_an_ignored_index(batch):
    logits, targets, weights = batch
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    AttributeLoss(SIZES, weights, 0.0)(ours, targets).backward()
    known = [
        cross_entropy(part, targets[:, c], weight=w, ignore_index=-1)
        for c, (part, w) in enumerate(slices(theirs, weights))
        if c != 2
    ]
    (sum(known) / 6).backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)
    for category, (gradient,) in enumerate(slices(ours.grad)):
        is_unknown = targets[:, category] < 0
        assert (gradient[is_unknown] == 0).all()
        assert gradient.isfinite().all()
        assert (category == 2) == bool((gradient == 0).all())


def of_one_hot_targets(logits, targets, weights, epsilon, smoothing):
    """The loss as it is defined, without -1: from one-hot targets, slice by slice."""
    losses = []
    for category, (part, weight) in enumerate(slices(logits, weights)):
        target, size = targets[:, category], part.shape[1]
        share = 0.5 if smoothing == "report" else 1 / size
        smooth = (target.unsqueeze(1) == torch.arange(size)).float() * (1 - epsilon) + share * epsilon
        losses.append((weight * smooth * -log_softmax(part, 1)).sum() / weight[target].sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("smoothing", ["report", "uniform"])
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.3])
def test_without_unknown_labels_no_bit_changes(batch, smoothing, epsilon):
    logits, targets, _ = batch
    targets = targets.clamp(min=0)
    weights = class_weights(targets, SIZES)
    columns = zip(targets.T, SIZES, strict=True)
    counts = torch.cat([torch.bincount(column, minlength=size) for column, size in columns])
    plain = len(targets) / (220 * counts.clamp(min=1).double())
    assert torch.equal(weights, torch.where(counts > 0, plain, 0.0).float())
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = AttributeLoss(SIZES, weights, epsilon, smoothing)(ours, targets)
    expected = of_one_hot_targets(theirs, targets, weights, epsilon, smoothing)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(ours.grad, theirs.grad)


def test_weights_count_the_known_images_of_each_category(batch):
    _, targets, _ = batch
    labels = targets.numpy()
    counts, weights = [], []
    for category, size in enumerate(SIZES):
        column = labels[:, category]
        known = (column >= 0).sum()
        for attribute in range(size):
            n = (column == attribute).sum()
            counts.append(n)
            weights.append(known / (220 * n) if n else 0.0)
    assert class_counts(targets, SIZES).tolist() == counts
    assert class_weights(targets, SIZES).tolist() == pytest.approx(weights, rel=1e-6)


def test_metrics_are_scikit_learns_of_the_known_labels(batch):
    logits, targets, _ = batch
    result = validation_metrics(torch.tensor(0.5), logits, targets, SIZES, np.arange(len(targets)))
    recalls, plain, right, losses = [], [], [], []
    for category, (part,) in enumerate(slices(logits)):
        known = targets[:, category] >= 0
        truth, guess = targets[known, category].numpy(), part[known].argmax(1).numpy()
        matrix = confusion_matrix(truth, guess, labels=range(SIZES[category])) if len(truth) else 0
        right += np.diag(np.broadcast_to(matrix, [SIZES[category]] * 2)).tolist()
        if not len(truth):
            assert np.isnan(result["val_category"][category])
            continue
        recalls.append((balanced_accuracy_score(truth, guess), len(np.unique(truth))))
        plain.append(accuracy_score(truth, guess))
        assert result["val_category"][category] == pytest.approx(plain[-1])
        shares = part[known].double().softmax(1).numpy()
        losses += [
            log_loss(truth[truth == a], shares[truth == a], labels=range(SIZES[category]))
            for a in np.unique(truth)
        ]
    accuracy = np.average([recall for recall, _ in recalls], weights=[n for _, n in recalls])
    assert result["val_accuracy"] == pytest.approx(accuracy)
    assert result["val_accuracy"] == trained_accuracy(logits, targets, SIZES)
    assert result["val_overall"] == pytest.approx(np.mean(plain))
    assert list(result["val_hits"]) == right
    assert result["val_log_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    kept = result["predictions"]
    assert ((kept.labels == UNKNOWN) == (targets.numpy() < 0)).all()
    # The same from what is kept, as a confirmation computes it.
    assert per_class_accuracy(hits(kept), kept.labels, SIZES) == pytest.approx(accuracy)


def test_intervals_are_those_of_the_known_labels_alone():
    """Half the images are known in one category, and half in the other: as if they were one."""
    random = np.random.default_rng(3)
    labels = np.stack([random.integers(0, size, 50) for size in (3, 4)], 1)
    runs = [{seed: random.random((50, 2)) < rate for seed in range(3)} for rate in (0.6, 0.7)]

    def apart(values: np.ndarray, gap: object) -> np.ndarray:
        spread = np.full((100, 2), gap, values.dtype)
        spread[:50, 0], spread[50:, 1] = values[:, 0], values[:, 1]
        return spread

    marked = apart(labels.astype(np.uint8), UNKNOWN)
    other = [{seed: apart(run, False) for seed, run in by_seed.items()} for by_seed in runs]
    assert compare(other, marked, (3, 4)) == compare(runs, labels, (3, 4))
    assert compare(other, apart(labels, -1), (3, 4)) == compare(runs, labels, (3, 4))
    assert of_hits(other[0][0], marked, (3, 4)) == of_hits(runs[0][0], labels, (3, 4))
    some, same = ([by_seed[0] for by_seed in one] for one in (other, runs))
    assert selection_bias(some, marked, (3, 4), 0.0) == selection_bias(same, labels, (3, 4), 0.0)


def test_the_interval_of_the_overall_accuracy_is_that_of_a_simulation():
    random = np.random.default_rng(4)
    rates = np.array([0.9, 0.6])

    def draw() -> tuple[np.ndarray, np.ndarray]:
        known = random.random((400, 2)) < (0.3, 0.8)
        return (random.random((400, 2)) < rates) & known, known

    values = [_by_image(*draw()) for _ in range(2000)]
    right, known = draw()
    assert _by_image(right, known).mean() == pytest.approx((right.sum(0) / known.sum(0)).mean())
    spread = np.std([value.mean() for value in values])
    assert np.mean([value.std() / 20 for value in values]) == pytest.approx(spread, rel=0.05)
    everything = np.ones_like(known)
    assert np.array_equal(_by_image(right, everything), right.mean(1))


@pytest.fixture
def data(demo: Path, tmp_path: Path) -> Path:
    """The demo with unknown labels: a third of all, and all of the last category in val."""
    folder = Path(shutil.copytree(demo, tmp_path / "data"))
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        path = folder / "split" / f"{split}_attr.txt"
        labels = np.loadtxt(path, dtype=int)
        labels[random.random(labels.shape) < 0.33] = -1
        labels[:, 5] = np.where(split == "val", -1, labels[:, 5])
        labels[:3, 0] = (0, 1, -1)
        np.savetxt(path, labels, "%d")
    return folder


def test_they_are_refused_unless_the_study_allows_them(data):
    with pytest.raises(DatasetError) as caught:
        read_dataset(data)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(f"{data}/split/train_attr.txt:3: texture is unknown in ")
    assert "unknown_labels = true in [train]" in said
    dataset = read_dataset(data, unknown_labels=True)
    assert (dataset.splits["val"].labels[:, 5] == -1).all()
    assert dataset.counts(dataset.splits["val"])[-3:] == [0, 0, 0]
    warned = [str(finding) for finding in check_dataset(data)[1]]
    assert f"{data}/split/val_attr.txt:1: fit is unknown in 80 of 80 images" in "\n".join(warned)
    result = CliRunner().invoke(app, ["data", "check", str(data)])
    assert result.exit_code == 0
    assert "no errors" in result.output
    assert "unknown labels: 12" in result.output  # six categories of each split


@pytest.mark.parametrize("label", ["-2", "--1", "-01", "1-", "?"])
def test_nothing_else_stands_for_unknown(data, label):
    path = data / "split" / "val_attr.txt"
    path.write_text(path.read_text().replace("-1", label, 1))
    with pytest.raises(DatasetError, match=r"val_attr.txt:1: expected 6 indices"):
        read_dataset(data, unknown_labels=True)


def test_a_split_needs_labels(data):
    path = data / "split" / "val_attr.txt"
    path.write_text("-1 -1 -1 -1 -1 -1\n" * 80)
    with pytest.raises(DatasetError, match=r"val_attr.txt:1: every label is unknown"):
        read_dataset(data, unknown_labels=True)


def test_equal_images_contradict_each_other_only_in_what_is_known(data):
    split = data / "split"
    for name, text in (("train.txt", "{0}\n{0}\n"), ("train_attr.txt", "-1 0 0 0 0 0\n1 0 -1 1 0 0\n")):
        lines = (split / name).read_text().splitlines(keepends=True)
        (split / name).write_text(text.format(lines[0].strip()) + "".join(lines[2:]))
    found = [finding for finding in check_dataset(data)[1] if finding.kind == "contradicting labels"]
    assert len(found) == 1
    assert found[0].text.endswith("the same image: v_neckline, not crew_neckline")


def test_a_run_learns_from_them_and_resumes(tiny, data, tmp_path):
    config = tiny.model_copy(update={"data": str(data), "unknown_labels": True, "epochs": 2})
    workspace = Workspace(config, tmp_path / "cache")
    whole = list(train(config, workspace))
    assert all(result.finite and result.val_accuracy > 0 for result in whole)
    assert all(np.isnan(result.val_category[5]) and result.val_overall > 0 for result in whole)
    table = workspace.attributes
    rows = attribute_rows(whole[-1].val_hits, table)
    assert np.mean([row.accuracy for row in rows]) == pytest.approx(whole[-1].val_accuracy)
    whole[-1].predictions.save(tmp_path / "p.npz")
    kept = Predictions.load(tmp_path / "p.npz")
    labels = workspace.val_labels.numpy()
    assert np.array_equal(np.where(kept.labels == UNKNOWN, -1, kept.labels.astype(int)), labels)
    # Interrupted after an epoch: equal, bit for bit, also where a number is NaN.
    checkpoints = Checkpoints(tmp_path / "run")
    run = train(config, workspace, checkpoints)
    next(run)
    run.close()
    for again, result in zip(train(config, workspace, checkpoints), whole, strict=True):
        recorded = {k: list(v) if isinstance(v, tuple) else v for k, v in result.columns().items()}
        assert again.differing(recorded) == {}

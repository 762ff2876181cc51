"""Loss, weights and metric against independent references."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import recall_score
from torch.nn.functional import cross_entropy

from trainer.config import TrainConfig
from trainer.dataset import read_dataset
from trainer.loss import AttributeLoss, class_counts, class_weights
from trainer.metrics import per_class_accuracy, validation_metrics
from trainer.run import learning_rate

SIZES = (7, 3, 3, 4, 6, 3)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, sum(SIZES), generator=generator, dtype=torch.float64).float() * 3
    targets = torch.stack([torch.randint(size, (40,), generator=generator) for size in SIZES], 1)
    weights = torch.rand(sum(SIZES), generator=generator) + 0.1
    return logits, targets, weights


def slices(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(*(torch.split(t, [*SIZES], t.dim() - 1) for t in tensors), strict=True))


def test_loss_without_smoothing_is_weighted_cross_entropy(batch):
    logits, targets, weights = batch
    expected = sum(
        cross_entropy(part, targets[:, c], weight=w)
        for c, (part, w) in enumerate(slices(logits, weights))
    )
    assert torch.allclose(AttributeLoss(SIZES, weights, 0.0)(logits, targets), expected / 6, atol=1e-6)


def test_uniform_smoothing_is_pytorchs(batch):
    logits, targets, weights = batch
    expected = sum(
        cross_entropy(part, targets[:, c], weight=w, label_smoothing=0.1)
        for c, (part, w) in enumerate(slices(logits, weights))
    )
    loss = AttributeLoss(SIZES, weights, 0.1, "uniform")(logits, targets)
    assert torch.allclose(loss, expected / 6, atol=1e-6)


@pytest.mark.parametrize("smoothing", ["report", "uniform"])
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.3])
def test_smoothing_equals_a_loop_in_numpy(batch, smoothing, epsilon):
    logits, targets, weights = (tensor.numpy().astype(np.float64) for tensor in batch)
    first, total = 0, 0.0
    for category, size in enumerate(SIZES):
        numerator = denominator = 0.0
        for i in range(len(logits)):
            row = logits[i, first : first + size]
            log_p = row - np.log(np.exp(row).sum())
            right = int(targets[i, category])
            for c in range(size):
                target = float(c == right) * (1 - epsilon)
                target += epsilon * (0.5 if smoothing == "report" else 1 / size)
                numerator -= weights[first + c] * target * log_p[c]
            denominator += weights[first + right]
        total += numerator / denominator
        first += size
    loss = AttributeLoss(SIZES, batch[2], epsilon, smoothing)(batch[0], batch[1])
    assert float(loss) == pytest.approx(total / 6, abs=1e-5)


def test_class_weights_follow_the_report_on_the_real_counts(real_data: Path):
    dataset = read_dataset(real_data)
    targets = torch.from_numpy(dataset.splits["train"].labels)
    counts = [768, 853, 334, 422, 109, 2408, 106, 1523, 862, 2615, 488, 951, 3561, 2086, 826, 19, 2069]
    counts += [310, 702, 3399, 105, 48, 436, 749, 279, 3972]
    assert dataset.sizes == SIZES
    assert dataset.categories == ("texture", "sleeve", "length", "neckline", "fabric", "fit")
    assert class_counts(targets, SIZES).tolist() == counts
    expected = [5000 / (220 * count) for count in counts]
    assert class_weights(targets, SIZES).tolist() == pytest.approx(expected, rel=1e-6)


def test_score_is_the_mean_of_scikit_learns_recalls(batch):
    logits, targets, _ = batch
    result = validation_metrics(torch.tensor(0.5), logits, targets, SIZES, np.arange(len(targets)))
    recalls: list[float] = []
    plain = []
    for category, (part,) in enumerate(slices(logits)):
        truth, guess = targets[:, category].numpy(), part.argmax(1).numpy()
        recalls.extend(recall_score(truth, guess, labels=np.unique(truth), average=None))
        plain.append((truth == guess).mean())
    assert result["val_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-12)
    assert per_class_accuracy(logits, targets, SIZES) == result["val_accuracy"]
    counts = class_counts(targets, SIZES).numpy()
    assert (np.array(result["val_hits"])[counts > 0] / counts[counts > 0]).tolist() == pytest.approx(
        recalls
    )
    assert result["val_category"] == pytest.approx(plain)
    assert result["val_overall"] == pytest.approx(np.mean(plain))


def test_a_class_without_images_is_left_out():
    targets = torch.tensor([[0], [0], [1]])
    logits = torch.tensor([[5.0, 0, 0], [0, 5.0, 0], [0, 5.0, 0]])
    assert per_class_accuracy(logits, targets, (3,)) == pytest.approx(0.75)
    assert class_weights(targets, (3,))[2] == 0


@pytest.mark.parametrize("images", [1, 3, 40])
@pytest.mark.parametrize("unknown", [[0], [5], [1, 4], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_a_category_of_which_only_untrained_attributes_are_seen_has_no_loss(
    batch, images, unknown, epsilon
):
    logits, targets, weights = (part.clone() for part in batch)
    logits, targets = logits[:images], targets[:images]
    for category, (weight,) in enumerate(slices(weights)):
        if category in unknown:
            targets[:, category] = 2
            weight[2] = 0.0  # no training image has it
    loss = AttributeLoss(SIZES, weights, epsilon)
    found = loss.by_category(logits, targets)
    for category, (part, weight) in enumerate(slices(logits, weights)):
        if category in unknown:
            assert found[category] == 0
        else:
            smoothing = 0.5 * epsilon * (weight * -part.log_softmax(1)).sum()
            plain = cross_entropy(part, targets[:, category], weight=weight)
            share = smoothing / weight[targets[:, category]].sum()
            assert float(found[category]) == pytest.approx(float((1 - epsilon) * plain + share))


def test_schedule_is_linear_then_cosine():
    config = TrainConfig(data="x", lr=0.005, epochs=30, warmup_epochs=5)
    expected = {0: 0.0, 2.5: 0.0025, 5: 0.005, 30: 0.0}
    expected[17] = 0.005 * (1 + np.cos(np.pi * 12 / 25)) / 2
    for epoch, rate in expected.items():
        assert learning_rate(epoch, config) == pytest.approx(rate, abs=1e-12)

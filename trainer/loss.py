"""The report's loss: weighted cross-entropy with label smoothing, over all categories.

Logits are float [images, attributes], one slice after another for each category. Targets are int64
[images, categories]: the index inside the slice, or -1 for an unknown label, which counts nowhere.
"""

import torch
import torch.nn.functional as F

# w_i = N / (220 N_i): the report's class weights (section II). The constant 220 is the report's.
WEIGHT_SCALE = 220


def class_counts(targets: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """How many images have each attribute: int64 [attributes]."""
    columns = zip(targets.T, sizes, strict=True)
    # Bin 0 has the unknown labels.
    return torch.cat([torch.bincount(column + 1, minlength=size + 1)[1:] for column, size in columns])


def class_weights(targets: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """N / (220 N_i), float32 [attributes]. An attribute without images gets weight 0.

    N is the number of images whose label in the attribute's category is known.
    """
    counts = class_counts(targets, sizes)
    known = (targets >= 0).sum(0).repeat_interleave(torch.tensor(sizes, device=targets.device))
    # A division could round otherwise, and every curve with it.
    weights = known * (WEIGHT_SCALE * counts.clamp(min=1).double()).reciprocal()
    return torch.where(counts > 0, weights, 0.0).float()


class AttributeLoss:
    """Weighted cross-entropy with label smoothing, averaged over the categories.

    A slice's loss is sum_i sum_c w_c t_ic (-log p_ic) / sum_i w_{y_i}, over the images with a known
    label. At epsilon 0 this is `cross_entropy(weight=w, ignore_index=-1)`. The denominator is the same
    at every epsilon, because Adam's L2 term makes the loss's scale matter. `smoothing` says what t is
    for a one-hot y:

    - "report": y (1 - e) + e/2 (the report, section V).
    - "uniform": y (1 - e) + e/classes (PyTorch).

    A slice in which no image has an attribute with a weight has loss 0, and no gradient.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        weights: torch.Tensor,  # float32 [attributes]
        epsilon: float,
        smoothing: str = "report",
    ) -> None:
        self._sizes = [*sizes]
        # For each category what a label selects: w_c t_c, and w. The row of -1 is the last, of zeros.
        self._tables = [
            (
                F.pad(weight * _smooth(weight, epsilon, smoothing), (0, 0, 0, 1)),
                F.pad(weight, (0, 1)),
            )
            for weight in torch.split(weights, self._sizes)
        ]

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.by_category(logits, targets).mean()

    def by_category(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The slices' losses, float [categories]. Their mean is the loss."""
        parts = torch.split(logits.float(), self._sizes, 1)
        totals, weights = [], []
        for part, target, (table, weight) in zip(parts, targets.T, self._tables, strict=True):
            totals.append((table[target] * -F.log_softmax(part, 1)).sum())
            weights.append(weight[target].sum())
        weight = torch.stack(weights)
        # Divided by infinity, the loss and its gradient are 0. A `where` around 0/0 has gradient NaN.
        return torch.stack(totals) / weight.masked_fill(weight == 0, torch.inf)


def _smooth(weight: torch.Tensor, epsilon: float, smoothing: str) -> torch.Tensor:
    """What t is for each label of a category: float32 [classes, classes]."""
    share = 0.5 if smoothing == "report" else 1 / len(weight)
    return torch.eye(len(weight), device=weight.device) * (1 - epsilon) + share * epsilon


def one_hot(target: torch.Tensor, classes: int) -> torch.Tensor:
    """One-hot rows, bool [images, classes]. PyTorch's own would wait for the device to check values."""
    return target.unsqueeze(1) == torch.arange(classes, device=target.device)

"""The report's loss: weighted cross-entropy with label smoothing, over all categories.

Logits are float [images, attributes], one slice after another for each category. Targets are int64
[images, categories]: the index inside the slice.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# w_i = N / (220 N_i): the report's class weights (section II). The constant 220 is the report's.
WEIGHT_SCALE = 220


def class_counts(targets: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """How many images have each attribute: int64 [attributes]."""
    columns = zip(targets.T, sizes, strict=True)
    return torch.cat([torch.bincount(column, minlength=size) for column, size in columns])


def class_weights(targets: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """N / (220 N_i), float32 [attributes]. An attribute without images gets weight 0."""
    counts = class_counts(targets, sizes)
    weights = len(targets) / (WEIGHT_SCALE * counts.clamp(min=1).double())
    return torch.where(counts > 0, weights, 0.0).float()


@dataclass(frozen=True)
class AttributeLoss:
    """Weighted cross-entropy with label smoothing, averaged over the categories.

    A slice's loss is sum_i sum_c w_c t_ic (-log p_ic) / sum_i w_{y_i}. At epsilon 0 this is
    `cross_entropy(weight=w)`. The denominator is the same at every epsilon, because Adam's L2 term makes
    the loss's scale matter. `smoothing` says what t is for a one-hot y:

    - "report": y (1 - e) + e/2 (the report, section V).
    - "uniform": y (1 - e) + e/classes (PyTorch).
    """

    sizes: tuple[int, ...]
    weights: torch.Tensor  # [attributes]
    epsilon: float
    smoothing: str = "report"

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.by_category(logits, targets).mean()

    def of_split(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The slices' losses for images that the weights were not made from: float [categories].

        A category's loss is 0/0 if no image has an attribute with a weight. Such a category gets 0.
        """
        weights = torch.split(self.weights, [*self.sizes])
        weighted = [
            (weight[target] > 0).any() for weight, target in zip(weights, targets.T, strict=True)
        ]
        return torch.where(torch.stack(weighted), self.by_category(logits, targets), 0.0)

    def by_category(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The slices' losses, float [categories]. Their mean is the loss."""
        sizes = [*self.sizes]
        parts = torch.split(logits.float(), sizes, 1)
        weights = torch.split(self.weights, sizes)
        losses = [
            self._slice(part, target, weight)
            for part, target, weight in zip(parts, targets.T, weights, strict=True)
        ]
        return torch.stack(losses)

    def _slice(self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        share = 0.5 if self.smoothing == "report" else 1 / logits.shape[1]
        truth = one_hot(target, logits.shape[1]).to(logits.dtype)
        smooth = truth * (1 - self.epsilon) + share * self.epsilon
        total = (weight * smooth * -F.log_softmax(logits, 1)).sum()
        return total / weight[target].sum()


def one_hot(target: torch.Tensor, classes: int) -> torch.Tensor:
    """One-hot rows, bool [images, classes]. PyTorch's own would wait for the device to check values."""
    return target.unsqueeze(1) == torch.arange(classes, device=target.device)

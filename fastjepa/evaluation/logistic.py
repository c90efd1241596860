"""Logistic regression on frozen features: one convex problem by L-BFGS, or many settings of SGD at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MOMENTUM = 0.9
FEWEST_STEPS = 1000  # of SGD: epochs of a small set are too short to converge in


def logistic_regression(features: Tensor, labels: Tensor, classes: int, c: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weights and bias that minimise the mean cross-entropy + |weights|^2 / (2 c n), as scikit-learn's do.

    Shapes: features [n, D], labels int64 [n] -> weights [D, classes], bias [classes], in the features' dtype.
    """
    weights = features.new_zeros(features.shape[1], classes, requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights, bias], max_iter=1000, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(features @ weights + bias, labels) + weights.square().sum() / (2 * c * len(labels))
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    return weights.detach(), bias.detach()


@dataclass(frozen=True)
class Standardiser:
    """Features with mean 0 and deviation 1, as seen in training; what never varies becomes 0."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Standardiser:
        """Shapes: features [n, D]."""
        deviation = features.std(dim=0, correction=0)
        return cls(features.mean(dim=0), torch.where(deviation > 1e-12, 1 / deviation.clamp(min=1e-12), 0.0))

    def __call__(self, features: Tensor) -> Tensor:
        """Shapes: [..., D] -> [..., D]."""
        return (features - self.mean) * self.scale


class LinearHeads:
    """K linear classifiers trained at once by SGD with momentum, each with its own learning rate and weight decay.

    They see the same batches, brought to their device. Learning rates fall to 0 along a cosine; biases are not decayed.

    Shapes: lr, weight_decay: K each. Features [n, D], labels int64 [n], logits [K, n, classes].
    """

    def __init__(
        self,
        width: int,
        classes: int,
        lr: Sequence[float],
        weight_decay: Sequence[float],
        device: torch.device | str = "cpu",
    ):
        self.lr, self.weight_decay = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (lr, weight_decay))
        self.weights = torch.zeros(len(lr), width, classes, device=device)
        self.bias = torch.zeros(len(lr), 1, classes, device=device)

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor, epochs: int, batch_size: int = 256, seed: int = 0) -> LinearHeads:
        """At least `FEWEST_STEPS` steps, whole epochs; the order of the examples follows from the seed."""
        device = self.weights.device
        steps_an_epoch = math.ceil(len(labels) / batch_size)
        epochs = max(epochs, math.ceil(FEWEST_STEPS / steps_an_epoch))
        generator = torch.Generator().manual_seed(seed)
        moments = [torch.zeros_like(self.weights), torch.zeros_like(self.bias)]
        step, total = 0, epochs * steps_an_epoch
        for _ in range(epochs):
            for batch in torch.randperm(len(labels), generator=generator).split(batch_size):
                x, y = features[batch].to(device), labels[batch].to(device)
                self._step(x, y, moments, 0.5 + 0.5 * math.cos(math.pi * step / total))
                step += 1
        return self

    def _step(self, x: Tensor, y: Tensor, moments: list[Tensor], part: float) -> None:
        error = self.logits(x).softmax(dim=-1)  # [K, B, C]
        error[:, torch.arange(len(y), device=y.device), y] -= 1
        error /= len(y)
        slopes = torch.matmul(x.T, error) + self.weight_decay * self.weights, error.sum(dim=1, keepdim=True)
        for value, slope, moment in zip((self.weights, self.bias), slopes, moments, strict=True):
            moment.mul_(MOMENTUM).add_(slope)
            value.sub_(self.lr * part * moment)

    def logits(self, features: Tensor) -> Tensor:
        """Shapes: [n, D] -> [K, n, classes]."""
        return torch.matmul(features, self.weights) + self.bias

    def predict(self, features: Tensor, batch_size: int = 4096) -> Tensor:
        """Shapes: [n, D] -> int64 [K, n] on the features' device."""
        device = self.weights.device
        found = [self.logits(x.to(device)).argmax(dim=-1) for x in features.split(batch_size)]
        return torch.cat(found, dim=1).to(features.device)

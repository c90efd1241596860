"""How much classes show in frozen features: logistic regression, nearest neighbours, few labels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.evaluation.features import extract_features
from fastjepa.evaluation.logistic import Standardiser, logistic_regression
from fastjepa.evaluation.rank import rankme

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class LabelledImages:
    """Images to judge an encoder by. Shapes: images [n, 3, H, W] as `extract_features` takes them, labels int64 [n]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Evaluation:
    """One encoder's marks on held-out images: accuracies in percent, and the effective rank of the features."""

    linear: float | None
    knn: float | None
    low_shot: float | None
    rankme: float

    def to_dict(self) -> dict[str, float | None]:
        """As plain values by name."""
        return asdict(self)


def linear_probe(
    train: ArrayLike, train_labels: ArrayLike, test: ArrayLike, test_labels: ArrayLike, c: float = 0.1
) -> float:
    """Accuracy in percent of a logistic regression on standardised features.

    Shapes: train [n, D] and test [m, D] features, int labels [n] and [m]. `c`: inverse penalty, as scikit-learn's.

    Raises:
        ValueError: features and labels that do not fit.
    """
    return _linear(*_checked(train, train_labels, test, test_labels), c)


def knn_probe(
    train: ArrayLike, train_labels: ArrayLike, test: ArrayLike, test_labels: ArrayLike, neighbours: int = 10
) -> float:
    """Accuracy in percent of a vote of the nearest training features by cosine, weighted by 1 / distance.

    Shapes, Raises: as `linear_probe`.
    """
    train, train_labels, test, test_labels = _checked(train, train_labels, test, test_labels)
    classes, numbers = train_labels.unique(return_inverse=True)
    found = classes[knn_predict(train, numbers, test, len(classes), neighbours)]
    return percent(found == test_labels)


def low_shot_probe(
    train: ArrayLike,
    train_labels: ArrayLike,
    test: ArrayLike,
    test_labels: ArrayLike,
    shots: int | float = 5,
    draws: int = 5,
    seed: int = 0,
    c: float = 0.1,
) -> float:
    """Accuracy in percent of the linear probe with few labels, averaged over `draws` random choices of them.

    `shots`: labels a class, or below 1 the share of each class's labels, at least one. Shapes, Raises: as
    `linear_probe`.
    """
    train, train_labels, test, test_labels = _checked(train, train_labels, test, test_labels)
    chosen = (draw_few(train_labels, shots, seed=(seed, draw)) for draw in range(draws))
    return float(np.mean([_linear(train[few], train_labels[few], test, test_labels, c) for few in chosen]))


def evaluate(
    encoder: nn.Module, train: LabelledImages | None, test: LabelledImages | Tensor, seed: int = 0
) -> Evaluation:
    """All marks of an encoder: probes fitted on `train` and judged on `test`, RankMe of the features of `test`.

    Without labelled training images only the rank is known. The random state of torch is left alone.
    """
    if train is None or isinstance(test, Tensor):
        images = test if isinstance(test, Tensor) else test.images
        return Evaluation(None, None, None, float(rankme(extract_features(encoder, images))))
    ours, theirs = extract_features(encoder, train.images), extract_features(encoder, test.images)
    sets = (ours, train.labels, theirs, test.labels)
    return Evaluation(linear_probe(*sets), knn_probe(*sets), low_shot_probe(*sets, seed=seed), float(rankme(theirs)))


def knn_predict(
    train: Tensor, train_labels: Tensor, test: Tensor, classes: int, neighbours: int = 10, batch_size: int = 1024
) -> Tensor:
    """The vote of `knn_probe`: features [n, D], labels int64 [n] in 0..classes-1, features [m, D] -> int64 [m]."""
    known = F.normalize(train, dim=1)
    found = []
    for part in F.normalize(test, dim=1).split(batch_size):
        nearest = (part @ known.T).topk(min(neighbours, len(known)), dim=1)
        distance = (1 - nearest.values).clamp(min=0)
        same = distance == 0  # of which there is no more to say than that they are
        weight = torch.where(same.any(dim=1, keepdim=True), same.to(distance.dtype), 1 / distance)
        votes = weight.new_zeros(len(part), classes).scatter_add_(1, train_labels[nearest.indices], weight)
        found.append(votes.argmax(dim=1))
    return torch.cat(found)


def draw_few(labels: Tensor, shots: int | float, seed: Any) -> Tensor:
    """Indices of `shots` random examples of each class, or below 1 of that share of each, at least one."""
    rng = np.random.default_rng(seed)
    drawn = []
    for label in labels.unique().tolist():
        places = np.flatnonzero(labels.cpu().numpy() == label)
        count = shots if shots >= 1 else max(1, round(shots * len(places)))
        drawn.append(rng.permutation(places)[: int(count)])
    return torch.from_numpy(np.concatenate(drawn)).to(labels.device)


def linear_predict(train: Tensor, labels: Tensor, test: Tensor, classes: int, c: float) -> Tensor:
    """Logistic regression on standardised features; shapes as `knn_predict`."""
    standard = Standardiser.of(train)
    weights, bias = logistic_regression(standard(train), labels, classes, c)
    return (standard(test) @ weights + bias).argmax(dim=1)


def percent(right: Tensor) -> float:
    """The share of True, in percent."""
    return 100.0 * float(right.double().mean())


def _linear(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, c: float) -> float:
    classes, numbers = train_labels.unique(return_inverse=True)
    return percent(classes[linear_predict(train, numbers, test, len(classes), c)] == test_labels)


def _checked(train: Any, train_labels: Any, test: Any, test_labels: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As float64 features and int64 labels on the CPU that fit together."""
    features = [torch.as_tensor(x).detach().cpu().double() for x in (train, test)]
    labels = [torch.as_tensor(y).cpu().long() for y in (train_labels, test_labels)]
    shapes = [list(a.shape) for a in (features[0], labels[0], features[1], labels[1])]
    if (
        any(x.dim() != 2 or y.shape != x.shape[:1] or not len(y) for x, y in zip(features, labels, strict=True))
        or features[0].shape[1] != features[1].shape[1]
    ):
        raise ValueError(f"probes take features [n, D] and labels [n] to fit and to judge by, got {shapes}")
    if len(labels[0].unique()) < 2:
        raise ValueError("a probe needs at least two classes to tell apart")
    return features[0], labels[0], features[1], labels[1]

"""How much classes show in frozen features: linear, nearest-neighbour and low-shot probes."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastjepa.evaluation.features import extract_features
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

    Shapes: train [n, D] and test [m, D] features, int labels [n] and [m]. `c` is scikit-learn's inverse penalty.

    Raises:
        ValueError: features and labels that do not fit, or scikit-learn is not installed.
    """
    train, train_labels, test, test_labels = _checked(train, train_labels, test, test_labels)
    linear_model, preprocessing = _sklearn("linear_model"), _sklearn("preprocessing")
    scaler = preprocessing.StandardScaler().fit(train)
    model = linear_model.LogisticRegression(C=c, max_iter=1000)
    # More threads only wait for one another on matrices this small; short of full convergence the accuracy is the same.
    with _import("threadpoolctl").threadpool_limits(1, "blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", _sklearn("exceptions").ConvergenceWarning)
        model.fit(scaler.transform(train), train_labels)
    return 100.0 * float(model.score(scaler.transform(test), test_labels))


def knn_probe(
    train: ArrayLike, train_labels: ArrayLike, test: ArrayLike, test_labels: ArrayLike, neighbours: int = 10
) -> float:
    """Accuracy in percent of a vote of the nearest training features by cosine, weighted by closeness.

    Shapes, Raises: as `linear_probe`.
    """
    train, train_labels, test, test_labels = _checked(train, train_labels, test, test_labels)
    model = _sklearn("neighbors").KNeighborsClassifier(min(neighbours, len(train)), metric="cosine", weights="distance")
    return 100.0 * float(model.fit(train, train_labels).score(test, test_labels))


def low_shot_probe(
    train: ArrayLike,
    train_labels: ArrayLike,
    test: ArrayLike,
    test_labels: ArrayLike,
    shots: int = 5,
    draws: int = 5,
    seed: int = 0,
    c: float = 0.1,
) -> float:
    """Accuracy in percent of the linear probe with only `shots` labels a class, averaged over `draws` random choices.

    Shapes, Raises: as `linear_probe`.
    """
    train, train_labels, test, test_labels = _checked(train, train_labels, test, test_labels)
    rng = np.random.default_rng(seed)
    marks = []
    for _ in range(draws):
        members = [np.flatnonzero(train_labels == label) for label in np.unique(train_labels)]
        few = np.concatenate([rng.permutation(places)[:shots] for places in members])
        marks.append(linear_probe(train[few], train_labels[few], test, test_labels, c))
    return float(np.mean(marks))


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


def _checked(train: Any, train_labels: Any, test: Any, test_labels: Any) -> tuple[np.ndarray, ...]:
    """As float64 and int arrays that fit together."""
    features = [np.asarray(torch.as_tensor(x).cpu(), dtype=np.float64) for x in (train, test)]
    labels = [np.asarray(torch.as_tensor(y).cpu()) for y in (train_labels, test_labels)]
    shapes = [list(a.shape) for a in (features[0], labels[0], features[1], labels[1])]
    if (
        any(x.ndim != 2 or y.shape != x.shape[:1] or not len(y) for x, y in zip(features, labels, strict=True))
        or features[0].shape[1] != features[1].shape[1]
    ):
        raise ValueError(f"probes take features [n, D] and labels [n] to fit and to judge by, got {shapes}")
    if len(np.unique(labels[0])) < 2:
        raise ValueError("a probe needs at least two classes to tell apart")
    return features[0], labels[0], features[1], labels[1]


def _sklearn(module: str) -> Any:
    return _import(f"sklearn.{module}")


def _import(module: str) -> Any:
    """A module of scikit-learn or of what comes with it, imported only where it is used."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError("probes need scikit-learn: pip install 'fastjepa[demo]'") from error

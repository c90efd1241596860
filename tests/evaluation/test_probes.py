"""Probes on scikit-learn's digits, against scikit-learn used directly."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from fastjepa import vit_tiny
from fastjepa.evaluation import LabelledImages, evaluate, knn_probe, linear_probe, low_shot_probe
from fastjepa.evaluation.probes import draw_few

datasets = pytest.importorskip("sklearn.datasets")
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402


@pytest.fixture(scope="module")
def digits():
    """Pixels of 300 digits to fit and 200 by other writers to judge by."""
    found = datasets.load_digits()
    return found.data[:300], found.target[:300], found.data[-200:], found.target[-200:]


def test_linear_probe_is_standardised_logistic_regression(digits):
    train, train_labels, test, test_labels = digits
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(train), train_labels)
    expected = 100 * np.mean(model.predict(scaler.transform(test)) == test_labels)
    assert linear_probe(*digits) == pytest.approx(expected)
    assert expected > 80


def test_knn_probe_is_a_weighted_vote_by_cosine(digits):
    train, train_labels, test, test_labels = digits
    model = KNeighborsClassifier(10, metric="cosine", weights="distance").fit(train, train_labels)
    assert knn_probe(*digits) == pytest.approx(100 * model.score(test, test_labels))
    assert knn_probe(*(torch.as_tensor(a) for a in digits)) == pytest.approx(knn_probe(*digits))


def test_knn_of_few_examples_asks_them_all():
    features = np.array([[1.0, 0.1], [0.1, 1.0]])
    assert knn_probe(features, [0, 1], features, [0, 1]) == 100.0


def test_low_shot_probe_follows_from_its_seed(digits):
    assert low_shot_probe(*digits, seed=3) == low_shot_probe(*digits, seed=3)
    assert low_shot_probe(*digits, seed=3) != low_shot_probe(*digits, seed=4)
    assert 40 < low_shot_probe(*digits) < linear_probe(*digits)


def test_low_shot_probe_with_every_label_is_the_linear_probe(digits):
    assert low_shot_probe(*digits, shots=300, draws=1) == pytest.approx(linear_probe(*digits), abs=1.0)


@pytest.mark.parametrize(
    "change",
    [
        {0: np.zeros((300, 3))},
        {1: np.zeros(299, dtype=int)},
        {2: np.zeros(64)},
        {2: np.zeros((0, 64)), 3: np.zeros(0, dtype=int)},
        {1: np.zeros(300, dtype=int)},
    ],
)
@pytest.mark.parametrize("probe", [linear_probe, knn_probe, low_shot_probe])
def test_sets_that_do_not_fit(digits, probe, change):
    with pytest.raises(ValueError, match=r"\[n, D\]|two classes"):
        probe(*(change.get(place, value) for place, value in enumerate(digits)))


def test_scikit_learn_is_not_needed(digits, monkeypatch):
    expected = linear_probe(*digits), knn_probe(*digits), low_shot_probe(*digits)
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert (linear_probe(*digits), knn_probe(*digits), low_shot_probe(*digits)) == expected


def test_low_shot_by_share_takes_at_least_one_of_each_class(digits):
    labels = torch.tensor([0] * 100 + [1] * 3)
    assert labels[draw_few(labels, 0.05, 0)].tolist() == [0] * 5 + [1]
    assert low_shot_probe(*digits, shots=0.01) == pytest.approx(low_shot_probe(*digits, shots=1))


def test_classes_that_training_lacks_are_never_told(digits):
    train, labels, test, truth = digits
    few = labels < 5
    assert knn_probe(train[few], labels[few] + 10, test, truth + 10) < 100 * (truth < 5).mean() + 1e-9


def test_evaluate_gives_every_mark_and_leaves_the_random_state_alone():
    encoder = vit_tiny(img_size=[32], depth=1)
    labels = torch.arange(24) % 3
    images = (60 * labels.view(-1, 1, 1, 1) + torch.randint(0, 20, (24, 3, 32, 32))).to(torch.uint8)
    sets = LabelledImages(images[:15], labels[:15]), LabelledImages(images[15:], labels[15:])
    state = torch.get_rng_state()
    marks = evaluate(encoder, *sets)
    assert marks.linear == marks.knn == marks.low_shot == 100.0
    assert 1.0 <= marks.rankme <= 9.0
    assert torch.equal(torch.get_rng_state(), state)
    unlabelled = evaluate(encoder, None, sets[1])
    assert unlabelled.to_dict() == {"linear": None, "knn": None, "low_shot": None, "rankme": marks.rankme}

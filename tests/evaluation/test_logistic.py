"""Both logistic regressions, against scikit-learn's on its digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastjepa.evaluation.logistic import LinearHeads, Standardiser, logistic_regression

datasets = pytest.importorskip("sklearn.datasets")
from sklearn.linear_model import LogisticRegression  # noqa: E402


@pytest.fixture(scope="module")
def digits():
    """Standardised pixels: 1200 digits to fit and the rest, by other writers, to judge by; float64."""
    found = datasets.load_digits()
    features, labels = torch.tensor(found.data), torch.tensor(found.target)
    standard = Standardiser.of(features[:1200])
    return standard(features[:1200]), labels[:1200], standard(features[1200:]), labels[1200:]


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_lbfgs_finds_scikit_learns_optimum(digits, c):
    train, labels, test, truth = digits
    theirs = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(train.numpy(), labels.numpy())
    weights, bias = logistic_regression(train, labels, 10, c)
    probabilities = (test @ weights + bias).softmax(dim=1)
    np.testing.assert_allclose(probabilities, theirs.predict_proba(test.numpy()), atol=2e-3)
    assert (probabilities.argmax(dim=1) == truth).double().mean() > 0.88


def test_sgd_is_within_a_point_of_scikit_learn(digits):
    train, labels, test, truth = digits
    theirs = LogisticRegression(max_iter=5000).fit(train.numpy(), labels.numpy()).score(test.numpy(), truth.numpy())
    heads = LinearHeads(64, 10, lr=[0.05, 0.05], weight_decay=[1 / 1200, 5e-3]).fit(train.float(), labels, epochs=28)
    ours = (heads.predict(test.float()) == truth).double().mean(dim=1)
    assert abs(float(ours[0]) - theirs) < 0.01
    assert abs(float(ours[1]) - theirs) < 0.02


def test_heads_do_not_know_of_one_another(digits):
    train, labels, test, _ = digits
    together = LinearHeads(64, 10, lr=[0.01, 0.2, 0.05], weight_decay=[0.0, 5e-4, 5e-3])
    together.fit(train.float(), labels, epochs=1, seed=3)
    for place, (lr, decay) in enumerate([(0.01, 0.0), (0.2, 5e-4), (0.05, 5e-3)]):
        alone = LinearHeads(64, 10, [lr], [decay]).fit(train.float(), labels, epochs=1, seed=3)
        torch.testing.assert_close(alone.weights[0], together.weights[place], rtol=1e-4, atol=1e-5)
        assert (alone.predict(test.float())[0] == together.predict(test.float())[place]).double().mean() > 0.99


def test_sgd_is_torchs(digits):
    """A few steps against torch.optim.SGD with the same batches."""
    train, labels, *_ = digits
    train = train[:64].float()
    layer = torch.nn.Linear(64, 10)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": 0.01}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for _ in range(1000):
        torch.nn.functional.cross_entropy(layer(train), labels[:64]).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    heads = LinearHeads(64, 10, [0.1], [0.01]).fit(train, labels[:64], epochs=1, batch_size=64)
    torch.testing.assert_close(heads.weights[0].T, layer.weight.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(heads.bias[0, 0], layer.bias.detach(), rtol=1e-3, atol=1e-5)


def test_the_order_follows_from_the_seed(digits):
    train, labels, *_ = digits
    fit = [LinearHeads(64, 10, [0.05], [0.0]).fit(train.float(), labels, 1, seed=seed).weights for seed in (0, 0, 1)]
    assert torch.equal(fit[0], fit[1])
    assert not torch.equal(fit[0], fit[2])


def test_features_that_never_vary():
    features = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert torch.equal(Standardiser.of(features)(features), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))

"""Rank and spread against matrices whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from fastjepa.evaluation import feature_std, rankme


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_rankme_of_equal_singular_values_is_the_rank(rank):
    left, _ = torch.linalg.qr(torch.randn(50, rank, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(12, rank, dtype=torch.float64))
    assert float(rankme(left @ right.T)) == pytest.approx(rank, rel=1e-4)


def test_rankme_of_unequal_singular_values():
    share = torch.tensor([0.5, 0.3, 0.2])
    entropy = -sum(p * math.log(p) for p in share.tolist())
    assert float(rankme(torch.diag(4 * share))) == pytest.approx(math.exp(entropy), rel=1e-5)


def test_rankme_does_not_depend_on_scale():
    features = torch.randn(40, 8)
    assert float(rankme(features)) == pytest.approx(float(rankme(1000 * features)), rel=1e-4)


def test_rankme_of_zeros_is_finite():
    assert torch.isfinite(rankme(torch.zeros(4, 3)))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 3)])
def test_rankme_takes_a_matrix(shape):
    with pytest.raises(ValueError, match=r"\[n, D\]"):
        rankme(torch.zeros(shape))


def test_rankme_is_a_tensor_without_gradient():
    found = rankme(torch.randn(5, 3, requires_grad=True))
    assert found.shape == ()
    assert not found.requires_grad


def test_feature_std_is_between_images():
    patches = torch.randn(1, 5, 4).expand(6, 5, 4)  # patches differ, images do not
    assert float(feature_std(patches)) == pytest.approx(0.0, abs=1e-6)
    assert float(feature_std(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))) == pytest.approx(0.5)

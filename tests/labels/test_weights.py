"""Facts about weights per item."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.labels import TruncatedGaussian, certainty, confidence, margin, negative_entropy

several = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
each_weight = pytest.mark.parametrize("weight", [confidence, certainty, margin])


def probabilities(seed: int, *shape: int) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).softmax(-1)


@each_weight
@several
@given(seed=seeds, classes=st.integers(2, 10))
def test_weights_lie_in_zero_one_and_do_not_depend_on_the_order_of_classes(weight, seed: int, classes: int) -> None:
    p = probabilities(seed, 6, classes)
    w = weight(p)
    assert ((w >= 0) & (w <= 1)).all() and torch.allclose(w, weight(p.flip(1)), atol=1e-6)


@each_weight
def test_one_hot_has_the_highest_weight_and_uniform_the_lowest(weight) -> None:
    one_hot, uniform = torch.eye(4)[:1], torch.full((1, 4), 0.25)
    assert weight(one_hot).item() == pytest.approx(1)
    assert weight(uniform).item() == pytest.approx(0.25 if weight is confidence else 0, abs=1e-6)


@pytest.mark.parametrize("weight", [confidence, certainty, margin, negative_entropy])
def test_weights_are_detached_and_float32(weight) -> None:
    w = weight(probabilities(0, 2, 5, 3).half().requires_grad_())
    assert w.dtype == torch.float32 and w.shape == (2, 5) and not w.requires_grad


def test_negative_entropy_of_zeros_is_finite_and_of_uniform_is_minus_log_classes() -> None:
    assert negative_entropy(torch.eye(3)).tolist() == [0, 0, 0]
    assert negative_entropy(torch.full((1, 8), 1 / 8)).item() == pytest.approx(-math.log(8))


def test_margin_is_the_gap_of_the_two_best() -> None:
    assert margin(torch.tensor([[0.2, 0.5, 0.3]])).item() == pytest.approx(0.2)


@pytest.mark.parametrize("weight", [certainty, margin])
def test_a_single_class_is_refused(weight) -> None:
    with pytest.raises(ValueError, match="at least two"):
        weight(torch.ones(3, 1))


def test_truncated_gaussian_equals_the_equations_of_softmatch() -> None:
    weights, mu, var = TruncatedGaussian(4, decay=0.8), 0.25, 1.0
    for seed in range(4):
        p = probabilities(seed, 8, 4)
        top = p.max(1).values
        mu, var = 0.8 * mu + 0.2 * top.mean(), 0.8 * var + 0.2 * top.var(unbiased=True)
        expected = torch.where(top >= mu, torch.ones(8), torch.exp(-((top - mu) ** 2) / (2 * var / 4)))
        assert torch.allclose(weights(p), expected, atol=1e-6)


@several
@given(seed=seeds)
def test_truncated_gaussian_rises_with_confidence_and_is_one_above_the_mean(seed: int) -> None:
    weights, p = TruncatedGaussian(4, decay=0.0), probabilities(seed, 16, 4)
    w, top = weights(p), p.max(1).values
    assert (w[top.argsort()].diff() >= -1e-6).all() and (w[top >= weights.mean] == 1).all()
    assert ((w > 0) & (w <= 1)).all() and (w < 1).any()


@pytest.mark.parametrize("rows", [1, 4])
def test_truncated_gaussian_without_variance_stays_finite(rows: int) -> None:
    weights = TruncatedGaussian(2, decay=0.0)
    w = weights(torch.tensor([[0.75, 0.25]] * rows))
    assert torch.equal(w, torch.ones(rows)) and weights.variance == 0


def test_truncated_gaussian_moves_in_train_mode_only() -> None:
    weights = TruncatedGaussian(4).eval()
    weights(probabilities(0, 8, 4))
    assert weights.mean == 0.25 and weights.variance == 1

"""Barlow Twins against a loop over features, and what it must not see."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck.losses import barlow_twins, cross_correlation


def pair(seed: int, rows: int = 12, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return first, first + torch.randn(rows, width, generator=generator, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), weight=st.floats(0, 2))
def test_it_is_the_double_loop_over_features(seed: int, weight: float) -> None:
    first, second = pair(seed)
    total = torch.zeros(())
    for i in range(5):
        for j in range(5):
            a, b = first[:, i] - first[:, i].mean(), second[:, j] - second[:, j].mean()
            c = (a * b).mean() / ((a.square().mean() + 1e-5) * (b.square().mean() + 1e-5)).sqrt()
            total = total + ((c - 1) ** 2 if i == j else weight * c**2)
    torch.testing.assert_close(barlow_twins(first, second, redundancy_weight=weight), total.double())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_it_is_symmetric_and_blind_to_shift_and_scale(seed: int) -> None:
    first, second = pair(seed)
    loss = barlow_twins(first, second, redundancy_weight=0.5)
    torch.testing.assert_close(barlow_twins(second, first, redundancy_weight=0.5), loss)
    torch.testing.assert_close(barlow_twins(100 * first + 3, second, redundancy_weight=0.5), loss, rtol=1e-3, atol=1e-4)


def test_the_correlation_is_that_of_batchnorm_in_training() -> None:
    first, second = (x.float() for x in pair(0))
    norm = nn.BatchNorm1d(5, affine=False)
    torch.testing.assert_close(cross_correlation(first, second), norm(first).T @ norm(second) / len(first))


def test_equal_uncorrelated_features_have_no_loss() -> None:
    features = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).double() * 1000
    assert barlow_twins(features, features, redundancy_weight=1.0) < 1e-8


def test_a_feature_that_never_changes_gives_finite_gradients() -> None:
    first = torch.ones(6, 3, requires_grad=True)
    barlow_twins(first, torch.ones(6, 3), redundancy_weight=1.0).backward()
    assert first.grad is not None and first.grad.isfinite().all()


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError):
        barlow_twins(torch.randn(4, 3), torch.randn(4, 2), redundancy_weight=1.0)

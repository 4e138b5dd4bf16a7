"""Load balance: zero where it should be, never negative, finite with a gradient at the extremes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses.balance import balance_cv, balance_kl, balance_switch


def logits(seed: int, samples: int = 12, experts: int = 4, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(samples, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_kl_is_torchs_and_never_negative(seed):
    gates = logits(seed).softmax(1).mean(0)
    uniform = torch.full_like(gates, 0.25)
    official = F.kl_div(gates.log(), uniform, reduction="batchmean")  # of a vector: divided by its length
    torch.testing.assert_close(balance_kl(logits(seed), uniform_first=True, mean=True), official)
    assert official >= 0
    other = balance_kl(logits(seed), uniform_first=False, mean=False)
    torch.testing.assert_close(other, (gates * (4 * gates).log()).sum())
    assert 0 <= other <= math.log(4)


@pytest.mark.parametrize("uniform_first", [True, False])
def test_balance_is_zero_where_the_mean_gate_is_uniform(uniform_first):
    sure_of_each = 50 * torch.eye(4).repeat(3, 1)  # every sample is sure, together they use all alike
    for balanced in (torch.zeros(5, 4), sure_of_each):
        assert balance_kl(balanced, uniform_first=uniform_first, mean=True).abs() < 1e-6
        assert balance_cv(balanced) < 1e-5


def test_a_gate_that_is_sure_of_one_expert_gives_a_large_finite_value_with_a_gradient():
    sure = torch.zeros(6, 4)
    sure[:, 2] = 300
    sure.requires_grad_()
    value = balance_kl(sure, uniform_first=True, mean=True)
    (gradient,) = torch.autograd.grad(value, sure)
    assert value > 10 and value.isfinite()
    assert gradient.isfinite().all() and (gradient[:, 2] > 0).all() and (gradient[:, 0] < 0).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_cv_is_deviation_over_mean(seed):
    importance = logits(seed).softmax(1).sum(0)
    torch.testing.assert_close(balance_cv(logits(seed)), importance.std() / importance.mean())
    assert 0 <= balance_cv(logits(seed)) <= 2


def test_cv_of_a_balanced_gate_has_a_finite_gradient():
    balanced = torch.zeros(5, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(balance_cv(balanced), balanced)
    assert torch.equal(gradient, torch.zeros(5, 4))
    with pytest.raises(ValueError, match="at least two experts"):
        balance_cv(torch.zeros(5, 1))


@pytest.mark.parametrize("k", [1, 2])
def test_switch_balance_is_k_where_all_experts_get_alike(k):
    index = torch.stack([torch.arange(12) % 4, (torch.arange(12) + 1) % 4], 1)[:, :k]
    assert abs(float(balance_switch(torch.zeros(12, 4), index)) - k) < 1e-6


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_switch_balance_equals_a_loop_and_leaves_out_what_is_masked(seed):
    gate = logits(seed, samples=6).requires_grad_()
    index = gate.detach().sort(1, descending=True).indices[:, :2]
    mask = torch.tensor([1, 1, 0, 1, 1, 0])
    kept = mask.bool().nonzero().flatten().tolist()
    total = sum(
        4 * (sum(int(index[b, slot] == m) for b in kept) / 4) * sum(gate[b].softmax(0)[m] for b in kept) / 4
        for slot in range(2)
        for m in range(4)
    )
    ours = balance_switch(gate, index, mask_B=mask)
    torch.testing.assert_close(ours, total)
    (gradient,) = torch.autograd.grad(ours, gate)
    assert (gradient[2] == 0).all() and (gradient[5] == 0).all()

"""Facts about distribution alignment."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.labels import AverageAlignment, DistributionAlignment, align

several = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
PRIOR = torch.tensor([0.6, 0.3, 0.1])
MODULES = [DistributionAlignment, AverageAlignment]
each_module = pytest.mark.parametrize("module", MODULES)


def probabilities(seed: int, *shape: int) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).softmax(-1)


@several
@given(seed=seeds, steps=st.integers(1, 6))
def test_queue_alignment_equals_a_list_of_the_last_batches(seed: int, steps: int) -> None:
    alignment = DistributionAlignment(5, length=3)
    past: list[Tensor] = []
    for step in range(steps):
        p = probabilities(seed + step, 8, 5)
        past = [*past, p.mean(0)][-3:]
        expected = p / torch.stack(past).mean(0)
        expected = expected / expected.sum(1, keepdim=True)
        assert torch.allclose(alignment(p), expected, atol=1e-5)


def test_average_alignment_starts_with_the_first_batch_and_then_moves_slowly() -> None:
    alignment = AverageAlignment(5, decay=0.9)
    first, second = probabilities(0, 8, 5), probabilities(1, 8, 5)
    alignment(first)
    assert torch.allclose(alignment.mean, first.mean(0))
    got = alignment(second)
    mean = 0.9 * first.mean(0) + 0.1 * second.mean(0)
    assert torch.allclose(got, align(second, mean, torch.full((5,), 0.2)), atol=1e-6)


@each_module
@several
@given(seed=seeds)
def test_rows_stay_distributions(module: type, seed: int) -> None:
    p = probabilities(seed, 16, 3)
    aligned = module(3, target_C=PRIOR)(p)
    assert (aligned >= 0).all() and torch.allclose(aligned.sum(1), torch.ones(16), atol=1e-5)


@each_module
def test_predictions_that_already_occur_as_the_prior_says_do_not_change(module: type) -> None:
    p = PRIOR.repeat(4, 1)
    assert torch.allclose(module(3, target_C=PRIOR)(p), p, atol=1e-6)
    assert not torch.allclose(module(3)(p), p, atol=1e-2)


def test_equal_rows_become_the_prior() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1]] * 4)
    assert torch.allclose(DistributionAlignment(3)(p), torch.full((4, 3), 1 / 3))
    assert torch.allclose(DistributionAlignment(3, target_C=PRIOR)(p), PRIOR.repeat(4, 1), atol=1e-6)


@each_module
def test_aligning_moves_the_mean_prediction_towards_the_prior(module: type) -> None:
    p = probabilities(0, 256, 3) * torch.tensor([3.0, 1.0, 0.3])
    p = p / p.sum(1, keepdim=True)
    before, after = (p.mean(0) - 1 / 3).abs().sum(), (module(3)(p).mean(0) - 1 / 3).abs().sum()
    assert after < 0.7 * before


@each_module
def test_classes_may_be_permuted(module: type) -> None:
    p, order = probabilities(0, 8, 4), torch.tensor([2, 0, 3, 1])
    assert torch.allclose(module(4)(p)[:, order], module(4)(p[:, order]), atol=1e-6)


@each_module
def test_one_hot_predictions_stay_finite(module: type) -> None:
    p = torch.tensor([[1.0, 0.0, 0.0]] * 4)
    assert torch.equal(module(3)(p), p)


@each_module
def test_eval_mode_remembers_nothing_and_an_empty_memory_changes_nothing(module: type) -> None:
    alignment = module(3, target_C=PRIOR).eval()
    p = probabilities(0, 8, 3)
    assert torch.allclose(alignment(p), p, atol=1e-6) and alignment.seen == 0


@each_module
def test_memory_comes_back_from_a_checkpoint(module: type) -> None:
    alignment, other = module(3), module(3)
    for seed in range(3):
        alignment(probabilities(seed, 8, 3))
    other.load_state_dict(alignment.state_dict())
    p = probabilities(9, 8, 3)
    assert torch.equal(alignment(p), other(p))


@each_module
def test_half_precision_gives_float32_without_gradient(module: type) -> None:
    aligned = module(3)(probabilities(0, 8, 3).half().requires_grad_())
    assert aligned.dtype == torch.float32 and not aligned.requires_grad


@each_module
@pytest.mark.parametrize("prior", [torch.ones(3), torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.5, 0.5])])
def test_a_prior_that_is_no_positive_distribution_is_refused(module: type, prior: Tensor) -> None:
    with pytest.raises(ValueError, match="give 3 positive shares that sum to 1"):
        module(3, target_C=prior)


def test_a_queue_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="length is 0"):
        DistributionAlignment(3, length=0)

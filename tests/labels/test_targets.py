"""Facts about target distributions and what labels are made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.labels import hard, mix_targets, one_hot, pseudo_labels, sharpen, soften

several = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


@several
@given(seed=seeds, classes=st.integers(2, 12), smoothing=st.floats(0, 1))
def test_one_hot_is_a_distribution_with_the_smoothing_spread_over_all_classes(
    seed: int, classes: int, smoothing: float
) -> None:
    labels = torch.randint(classes, (3, 2), generator=torch.Generator().manual_seed(seed))
    expected = (1 - smoothing) * F.one_hot(labels, classes) + smoothing / classes
    target = one_hot(labels, classes, smoothing=smoothing)
    assert target.dtype == torch.float32 and torch.allclose(target, expected, atol=1e-6)


def test_one_hot_cross_entropy_equals_torch_label_smoothing() -> None:
    z, labels = logits(0, 6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    ours = -(one_hot(labels, 5, smoothing=0.1) * z.log_softmax(1)).sum(1).mean()
    assert torch.allclose(ours, F.cross_entropy(z, labels, label_smoothing=0.1))


def test_a_label_out_of_range_or_smoothing_outside_zero_one_is_refused() -> None:
    with pytest.raises((RuntimeError, IndexError)):
        one_hot(torch.tensor([3]), 3)
    with pytest.raises(ValueError, match="smoothing is 1.5"):
        one_hot(torch.tensor([0]), 3, smoothing=1.5)


@several
@given(seed=seeds, temperature=st.floats(1.1, 20))
def test_soften_raises_and_sharpen_lowers_the_entropy_and_neither_moves_the_argmax(
    seed: int, temperature: float
) -> None:
    z = logits(seed, 4, 6)
    p = z.softmax(-1)
    soft, sharp = soften(z, temperature), sharpen(p, 1 / temperature)
    assert (entropy(soft) >= entropy(p) - 1e-5).all() and (entropy(sharp) <= entropy(p) + 1e-5).all()
    for q in (soft, sharp):
        assert torch.allclose(q.sum(-1), torch.ones(4), atol=1e-5) and torch.equal(hard(q), hard(p))


@several
@given(seed=seeds, temperature=st.floats(0.1, 10))
def test_sharpening_probabilities_equals_softening_their_logits(seed: int, temperature: float) -> None:
    z = logits(seed, 4, 6)
    assert torch.allclose(sharpen(z.softmax(-1), temperature), soften(z, temperature), atol=1e-4)


def test_sharpen_keeps_zeros_and_one_hot_rows() -> None:
    p = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    assert torch.equal(sharpen(p, 0.1), p)


@pytest.mark.parametrize("function", [soften, sharpen])
def test_half_precision_and_extremes_give_float32_distributions(function) -> None:
    x = torch.tensor([[6e4, -6e4, 0.0]]).half()
    x = x if function is soften else x.softmax(-1)
    q = function(x, 0.01)
    assert q.dtype == torch.float32 and torch.allclose(q, torch.tensor([[1.0, 0, 0]]))
    with pytest.raises(ValueError, match="must be positive"):
        function(x, 0)


@several
@given(seed=seeds, share=st.floats(0, 1))
def test_mixed_targets_are_distributions_and_the_ends_are_the_targets(seed: int, share: float) -> None:
    first, second = logits(seed, 4, 6).softmax(-1), logits(seed + 1, 4, 6).softmax(-1)
    assert torch.allclose(mix_targets(first, second, share).sum(-1), torch.ones(4), atol=1e-5)
    assert torch.equal(mix_targets(first, second, 0.0), first)
    assert torch.equal(mix_targets(first, second, 1.0), second)


def test_the_label_stays_the_argmax_of_a_mix_with_less_than_half_of_the_prediction() -> None:
    labels, wrong = torch.tensor([0, 1, 2]), one_hot(torch.tensor([1, 2, 0]), 3)
    assert torch.equal(hard(mix_targets(one_hot(labels, 3), wrong, 0.49)), labels)
    assert not torch.equal(hard(mix_targets(one_hot(labels, 3), wrong, 0.51)), labels)


def test_a_share_per_item_mixes_each_row_by_its_own() -> None:
    first, second = torch.zeros(2, 3), torch.ones(2, 3)
    assert mix_targets(first, second, torch.tensor([0.25, 0.75])).tolist() == [[0.25] * 3, [0.75] * 3]


def test_targets_that_would_broadcast_or_a_share_outside_zero_one_are_refused() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        mix_targets(torch.ones(2, 3), torch.ones(1, 3), 0.5)
    with pytest.raises(ValueError, match="share is 2"):
        mix_targets(torch.ones(2, 3), torch.ones(2, 3), 2.0)


def test_pseudo_labels_are_constants_and_kept_with_weight_one_by_default() -> None:
    p = logits(0, 2, 3, 4).softmax(-1).requires_grad_()
    soft, sure = pseudo_labels(p, hard=False), pseudo_labels(p, hard=True)
    assert not soft.target.requires_grad and torch.equal(soft.target, p.detach())
    assert torch.equal(sure.target, p.argmax(-1)) and sure.target.dtype == torch.int64
    assert sure.mask.dtype == torch.bool and sure.mask.all() and torch.equal(sure.weight, torch.ones(2, 3))


def test_pseudo_labels_refuse_a_mask_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"one value per item, \(4,\)"):
        pseudo_labels(torch.ones(4, 3), hard=True, mask=torch.ones(4, 1))

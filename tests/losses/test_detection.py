"""GIoU against hand-computed cases and its own bounds."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import generalized_iou, giou_loss


def boxes(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(6, 2, generator=generator, dtype=torch.float64) * 10
    return torch.cat([corner, corner + 0.1 + torch.rand(6, 2, generator=generator, dtype=torch.float64) * 5], -1)


def test_equal_boxes_cost_nothing_and_disjoint_ones_more_than_one():
    box = torch.tensor([[0.0, 0, 10, 10]])
    assert giou_loss(box, box, reduction="mean") == 0
    assert giou_loss(box, box + 20, reduction="mean") > 1


def test_the_value_is_that_of_the_definition():
    first, second = torch.tensor([0.0, 0, 4, 4]), torch.tensor([2.0, 2, 6, 6])
    # intersection 4, union 28, hull 36
    torch.testing.assert_close(generalized_iou(first, second), torch.tensor(4 / 28 - 8 / 36))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_it_is_symmetric_within_its_bounds_and_has_the_right_gradient(seed):
    first, second = boxes(seed), boxes(seed + 1)
    value = generalized_iou(first, second)
    torch.testing.assert_close(value, generalized_iou(second, first))
    assert ((value >= -1) & (value <= 1)).all()
    torch.autograd.gradcheck(lambda b: giou_loss(b, second, reduction="none"), first.requires_grad_(), atol=1e-4)


def test_disjoint_boxes_are_pulled_together():
    box = torch.tensor([[0.0, 0, 1, 1]], requires_grad=True)
    giou_loss(box, torch.tensor([[5.0, 0, 6, 1]]), reduction="mean").backward()
    assert box.grad[0, 2] < 0  # growing to the right lowers the loss


def test_weights_masks_and_empty_boxes_follow_the_rules_of_reductions():
    first, second = torch.tensor([[0.0, 0, 1, 1], [3, 3, 2, 2]]), torch.tensor([[5.0, 0, 6, 1], [0, 0, 1, 1]])
    items = giou_loss(first, second, reduction="none")
    assert items.isfinite().all()
    masked = giou_loss(
        first, second, reduction="mean", weight=torch.tensor([0.5, 1.0]), mask=torch.tensor([True, False])
    )
    torch.testing.assert_close(masked, 0.5 * items[0])
    empty = torch.zeros(0, 4, requires_grad=True)
    assert giou_loss(empty, torch.zeros(0, 4), reduction="mean") == 0

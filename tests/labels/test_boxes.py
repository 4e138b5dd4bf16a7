"""Pseudo boxes. Shapes: B images, M boxes, J copies."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.labels import (
    confident_boxes,
    jitter_boxes,
    jitter_variance,
    merge_boxes,
    score_thresholds,
    uncovered,
)


def test_the_score_threshold_is_strict_and_padding_never_passes():
    scores = torch.tensor([[0.7, 0.71, 0.9]])
    assert confident_boxes(scores, torch.tensor([[0, 0, -1]]), 0.7).tolist() == [[False, True, False]]


def test_each_class_may_have_its_own_threshold():
    scores, labels = torch.tensor([[0.6, 0.6, 0.6]]), torch.tensor([[0, 1, -1]])
    assert confident_boxes(scores, labels, torch.tensor([0.5, 0.7])).tolist() == [[True, False, False]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_class_thresholds_leave_as_many_as_asked_for_of_each_class(seed):
    generator = torch.Generator().manual_seed(seed)
    scores, labels = torch.rand(60, generator=generator), torch.randint(-1, 3, (60,), generator=generator)
    keep = torch.tensor([2, 5, 1000])
    thresholds = score_thresholds(scores, labels, 3, keep, floor=0.05)
    for label in range(3):
        own = scores[labels == label]
        kept = (own > thresholds[label]).sum()
        assert kept == min(keep[label], (own > 0.05).sum()) and thresholds[label] >= 0.05


def test_merged_sets_hold_all_real_boxes_before_padding():
    first = (torch.tensor([[[1.0] * 4, [0.0] * 4]]), torch.tensor([[0.9, 0.0]]), torch.tensor([[2, -1]]))
    second = (torch.tensor([[[3.0] * 4]]), torch.tensor([[0.8]]), torch.tensor([[1]]))
    boxes, scores, labels = merge_boxes(first, second)
    assert labels.tolist() == [[2, 1, -1]]
    assert boxes[0, :, 0].tolist() == [1, 3, 0] and scores[0, 1] == torch.tensor(0.8)


def test_a_box_is_uncovered_up_to_and_with_the_limit_and_padding_covers_nothing():
    iou = torch.tensor([[[0.4, 0.9], [0.41, 0.0], [0.1, 0.3]]])
    assert uncovered(iou, torch.tensor([[0, -1]]), 0.4).tolist() == [[True, False, True]]
    assert uncovered(torch.zeros(1, 2, 0), torch.zeros(1, 0).long(), 0.4).tolist() == [[True, True]]


def test_jitter_has_the_asked_spread_relative_to_the_size():
    torch.manual_seed(0)
    boxes = torch.tensor([[[10.0, 20, 110, 70], [5.0, 5, 5.5, 5.5]]])
    copies = jitter_boxes(boxes, copies=4000, scale=0.06)
    expected = torch.tensor([[6.0, 3, 6, 3], [0.06] * 4])  # sizes below a pixel count as one
    torch.testing.assert_close(copies.std(2)[0], expected, rtol=0.1, atol=0.0)
    torch.testing.assert_close(copies.mean(2), boxes, rtol=0.05, atol=0.5)


def test_a_regressor_that_ignores_its_input_has_no_variance():
    constant = torch.tensor([3.0, 4, 30, 40]).expand(1, 2, 10, 4)
    assert not jitter_variance(constant).any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.floats(1.0, 20.0))
def test_variance_is_the_unbiased_spread_over_size_and_does_not_see_the_scale_of_the_picture(seed, factor):
    torch.manual_seed(seed)
    boxes = torch.tensor([[[10.0, 20, 110, 70]]])
    copies = jitter_boxes(boxes, 10, 0.06)
    u = jitter_variance(copies)
    mean = copies[0, 0].mean(0)
    width, height = mean[2] - mean[0], mean[3] - mean[1]
    by_hand = (((copies[0, 0] - mean) ** 2).sum(0) / 9).sqrt() / torch.stack([width, height, width, height])
    torch.testing.assert_close(u[0, 0], by_hand.mean())
    torch.testing.assert_close(jitter_variance(copies * factor), u, rtol=1e-3, atol=1e-5)


def test_variance_grows_with_the_jitter():
    torch.manual_seed(0)
    boxes = torch.tensor([[[10.0, 20, 110, 70]]]).expand(1, 50, 4)
    spreads = [jitter_variance(jitter_boxes(boxes, 10, scale)).mean() for scale in (0.02, 0.06, 0.2)]
    assert spreads[0] < spreads[1] < spreads[2]

"""RoIAlign against a loop that follows its published semantics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.models.detection import roi_align


def looped_value(map_hw: Tensor, y: float, x: float) -> float:
    """Bilinear interpolation at an index place; 0 more than one pixel outside, the border's value within."""
    height, width = map_hw.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    y0, x0 = math.floor(y), math.floor(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    dy, dx = y - y0, x - x0
    top = map_hw[y0, x0] * (1 - dx) + map_hw[y0, x1] * dx
    return float(top * (1 - dy) + (map_hw[y1, x0] * (1 - dx) + map_hw[y1, x1] * dx) * dy)


def looped_roi_align(map_Chw: Tensor, box: Tensor, stride: float, bins: int, ratio: int) -> Tensor:
    x1, y1, x2, y2 = (float(value) / stride - 0.5 for value in box)  # the half pixel
    out = torch.zeros(len(map_Chw), bins, bins)
    height, width = (y2 - y1) / bins, (x2 - x1) / bins
    for c in range(len(map_Chw)):
        for i in range(bins):
            for j in range(bins):
                values = [
                    looped_value(
                        map_Chw[c], y1 + (i + (a + 0.5) / ratio) * height, x1 + (j + (b + 0.5) / ratio) * width
                    )
                    for a in range(ratio)
                    for b in range(ratio)
                ]
                out[c, i, j] = sum(values) / ratio**2
    return out


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), ratio=st.integers(1, 3), bins=st.integers(1, 4), stride=st.sampled_from([1, 4]))
def test_it_is_the_published_operator_inside_on_and_beyond_the_border(seed, ratio, bins, stride):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 2, 5, 7, generator=generator)
    corner = (torch.rand(2, 3, 2, generator=generator) * 12 - 4) * stride
    boxes = torch.cat([corner, corner + torch.rand(2, 3, 2, generator=generator) * 8 * stride], -1)
    pooled = roi_align(features, boxes, stride, bins, ratio)
    for b in range(2):
        for r in range(3):
            expected = looped_roi_align(features[b], boxes[b, r], stride, bins, ratio)
            torch.testing.assert_close(pooled[b, r], expected, rtol=1e-3, atol=1e-4)


def test_a_box_around_one_cell_reads_exactly_that_cell():
    features = torch.arange(12.0).view(1, 1, 3, 4)
    box = torch.tensor([[[8.0, 4.0, 12.0, 8.0]]])  # column 2, row 1 at stride 4
    assert roi_align(features, box, 4, 1, 1).item() == 6.0


def test_bins_over_whole_cells_are_those_cells_and_finer_sampling_averages():
    features = torch.arange(16.0).view(1, 1, 4, 4)
    box = torch.tensor([[[0.0, 0.0, 4.0, 4.0]]])
    torch.testing.assert_close(roi_align(features, box, 1, 4, 1)[0, 0, 0], features[0, 0])
    # 2x2 bins with 2x2 points each: every point is a cell's centre
    expected = torch.tensor([[2.5, 4.5], [10.5, 12.5]])
    torch.testing.assert_close(roi_align(features, box, 1, 2, 2)[0, 0, 0], expected)


def test_a_constant_map_pools_to_the_constant_anywhere_inside():
    features = torch.full((1, 1, 6, 6), 3.0)
    boxes = torch.tensor([[[0.3, 1.7, 5.9, 4.4], [2.0, 2.0, 2.0, 2.0]]])
    assert roi_align(features, boxes, 1, 3, 2).unique().tolist() == pytest.approx([3.0])


def test_the_gradient_goes_to_the_features_and_not_to_the_boxes():
    features = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[[0.5, 0.5, 4.2, 3.9]]], dtype=torch.float64, requires_grad=True)
    roi_align(features, boxes, 1, 2, 2).sum().backward()
    assert features.grad is not None and features.grad.sum().item() == pytest.approx(2 * 4, rel=1e-5)
    assert boxes.grad is None

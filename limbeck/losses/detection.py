"""Losses of boxes. Reductions, weights and masks are those of `limbeck.losses.reduction`; everything in float32.

The losses that a detector trains by are the detector's own (`limbeck.models.detection`): systems change their weights.
Shapes: N boxes, ... any dimensions; boxes are (x1, y1, x2, y2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reduction import Reduction, check_same_shape, reduce, upcast


def generalized_iou(boxes: Tensor, targets: Tensor, eps: float = 1e-6) -> Tensor:
    """GIoU of boxes [..., 4] with their targets, pair by pair, [...] in [-1, 1]: IoU - (hull - union) / hull.

    hull is the area of the smallest box around both. Differentiable, disjoint boxes included. `eps` is the least area
    of union and hull. Boxes with x2 < x1 count as empty. Equal shapes, or ValueError.
    Source: Rezatofighi et al. 2019, algorithm 1.
    """
    check_same_shape(boxes, targets)
    boxes, targets = upcast(boxes), upcast(targets)
    low, high = torch.maximum(boxes[..., :2], targets[..., :2]), torch.minimum(boxes[..., 2:], targets[..., 2:])
    intersection = _area(low, high)
    union = _area(boxes[..., :2], boxes[..., 2:]) + _area(targets[..., :2], targets[..., 2:]) - intersection
    hull = _area(
        torch.minimum(boxes[..., :2], targets[..., :2]), torch.maximum(boxes[..., 2:], targets[..., 2:])
    ).clamp(min=eps)
    return intersection / union.clamp(min=eps) - (hull - union) / hull


def giou_loss(
    boxes: Tensor,
    targets: Tensor,
    *,
    eps: float = 1e-6,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """1 - GIoU per pair of boxes, in [0, 2]: 0 for equal boxes, above 1 for disjoint ones."""
    return reduce(1 - generalized_iou(boxes, targets, eps), reduction=reduction, weight=weight, mask=mask)


def _area(low: Tensor, high: Tensor) -> Tensor:
    size = (high - low).clamp(min=0)
    return size[..., 0] * size[..., 1]

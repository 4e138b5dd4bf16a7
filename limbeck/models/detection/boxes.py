"""Box geometry, the box coder, non-maximum suppression and anchors; everything batched over images.

Shapes: B images, N and M boxes of an image (padded), A anchors, H height and W width in pixels, ... any dimensions.
A box is (x1, y1, x2, y2) in pixels with continuous coordinates: its width is x2 - x1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
MAX_LOG_SCALE = math.log(1000 / 16)  # a box grows at most this much, before exp
PAIRS_AT_ONCE = 1 << 24  # of boxes whose overlaps are held as floats at one time


def box_area(boxes: Tensor) -> Tensor:
    """(x2 - x1)(y2 - y1) of boxes [..., 4], as [...]; 0 for a box without width or height."""
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def clip_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes [..., 4] cut at the picture's edges."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], -1)


def pairwise_iou(first_BN4: Tensor, second_BM4: Tensor) -> Tensor:
    """Intersection over union of every pair, [..., N, M] in [0, 1]; 0 where both are without area."""
    ax1, ay1, ax2, ay2 = first_BN4[..., :, None, :].unbind(-1)
    bx1, by1, bx2, by2 = second_BM4[..., None, :, :].unbind(-1)
    shared_width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    shared_height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection = shared_width * shared_height
    union = box_area(first_BN4)[..., :, None] + box_area(second_BM4)[..., None, :] - intersection
    return intersection / union.clamp(min=1e-9)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = DELTA_WEIGHTS) -> Tensor:
    """The deltas [..., 4] that `decode_boxes` turns, from `anchors`, into `boxes`.

    With centre c, size s: (10 (cx - ax) / aw, 10 (cy - ay) / ah, 5 log(w / aw), 5 log(h / ah)) for the default weights.
    Sizes below a thousandth of a pixel (padding) count as that, so that the deltas stay finite.

    Source: R-CNN (Girshick et al. 2014, appendix C); weights as in Faster R-CNN's RoI head.
    """
    centre, size = _centre_size(boxes)
    anchor_centre, anchor_size = _centre_size(anchors)
    move = (centre - anchor_centre) / anchor_size
    return torch.cat([move, (size / anchor_size).log()], -1) * boxes.new_tensor(weights)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: Sequence[float] = DELTA_WEIGHTS) -> Tensor:
    """Boxes [..., 4] = `anchors` moved and scaled by `deltas` (broadcast); not clipped to a picture.

    The log scales are capped at log(1000 / 16) before the exponential.
    """
    deltas = deltas.float() / deltas.new_tensor(weights, dtype=torch.float32)
    centre, size = _centre_size(anchors)
    centre = centre + deltas[..., :2] * size
    half = deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() * size / 2
    return torch.cat([centre - half, centre + half], -1)


def _centre_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)
    return boxes[..., :2] + size / 2, size


def nms(boxes_BN4: Tensor, scores_BN: Tensor, threshold: float, labels_BN: Tensor | None = None) -> Tensor:
    """Which boxes greedy non-maximum suppression keeps, bool [B, N].

    From the highest score on, a kept box suppresses every later one of its image whose IoU with it is above
    `threshold`. With `labels_BN` only boxes of one class suppress each other (each class is moved to a place of its
    own). Boxes with a score of -inf (padding) are never kept and suppress nothing. Ties go to the earlier box.

    All images and boxes at once: keep_j = not any(keep_i and i suppresses j), iterated from all-True until nothing
    changes, has greedy suppression as its only fixed point and reaches it after as many rounds as its longest chain
    (Cluster-NMS, Zheng et al. 2020, section 3.3). The host looks at the device once a round.
    """
    if labels_BN is not None:
        reach = boxes_BN4.abs().amax() * 2 + 1
        boxes_BN4 = boxes_BN4 + (labels_BN.clamp(min=0) * reach)[..., None]
    order_BN = scores_BN.argsort(dim=1, descending=True, stable=True)
    sorted_BN4 = boxes_BN4.gather(1, order_BN[..., None].expand(-1, -1, 4))
    real_BN = scores_BN.gather(1, order_BN) > -torch.inf
    suppress_BNN = _suppression(sorted_BN4, threshold)
    keep_BN = real_BN
    while True:
        kept_BN = real_BN & ~(suppress_BNN & keep_BN[:, :, None]).any(1)
        if torch.equal(kept_BN, keep_BN):
            break
        keep_BN = kept_BN
    return torch.zeros_like(keep_BN).scatter(1, order_BN, keep_BN)


def _suppression(sorted_BN4: Tensor, threshold: float) -> Tensor:
    """bool [B, N, N]: box i, which comes before j, overlaps it by more than `threshold`."""
    images = max(1, PAIRS_AT_ONCE // max(1, sorted_BN4.shape[1] ** 2))
    return torch.cat([(pairwise_iou(part, part) > threshold).triu(1) for part in sorted_BN4.split(images)])


def best(scores_BN: Tensor, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The `count` highest scores of each image, [B, min(count, N)], and the same rows of `tensors` [B, N, ...]."""
    top_BK, rows_BK = scores_BN.topk(min(count, scores_BN.shape[1]), dim=1)
    return top_BK, *(take_rows(tensor, rows_BK) for tensor in tensors)


def take_rows(values_BN: Tensor, rows_BK: Tensor) -> Tensor:
    """values[b, rows[b, k]]: [B, N, ...] to [B, K, ...]."""
    inner = values_BN.shape[2:]
    index = rows_BK.reshape(*rows_BK.shape, *[1] * len(inner)).expand(*rows_BK.shape, *inner)
    return values_BN.gather(1, index)


def anchor_grid(
    height: int, width: int, stride: int, sizes: Sequence[float], ratios: Sequence[float], device: torch.device
) -> Tensor:
    """Anchors [height * width * sizes * ratios, 4] of a feature map, position by position, in pixels.

    An anchor of size s and ratio r (height over width) has the area s^2; its centre is the centre of the feature's
    cell, (column + 1/2) * stride.
    """
    s = torch.tensor(sizes, device=device, dtype=torch.float32)[:, None]
    r = torch.tensor(ratios, device=device, dtype=torch.float32).sqrt()
    half = torch.stack([s / r, s * r], -1).reshape(-1, 2) / 2
    y = (torch.arange(height, device=device) + 0.5) * stride
    x = (torch.arange(width, device=device) + 0.5) * stride
    centre = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 1, 2)
    return torch.cat([centre - half, centre + half], -1).reshape(-1, 4)

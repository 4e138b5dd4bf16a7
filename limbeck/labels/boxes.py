"""Pseudo boxes: which of a teacher's detections become targets, and how sure their places are.

Everything is padded: B images, N and M boxes of an image (label -1 where there is none), K classes, J jittered copies.
Boxes are (x1, y1, x2, y2) in pixels. All functions are constants of the graph: no gradient flows through them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def confident_boxes(scores_BM: Tensor, labels_BM: Tensor, threshold: float | Tensor) -> Tensor:
    """bool [B, M]: detections with a score strictly above `threshold`, a number or one for each class [K]."""
    if isinstance(threshold, Tensor):
        threshold = threshold[labels_BM.clamp(min=0)]
    return (scores_BM.detach() > threshold) & (labels_BM >= 0)


def score_thresholds(scores_N: Tensor, labels_N: Tensor, num_classes: int, keep: Tensor, floor: float) -> Tensor:
    """Thresholds [K] that leave the `keep[k]` best detections of each class k, never below `floor`.

    `scores_N` and `labels_N` (-1 pads) are a teacher's detections on a whole set; where a class has no more detections
    than it may keep, its threshold is `floor`. Class-wise thresholds keep rare classes from being crowded out by one
    number for all.
    """
    thresholds = []
    for label in range(num_classes):
        own = scores_N.masked_fill(labels_N != label, -1.0).sort(descending=True).values
        wanted = int(keep[label])
        thresholds.append(own[wanted] if wanted < len(own) else own.new_tensor(floor))
    return torch.stack(thresholds).clamp(min=floor)


def merge_boxes(
    first: tuple[Tensor, Tensor, Tensor], second: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Two padded sets (boxes [B, N, 4], scores [B, N], labels [B, N]) as one, real boxes before padding.

    Nothing is suppressed: run class-wise suppression on the result where the sets may hold the same object.
    """
    boxes, scores, labels = (torch.cat(parts, 1) for parts in zip(first, second, strict=True))
    order = (labels < 0).long().argsort(dim=1, stable=True)
    return boxes.gather(1, order[..., None].expand_as(boxes)), scores.gather(1, order), labels.gather(1, order)


def uncovered(iou_BNM: Tensor, labels_BM: Tensor, limit: float) -> Tensor:
    """bool [B, N]: boxes whose largest IoU with real ones of the M is at most `limit`; all where there is none."""
    if iou_BNM.shape[-1] == 0:
        return torch.ones(iou_BNM.shape[:2], dtype=torch.bool, device=iou_BNM.device)
    return iou_BNM.masked_fill((labels_BM < 0)[:, None], 0.0).amax(-1) <= limit


def jitter_boxes(boxes_BM4: Tensor, copies: int = 10, scale: float = 0.06) -> Tensor:
    """Copies [B, M, J, 4] of each box with Gaussian noise, std `scale` times the width (x) or height (y), at least 1.

    Not clipped. Source: box jittering of Soft Teacher (Xu et al. 2021, section 3.3) as in its official code.
    """
    std_BM14 = scale * _edges(boxes_BM4)[..., None, :]
    noise = torch.randn(*boxes_BM4.shape[:2], copies, 4, device=boxes_BM4.device)
    return boxes_BM4.detach()[..., None, :] + noise * std_BM14


def jitter_variance(regressed_BMJ4: Tensor) -> Tensor:
    """How far a box moves when its input is jittered, u [B, M]; smaller is more reliable.

    u = mean over the 4 coordinates of std_J(coordinate) / size, the unbiased standard deviation over the copies of the
    regressed boxes and the width or height (at least 1) of their mean. Unchanged when the picture is rescaled.
    """
    regressed_BMJ4 = regressed_BMJ4.detach().float()
    return (regressed_BMJ4.std(2) / _edges(regressed_BMJ4.mean(2))).mean(-1)


def _edges(boxes: Tensor) -> Tensor:
    """(w, h, w, h) of boxes [..., 4], at least 1."""
    size = (boxes[..., 2:] - boxes[..., :2]).detach().clamp(min=1)
    return torch.cat([size, size], -1)

"""Which target each anchor or proposal is trained on, and which of them are trained at all.

Shapes: B images, N candidates (anchors, proposals), M targets of an image (padded, label -1), S sampled candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.models.detection.boxes import pairwise_iou, take_rows

IGNORED, BACKGROUND = -2, -1


class Targets(NamedTuple):
    """True or pseudo boxes of B images: `boxes` [B, M, 4] in pixels, `labels` int64 [B, M], -1 where padding."""

    boxes: Tensor
    labels: Tensor

    @property
    def valid(self) -> Tensor:
        """bool [B, M]: what is no padding."""
        return self.labels >= 0


class Sampled(NamedTuple):
    """The S regions of each image that the RoI head is trained on.

    `boxes` [B, S, 4]; `labels` [B, S]: the class of the matched target, `num_classes` for background, -1 in empty
    slots; `matched` [B, S]: the target's number within its image (0 for background); `target_boxes` [B, S, 4].
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    target_boxes: Tensor

    def foreground(self, num_classes: int) -> Tensor:
        """bool [B, S]: regions that are matched to a target of a class below `num_classes`."""
        return (self.labels >= 0) & (self.labels < num_classes)


def match(
    iou_BNM: Tensor,
    valid_BM: Tensor,
    foreground: float,
    background: float | None = None,
    *,
    best_for_target: bool = False,
) -> Tensor:
    """The number of the target that each candidate is matched to, [B, N]; `BACKGROUND` or `IGNORED` where none.

    A candidate takes the target that it overlaps most: from `foreground` on (inclusive) it is matched, below
    `background` (default: `foreground`) it is background, between them ignored. With `best_for_target` every target
    also gets the candidates that overlap it most (ties and all), however little, if at all; they keep the target that
    they themselves overlap most, as Faster R-CNN's RPN does. Without targets everything is background.
    """
    iou_BNM = iou_BNM.masked_fill(~valid_BM[:, None], -1.0)
    if iou_BNM.shape[-1] == 0:
        return torch.full(iou_BNM.shape[:2], BACKGROUND, device=iou_BNM.device)
    most_BN, target_BN = iou_BNM.max(-1)
    low = foreground if background is None else background
    matched_BN = target_BN.masked_fill(most_BN < foreground, IGNORED).masked_fill(most_BN < low, BACKGROUND)
    if best_for_target:
        highest_BM = iou_BNM.amax(1)
        is_best_BNM = (iou_BNM == highest_BM[:, None]) & (highest_BM > 0)[:, None]
        matched_BN = torch.where(is_best_BNM.any(-1), target_BN, matched_BN)
    return matched_BN


def balanced_sample(matched_BN: Tensor, count: int, positive_share: float) -> Tensor:
    """A random choice of at most `count` candidates of each image, bool [B, N].

    At most `positive_share` * `count` matched ones, and as much background as then fits; never an ignored one. Draws
    one number a candidate from torch's global generator, whatever the matches are.
    """
    positive_BN, negative_BN = matched_BN >= 0, matched_BN == BACKGROUND
    order_BN = torch.rand(matched_BN.shape, device=matched_BN.device)
    chosen_BN = positive_BN & (_rank(order_BN, positive_BN) < int(count * positive_share))
    rest_B1 = count - chosen_BN.sum(1, keepdim=True)
    return chosen_BN | (negative_BN & (_rank(order_BN, negative_BN) < rest_B1))


def _rank(order_BN: Tensor, among_BN: Tensor) -> Tensor:
    """The place of each candidate in the random order among those of its kind."""
    return order_BN.masked_fill(~among_BN, 2.0).argsort(1).argsort(1)


def sample_regions(
    proposals_BN4: Tensor,
    valid_BN: Tensor,
    targets: Targets,
    *,
    num_classes: int,
    count: int = 512,
    positive_share: float = 0.25,
    iou: float = 0.5,
    append_targets: bool = True,
) -> Sampled:
    """Match proposals to targets at `iou` and sample `count` regions of each image, foreground first.

    `append_targets` puts the targets themselves among the proposals, so that early training sees foreground.
    """
    if append_targets:
        proposals_BN4 = torch.cat([proposals_BN4, targets.boxes.to(proposals_BN4)], 1)
        valid_BN = torch.cat([valid_BN, targets.valid], 1)
    matched_BN = match(pairwise_iou(proposals_BN4, targets.boxes), targets.valid, iou)
    matched_BN = matched_BN.masked_fill(~valid_BN, IGNORED)
    return gather_regions(
        proposals_BN4, matched_BN, balanced_sample(matched_BN, count, positive_share), targets, num_classes, count
    )


def gather_regions(
    proposals_BN4: Tensor, matched_BN: Tensor, chosen_BN: Tensor, targets: Targets, num_classes: int, count: int
) -> Sampled:
    """The chosen proposals with what they are matched to; foreground first, empty slots (label -1) last."""
    kind_BN = chosen_BN.int() + (chosen_BN & (matched_BN >= 0)).int()
    kind_BS, rows_BS = kind_BN.topk(min(count, kind_BN.shape[1]), dim=1)
    boxes_BS4 = take_rows(proposals_BN4, rows_BS)
    matched_BS = take_rows(matched_BN, rows_BS).clamp(min=0)
    if targets.labels.shape[1] == 0:
        labels_BS, target_BS4 = torch.full_like(kind_BS, num_classes, dtype=torch.long), boxes_BS4
    else:
        labels_BS = take_rows(targets.labels, matched_BS).masked_fill(kind_BS < 2, num_classes)
        target_BS4 = take_rows(targets.boxes.to(boxes_BS4), matched_BS)
    return Sampled(boxes_BS4, labels_BS.masked_fill(kind_BS == 0, -1), matched_BS, target_BS4)

"""The training losses of a two-stage detector, as pure functions of its outputs.

They live beside the network, as transformers' and torchvision's detectors keep theirs, because `Detector.losses` is
part of what every detector answers. Weights and normalisers are arguments: semi-supervised systems change them.

Shapes: B images, A anchors, M targets, S sampled regions, K classes (K is background).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.models.detection.assign import Sampled, Targets
from limbeck.models.detection.boxes import encode_boxes, take_rows

RPN_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


def rpn_losses(
    logits_BA: Tensor,
    deltas_BA4: Tensor,
    anchors_A4: Tensor,
    matched_BA: Tensor,
    chosen_BA: Tensor,
    targets: Targets,
    *,
    normalizer: float,
) -> tuple[Tensor, Tensor]:
    """(objectness, box): binary cross-entropy over the chosen anchors, L1 of the deltas over the matched ones.

    Both are sums divided by `normalizer`, which is images times anchors sampled per image, whether or not as many were
    found (detectron2). float32; gradient to logits and deltas.
    """
    positive_BA = matched_BA >= 0
    bce_BA = F.binary_cross_entropy_with_logits(logits_BA.float(), positive_BA.float(), reduction="none")
    objectness = torch.where(chosen_BA, bce_BA, 0.0).sum() / normalizer
    if targets.labels.shape[1] == 0:
        return objectness, deltas_BA4.float().sum() * 0.0
    wanted_BA4 = take_rows(targets.boxes, matched_BA.clamp(min=0))
    wanted_BA4 = encode_boxes(wanted_BA4, anchors_A4, RPN_WEIGHTS)
    l1_BA = (deltas_BA4.float() - wanted_BA4).abs().sum(-1)
    return objectness, torch.where(chosen_BA & positive_BA, l1_BA, 0.0).sum() / normalizer


def region_losses(
    logits_BSC: Tensor,
    deltas_BSK4: Tensor,
    sampled: Sampled,
    *,
    class_weight_BS: Tensor | None = None,
    class_normalizer: Tensor | float | None = None,
    box_normalizer: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """(class, box): cross-entropy over K classes and background, L1 of the matched class's deltas on foreground.

    class = sum_i w_i CE_i / n over regions with a label in 0..K; others (-1 for empty slots, above K for an unknown
    class) contribute nothing. box = sum over foreground of the L1 over 4 deltas / m. Both n and m default to the number
    of regions that count in the class loss, at least 1. A class-agnostic head has deltas [B, S, 1, 4].
    Source: Fast R-CNN (Girshick 2015, section 2.3) as in detectron2 with smooth-L1 beta 0.
    """
    num_classes = logits_BSC.shape[-1] - 1
    counted_BS = (sampled.labels >= 0) & (sampled.labels <= num_classes)
    label_BS = sampled.labels.masked_fill(~counted_BS, num_classes)
    ce_BS = F.cross_entropy(logits_BSC.float().flatten(0, 1), label_BS.flatten(), reduction="none").view_as(label_BS)
    if class_weight_BS is not None:
        ce_BS = ce_BS * class_weight_BS
    count = counted_BS.sum().clamp(min=1)
    n = count if class_normalizer is None else class_normalizer
    m = count if box_normalizer is None else box_normalizer
    class_loss = torch.where(counted_BS, ce_BS, 0.0).sum() / n
    foreground_BS = counted_BS & (label_BS < num_classes)
    own_BS4 = deltas_of(deltas_BSK4, label_BS).float()
    wanted_BS4 = encode_boxes(sampled.target_boxes, sampled.boxes)
    l1_BS = (own_BS4 - wanted_BS4).abs().sum(-1)
    return class_loss, torch.where(foreground_BS, l1_BS, 0.0).sum() / m


def deltas_of(deltas_BSK4: Tensor, label_BS: Tensor) -> Tensor:
    """The deltas [B, S, 4] of each region's class; of any class for background, the only ones of an agnostic head."""
    classes = deltas_BSK4.shape[2]
    index = label_BS.clamp(0, classes - 1)[..., None, None].expand(-1, -1, 1, 4)
    return deltas_BSK4.gather(2, index).squeeze(2)

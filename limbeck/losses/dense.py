"""Losses of dense outputs: one class a pixel, some pixels ignored.

Letters: B samples, C classes or channels, H height, W width, R regions.

A mask is a class number a pixel, [B, H, W]; pixels of value `ignore_index` (255) carry no loss and no gradient.
`reduction` and `weight`: see `limbeck.losses.reduction`; an item is a pixel, so "mean" is the mean over the pixels
that are kept, and exactly 0 where none is. Computed in float32 (float64 stays). ValueError: shapes that do not fit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergence import kl_divergence
from .reduction import Reduction, reduce, upcast

IGNORE = 255


def pixel_cross_entropy(
    logits_BCHW: Tensor,
    mask_BHW: Tensor,
    *,
    reduction: Reduction,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE,
    count_ignored: bool = False,
) -> Tensor:
    """Cross-entropy with the mask's class at every pixel: -log softmax(logits)[mask].

    weight: one per pixel [B, H, W] or per sample [B]; never part of the divisor. count_ignored: "mean" divides by all
    pixels, ignored ones too, as mmsegmentation did when DAFormer and FST were made; otherwise by those kept.
    A class outside 0..C-1 other than `ignore_index` is an error of PyTorch's.
    """
    _check_fit(logits_BCHW, mask_BHW)
    mask_BHW = mask_BHW.long()
    items_BHW = F.cross_entropy(upcast(logits_BCHW), mask_BHW, ignore_index=ignore_index, reduction="none")
    kept_BHW = None if count_ignored else mask_BHW != ignore_index
    return reduce(items_BHW, reduction=reduction, weight=weight, mask=kept_BHW)


def pixel_kl(
    student_logits_BCHW: Tensor,
    teacher_logits_BCHW: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    scale_by_t2: bool,
    reduction: Reduction,
    weight: Tensor | None = None,
    kept_BHW: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) over the classes at every pixel, on the student's grid.

    Teacher's logits of another height or width are resized first (bilinear, corners not aligned). kept_BHW: bool, the
    pixels that count (a region, or mask != 255). Nothing is detached, as in `limbeck.losses.divergence`.
    """
    teacher_logits_BCHW = resize_logits(teacher_logits_BCHW, student_logits_BCHW.shape[-2:])
    return kl_divergence(
        student_logits_BCHW,
        teacher_logits_BCHW,
        temperature=temperature,
        scale_by_t2=scale_by_t2,
        reduction=reduction,
        weight=weight,
        mask=kept_BHW,
        dim=1,
    )


def dice_loss(
    logits_BCHW: Tensor,
    mask_BHW: Tensor,
    *,
    per_sample: bool,
    only_present: bool = False,
    smooth: float = 1.0,
    ignore_index: int = IGNORE,
) -> Tensor:
    """1 - mean_c (2 sum_i p_ic t_ic + s) / (sum_i p_ic + sum_i t_ic + s), p = softmax(logits), t = one-hot(mask).

    The sums run over the kept pixels i of a sample (`per_sample`, then mean over samples) or of the batch.
    only_present: the mean is over the classes that the mask holds there (0 where it holds none); otherwise over all.
    """
    _check_fit(logits_BCHW, mask_BHW)
    kept_B1HW = (mask_BHW != ignore_index)[:, None]
    p_BCHW = upcast(logits_BCHW).softmax(1) * kept_B1HW
    target_BHW = torch.where(kept_B1HW[:, 0], mask_BHW, 0).long()
    t_BCHW = F.one_hot(target_BHW, logits_BCHW.shape[1]).movedim(-1, 1).to(p_BCHW.dtype) * kept_B1HW
    over = (2, 3) if per_sample else (0, 2, 3)
    size = t_BCHW.sum(over)
    loss = 1 - (2 * (p_BCHW * t_BCHW).sum(over) + smooth) / (p_BCHW.sum(over) + size + smooth)
    if not only_present:
        return loss.mean()
    present = size > 0
    return ((loss * present).sum(-1) / present.sum(-1).clamp(min=1)).mean()


def binary_dice_loss(logits: Tensor, target: Tensor, *, smooth: float = 1.0) -> Tensor:
    """1 - (2 sum p t + s) / (sum p + sum t + s), p = sigmoid(logits), the sums over each sample; mean over samples.

    logits and target [B, ...] of equal shape, target in 0..1.
    """
    if logits.shape != target.shape:
        raise ValueError(f"logits are {list(logits.shape)} and the target {list(target.shape)}: they must be equal.")
    p = upcast(logits).sigmoid().flatten(1)
    t = target.to(p.dtype).flatten(1)
    return (1 - (2 * (p * t).sum(1) + smooth) / (p.sum(1) + t.sum(1) + smooth)).mean()


def region_means(features_BCHW: Tensor, regions_BHW: Tensor, regions: int) -> tuple[Tensor, Tensor]:
    """(means [B, R, C], counts [B, R]): the mean feature of each region of each sample (masked average pooling).

    regions_BHW: the region's number at each pixel; numbers outside 0..R-1 (255: ignored) belong to none. A region
    without pixels has the mean 0 and the count 0. Gradient flows into the features.
    """
    _check_fit(features_BCHW, regions_BHW)
    numbers_R = torch.arange(regions, device=regions_BHW.device)
    inside_BRP = upcast((regions_BHW.flatten(1)[:, None] == numbers_R[:, None]).float())
    counts_BR = inside_BRP.sum(-1)
    sums_BRC = inside_BRP.to(upcast(features_BCHW).dtype) @ upcast(features_BCHW).flatten(2).mT
    return sums_BRC / counts_BR.clamp(min=1)[..., None], counts_BR


def resize_logits(logits_BCHW: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """The logits at another height and width: bilinear, corners not aligned; the same tensor where they fit."""
    if tuple(logits_BCHW.shape[-2:]) == tuple(size):
        return logits_BCHW
    return F.interpolate(logits_BCHW, tuple(size), mode="bilinear", align_corners=False)


def _check_fit(dense: Tensor, mask: Tensor) -> None:
    if dense.ndim != 4 or mask.shape != (len(dense), *dense.shape[2:]):
        raise ValueError(
            f"logits or features are {list(dense.shape)} and the mask {list(mask.shape)}: expected [B,C,H,W] and "
            "[B,H,W] of the same height and width; resize the logits with resize_logits."
        )

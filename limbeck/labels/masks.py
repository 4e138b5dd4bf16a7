"""Pseudo masks: a class number a pixel, 255 where a pixel carries no label.

Letters: B samples, C classes, H height, W width. Probabilities are [B, C, H, W]; masks int64 [B, H, W]. Everything is
detached. What looks at a batch (percentiles, shares) looks at this process's batch, as the official codes do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .thresholds import percentile
from .weights import negative_entropy

IGNORE = 255


def hard_mask(
    probabilities_BCHW: Tensor, threshold: float | Tensor | None = None, *, ignore_index: int = IGNORE
) -> Tensor:
    """The most probable class of each pixel; `ignore_index` where its probability is below the threshold.

    threshold: None keeps every pixel; a number; or one for each class, [C] (`class_thresholds`, a `RunningQuantile`'s
    `theta`), of which that of the predicted class counts.
    """
    confidence_BHW, mask_BHW = probabilities_BCHW.detach().max(1)
    if threshold is None:
        return mask_BHW
    limit = threshold[mask_BHW] if isinstance(threshold, Tensor) and threshold.ndim else threshold
    return torch.where(confidence_BHW >= limit, mask_BHW, ignore_index)


def drop_uncertain(
    mask_BHW: Tensor, probabilities_BCHW: Tensor, drop_percent: float, *, ignore_index: int = IGNORE
) -> Tensor:
    """The mask without its least certain pixels.

    With H the entropy of the probabilities, pixels with H >= the `drop_percent`-th percentile of H over the labelled
    pixels (linearly interpolated, as NumPy's) become `ignore_index`: 80 drops the most uncertain 20 %. Pixels that
    tie with the percentile are dropped, so 100 drops the most uncertain one. Source: U2PL, FST (`loss_helper.py`).
    """
    entropy_BHW = -negative_entropy(probabilities_BCHW.movedim(1, -1))
    labelled_BHW = mask_BHW != ignore_index
    kept_BHW = percentile(entropy_BHW, drop_percent / 100, keep="low", strict=True, mask=labelled_BHW)
    return torch.where(kept_BHW, mask_BHW, ignore_index)


def confident_share(probabilities_BCHW: Tensor, threshold: float) -> Tensor:
    """The share of the batch's pixels whose highest probability reaches the threshold, one number in [0, 1].

    DACS (Tranheden et al. 2021) weighs all pseudo-labelled pixels of a batch by it.
    """
    return (probabilities_BCHW.detach().amax(1) >= threshold).float().mean()


def mask_accuracy(mask_BHW: Tensor, truth_BHW: Tensor, *, ignore_index: int = IGNORE) -> Tensor:
    """The share of pixels with the true class among those that both masks label; 0 where there are none."""
    both_BHW = (mask_BHW != ignore_index) & (truth_BHW != ignore_index)
    right_BHW = both_BHW & (mask_BHW == truth_BHW)
    return right_BHW.sum() / both_BHW.sum().clamp(min=1)

"""Bands of confidence: which labels of a teacher are thrown away, which are replaced, and which are kept.

Shapes: N samples, V labelled regions (crops) of each, [...] any items.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNINFORMATIVE, HARD, IMPORTANT = 0, 1, 2


def confidence_bands(scores: Tensor, low: float | Tensor, middle: float | Tensor, top: float | Tensor) -> Tensor:
    """int64 [...]: which band each item lies in.

    `UNINFORMATIVE` where score < low or score > top, else `HARD` where score < middle, else `IMPORTANT`.
    Raising `middle` only turns important items hard; raising `low` or lowering `top` only makes items uninformative.
    Scores [...] of any range; the limits are numbers or tensors of no dimension. Source: FerKD (Shen 2023), section 3.
    """
    scores = scores.detach()
    bands = torch.where(scores < middle, HARD, IMPORTANT)
    return bands.masked_fill((scores < low) | (scores > top), UNINFORMATIVE)


def keep_median(bands_NV: Tensor, scores_NV: Tensor, middle: float | Tensor) -> Tensor:
    """int64 [N,V]: the bands, but where all V of a sample are uninformative its median is `HARD` or `IMPORTANT`.

    Which of both, score >= middle says; of an even number the median is the lower one of the middle two.
    """
    lost_N1 = (bands_NV == UNINFORMATIVE).all(1, keepdim=True)
    median_N1 = scores_NV.detach().median(1, keepdim=True).indices
    is_median_NV = torch.zeros_like(bands_NV).scatter(1, median_N1, 1).bool()
    return torch.where(lost_N1 & is_median_NV, torch.where(scores_NV.detach() < middle, HARD, IMPORTANT), bands_NV)

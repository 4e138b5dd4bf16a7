"""What labels are: a target, a weight and a keep-mask per item."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PseudoLabels(NamedTuple):
    """Targets made from a teacher's outputs, ready for a loss. Constants: no gradient.

    target: int64 [B] (hard) or float [B, C] (soft, rows sum to 1); weight: float32 [B], 1 where no weighting
    is meant; mask: bool [B], True = kept. Dense outputs have further dimensions after B in all three.
    The mask goes to a loss as `mask`, and the loss's `reduction` says whether rejected items count in the
    divisor.
    """

    target: Tensor
    weight: Tensor
    mask: Tensor


def pseudo_labels(
    probabilities: Tensor, *, hard: bool, mask: Tensor | None = None, weight: Tensor | None = None
) -> PseudoLabels:
    """Labels from a teacher's probabilities [..., C] (classes last), detached.

    hard: the most probable class instead of the whole distribution. mask: default all kept. weight: default
    1. Raises ValueError when mask or weight is not [...].
    """
    probabilities = probabilities.detach()
    items = probabilities.shape[:-1]
    mask = torch.ones(items, dtype=torch.bool, device=probabilities.device) if mask is None else mask.bool()
    weight = torch.ones(items, device=probabilities.device) if weight is None else weight.detach().float()
    if mask.shape != items or weight.shape != items:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and weight {tuple(weight.shape)}: "
            f"expected one value per item, {tuple(items)}."
        )
    target = probabilities.argmax(-1) if hard else probabilities
    return PseudoLabels(target, weight, mask)

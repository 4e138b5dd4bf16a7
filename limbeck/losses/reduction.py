"""One definition of every reduction, used by all losses.

A loss first gives one value per *item*: what is left of the input when the dimension that the loss sums over
(classes, channels of a feature, positions of a map) is gone. Logits [B, C] have items [B], [B, T, V] have [B,
T], [B, C, H, W] with dim=1 have [B, H, W]. With l the item's value, w its weight (1 without `weight`), k = 1
for a kept item and 0 for one that `mask` leaves out:

| reduction     | value                          | in the papers                                           |
|---------------|--------------------------------|---------------------------------------------------------|
| "none"        | k w l, shape of the items      |                                                         |
| "sum"         | sum k w l                      |                                                         |
| "mean"        | sum k w l / sum k              | per token, per kept pixel; kl_div "batchmean" of [N, C] |
| "batchmean"   | sum k w l / size of dim 0      | FixMatch: rejected samples count; pixels, tokens summed |
| "elementmean" | sum k w l / (sum k * elements) | mse_loss, kl_div "mean": over classes or channels too   |

On logits [B, C] without a mask, "mean" and "batchmean" agree. Weights are never part of the divisor: for a
mean weighted by w / sum w, normalise the weights first. To divide by all items, kept or not, give the mask as
`weight`. Where nothing is kept the loss is exactly 0 with zero gradients, and no value is read back from the
device.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "batchmean", "sum", "elementmean"]

# An excluded position among logits: its softmax is exactly 0 and, unlike with -inf, 0 * log p is 0.
EXCLUDED = -1e30


def upcast(x: Tensor) -> Tensor:
    """`x` as float32; float64 stays float64 (for exact gradient checks)."""
    return x if x.dtype == torch.float64 else x.float()


def per_item(values: Tensor, items: Tensor, name: str) -> Tensor:
    """`values` aligned with the LEADING dimensions of `items`: [B] fits items [B], [B, T] and [B, H, W].

    Raises ValueError when a dimension is neither 1 nor that of the items.
    """
    fits = values.ndim <= items.ndim and all(v in (1, n) for v, n in zip(values.shape, items.shape, strict=False))
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} but the items have shape {tuple(items.shape)}: "
            f"give one value per item, or one per leading dimension."
        )
    return values.reshape(values.shape + (1,) * (items.ndim - values.ndim))


def reduce(
    items: Tensor,
    *,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    elements: int | None = None,
) -> Tensor:
    """Reduce values per item by the table at the top of this file.

    items: [B, ...]. weight: real, not negative, one per item or per leading dimension. mask: bool or 0/1, the
    same. elements: how many elements were summed into one item, for "elementmean"; None where that has no
    meaning. Gradient flows into `weight` as into the items. Raises ValueError for an unknown reduction, a
    shape that does not fit.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}: choose one of {', '.join(get_args(Reduction))}.")
    if weight is not None:
        items = items * per_item(upcast(weight), items, "weight")
    kept: Tensor | None = None
    if mask is not None:
        kept = per_item(mask.bool(), items, "mask").expand_as(items)
        items = torch.where(kept, items, torch.zeros_like(items))
    if reduction == "none":
        return items
    if reduction == "sum":
        return items.sum()
    if reduction == "batchmean":
        return items.sum() / max(items.shape[0], 1)
    count = max(items.numel(), 1) if kept is None else kept.sum().clamp(min=1)
    if reduction == "mean":
        return items.sum() / count
    if elements is None:
        raise ValueError('reduction is "elementmean" but this loss has one element per item: use "mean".')
    return items.sum() / (count * elements)


def check_same_shape(first: Tensor, second: Tensor) -> None:
    """Raise ValueError unless both shapes are equal (broadcasting here would hide a mistake)."""
    if first.shape != second.shape:
        raise ValueError(
            f"the first tensor has shape {tuple(first.shape)} but the second has {tuple(second.shape)}: "
            f"they must be equal."
        )

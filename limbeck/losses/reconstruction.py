"""Losses of painted patches.

Letters: B samples, L patches, P numbers of a patch.
"""

from __future__ import annotations

from torch import Tensor

from .reduction import check_same_shape, reduce, upcast


def masked_patch_mse(painted_BLP: Tensor, target_BLP: Tensor, mask_BL: Tensor) -> Tensor:
    """sum_masked mean_p (painted - target)^2 / number of masked patches: visible patches take no part.

    mask_BL is 1 where a patch was masked, else 0; without any masked patch the loss is 0. Nothing is detached: targets
    are pixels. Computed in float32 (float64 stays). Raises ValueError for shapes that differ. Source: He et al. 2022,
    section 3 and the official code.
    """
    check_same_shape(painted_BLP, target_BLP)
    error_BL = (upcast(painted_BLP) - upcast(target_BLP)).square().mean(-1)
    return reduce(error_BL, reduction="mean", mask=mask_BL)

"""Regressions between a student's and a target's features.

Letters: B samples, N tokens, D width, C channels, H and W height and width.
The item (see `limbeck.losses.reduction`) is one feature vector along `dim`: [B, D] has items [B], tokens [B,
N, D] have [B, N], maps [B, C, H, W] with dim=1 have [B, H, W]. Each side has its own normalisation, because
papers differ in which is normalised. Nothing is detached: detach a frozen target. Computed in float32
(float64 stays).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .reduction import Reduction, check_same_shape, reduce, upcast

Normalize = Literal["l2", "layer", "channel"]


def normalize_features(features: Tensor, how: Normalize | None, *, dim: int = -1, eps: float = 1e-6) -> Tensor:
    """Features on a comparable scale, of the same shape, in float32.

    * None: as they are.
    * "l2": x / |x| along `dim`; a vector no longer than `eps` is left as it is.
    * "layer": (x - mean) / sqrt(var + eps) along `dim`, LayerNorm without affine: the whitening of Feature
      Distillation (Wei et al. 2022).
    * "channel": the same per channel over all samples and positions, BatchNorm without affine (PKD, Cao et
      al. 2022). The statistics are those of this process's batch.
    Raises ValueError for another name.
    """
    features = upcast(features)
    if how is None:
        return features
    if how == "l2":
        return unit(features, dim=dim, eps=eps)
    if how == "layer":
        over = [dim]
    elif how == "channel":
        over = [d for d in range(features.ndim) if d != dim % features.ndim]
    else:
        raise ValueError(f'normalisation is {how!r}: choose None, "l2", "layer" or "channel".')
    var, mean = torch.var_mean(features, dim=over, correction=0, keepdim=True)
    return (features - mean) * (var + eps).rsqrt()


def unit(x: Tensor, *, dim: int = -1, eps: float = 1e-6) -> Tensor:
    """x / |x| along `dim`; shorter than `eps` it stays as it is, so that a zero vector has a finite
    gradient."""
    square = x.square().sum(dim, keepdim=True)
    return x * torch.where(square > eps**2, square, torch.ones_like(square)).rsqrt()


def feature_mse(
    student: Tensor,
    target: Tensor,
    *,
    normalize_student: Normalize | None = None,
    normalize_target: Normalize | None = None,
    dim: int = -1,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Squared error |s - t|^2 summed along `dim` per item; "elementmean" is `F.mse_loss`.

    Equal shapes. Two unit vectors give 2 - 2 cos. Source: FitNets (Romero et al. 2015), which has a factor of
    1/2. Raises ValueError for shapes that differ.
    """
    s, t = _pair(student, target, normalize_student, normalize_target, dim)
    return reduce((s - t).square().sum(dim), reduction=reduction, weight=weight, mask=mask, elements=student.shape[dim])


def feature_l1(
    student: Tensor,
    target: Tensor,
    *,
    normalize_student: Normalize | None = None,
    normalize_target: Normalize | None = None,
    dim: int = -1,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Absolute error sum |s - t| along `dim` per item; "elementmean" is `F.l1_loss`. Equal shapes, or
    ValueError."""
    s, t = _pair(student, target, normalize_student, normalize_target, dim)
    return reduce((s - t).abs().sum(dim), reduction=reduction, weight=weight, mask=mask, elements=student.shape[dim])


def feature_smooth_l1(
    student: Tensor,
    target: Tensor,
    *,
    beta: float,
    normalize_student: Normalize | None = None,
    normalize_target: Normalize | None = None,
    dim: int = -1,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Smooth L1 per element, d^2 / (2 beta) where |d| < beta and |d| - beta / 2 beyond, summed along `dim`
    per item.

    "elementmean" is `F.smooth_l1_loss`. Equal shapes. Source: Feature Distillation (Wei et al. 2022; beta = 2
    there). Raises ValueError for shapes that differ or beta that is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}: it must be positive (feature_l1 is the limit of beta = 0).")
    s, t = _pair(student, target, normalize_student, normalize_target, dim)
    items = F.smooth_l1_loss(s, t, beta=beta, reduction="none").sum(dim)
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=student.shape[dim])


def cosine_distance(
    student: Tensor,
    target: Tensor,
    *,
    dim: int = -1,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """1 - cos(s, t) along `dim` per item, in [0, 2]; unchanged when either side is scaled by a positive
    number.

    A zero vector has distance 1 and a finite gradient. Equal shapes, or ValueError; "elementmean" has no
    meaning here.
    """
    s, t = _pair(student, target, "l2", "l2", dim)
    return reduce(1 - (s * t).sum(dim), reduction=reduction, weight=weight, mask=mask)


def resize_features(
    features_BCHW: Tensor, size: tuple[int, int], *, mode: Literal["bilinear", "nearest", "pool"]
) -> Tensor:
    """Feature maps brought to height and width `size`, differentiably; [B, C, *size].

    "bilinear" (corners not aligned) and "nearest" interpolate; "pool" averages whole regions (adaptive
    average pooling), which uses every position when the map shrinks. Raises ValueError for another mode or no
    map.
    """
    if features_BCHW.ndim != 4:
        raise ValueError(f"features have shape {tuple(features_BCHW.shape)}: expected maps [B, C, H, W].")
    resizers: dict[str, Callable[[Tensor], Tensor]] = {
        "bilinear": lambda x: F.interpolate(x, size=size, mode="bilinear", align_corners=False),
        "nearest": lambda x: F.interpolate(x, size=size, mode="nearest"),
        "pool": lambda x: F.adaptive_avg_pool2d(x, size),
    }
    if mode not in resizers:
        raise ValueError(f"mode is {mode!r}: choose one of {', '.join(resizers)}.")
    return features_BCHW if tuple(features_BCHW.shape[2:]) == tuple(size) else resizers[mode](features_BCHW)


def _pair(
    student: Tensor, target: Tensor, student_how: Normalize | None, target_how: Normalize | None, dim: int
) -> tuple[Tensor, Tensor]:
    check_same_shape(student, target)
    return normalize_features(student, student_how, dim=dim), normalize_features(target, target_how, dim=dim)

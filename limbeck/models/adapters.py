"""Adapters that carry a student's feature to the shape of a teacher's.

Shapes: B samples, C channels, H height, W width, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError

Kind = Literal["linear", "conv1x1", "mlp"]
Norm = Literal["none", "batch", "layer"]
ResizeMode = Literal["none", "bilinear", "average"]


class _ChannelsLast(nn.Module):
    """Applies `layers` to the channel axis of [B, C, H, W], or to the last axis of [B, N, D] and [B, D]."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        last = x.movedim(1, -1) if x.ndim == 4 else x
        # BatchNorm1d takes rows, so every position counts as one.
        out = self.layers(last.flatten(0, -2)).unflatten(0, last.shape[:-1])
        return out.movedim(-1, 1) if x.ndim == 4 else out


class Adapter(nn.Module):
    """Maps features of `in_features` channels to `out_features`.

    `kind`: `linear`, x W^T + b on the last axis of [B, D] or [B, N, D]; `conv1x1`, the same at every position of
    [B, C, H, W]; `mlp`, linear, norm, ReLU for each number in `hidden`, then linear, on the last axis, or on the
    channels of [B, C, H, W]. `norm` (mlp only): `batch`, `layer` or `none`. `size` (H', W') first resizes the
    student's map: `bilinear`, or `average` (adaptive average pooling).

    Raises `UserError` for a `hidden` or `norm` without an mlp.
    """

    def __init__(
        self,
        kind: Kind,
        in_features: int,
        out_features: int,
        bias: bool = True,
        hidden: Sequence[int] = (),
        norm: Norm = "none",
        size: tuple[int, int] | None = None,
        resize: ResizeMode = "none",
    ) -> None:
        super().__init__()
        if kind not in ("linear", "conv1x1", "mlp"):
            raise UserError(f"An adapter is 'linear', 'conv1x1' or 'mlp', got {kind!r}.")
        if kind != "mlp" and (hidden or norm != "none"):
            raise UserError(f"hidden and norm belong to an adapter of kind 'mlp', got them with {kind!r}.")
        if kind == "mlp" and not hidden:
            raise UserError("An adapter of kind 'mlp' needs its hidden widths, for example hidden=[256].")
        if resize not in ("none", "bilinear", "average"):
            raise UserError(f"resize is 'none', 'bilinear' or 'average', got {resize!r}.")
        self.size = size
        self.resize = resize
        self.project: nn.Module
        if kind == "linear":
            self.project = nn.Linear(in_features, out_features, bias=bias)
        elif kind == "conv1x1":
            self.project = nn.Conv2d(in_features, out_features, 1, bias=bias)
        else:
            self.project = _ChannelsLast(_mlp(in_features, out_features, bias, hidden, norm))

    def forward(self, feature: Tensor) -> Tensor:
        if self.size is not None and feature.shape[-2:] != self.size:
            if self.resize == "average":
                feature = F.adaptive_avg_pool2d(feature, self.size)
            else:
                feature = F.interpolate(feature, self.size, mode="bilinear", align_corners=False)
        return self.project(feature)


def _mlp(in_features: int, out_features: int, bias: bool, hidden: Sequence[int], norm: Norm) -> nn.Sequential:
    norms = {"none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
    if norm not in norms:
        raise UserError(f"norm is 'none', 'batch' or 'layer', got {norm!r}.")
    layers: list[nn.Module] = []
    width = in_features
    for wider in hidden:
        layers += [nn.Linear(width, wider, bias=bias), norms[norm](wider), nn.ReLU()]
        width = wider
    return nn.Sequential(*layers, nn.Linear(width, out_features, bias=bias))


def adapter_for(
    student_feature: Tensor,
    teacher_feature: Tensor,
    kind: Kind,
    bias: bool = True,
    hidden: Sequence[int] | None = None,
    norm: Norm = "none",
    resize: ResizeMode = "none",
) -> Adapter:
    """An `Adapter` from the shape of one example feature to that of another.

    Both [B, C, H, W], or both [B, N, D], or both [B, D]. `hidden` of an mlp defaults to one layer as wide as the
    teacher's feature. Raises `UserError` when the ranks differ, when `kind` does not fit the rank, when maps have
    different heights or widths and `resize` is `none`, or when token counts differ.
    """
    ours, theirs = tuple(student_feature.shape), tuple(teacher_feature.shape)
    if len(ours) != len(theirs) or len(ours) not in (2, 3, 4):
        raise UserError(
            f"The student's feature {ours} and the teacher's {theirs} must both be [B,D], [B,N,D] or [B,C,H,W]; "
            "pool or reshape one, or tap another layer."
        )
    is_map = len(ours) == 4
    if (kind == "conv1x1") != is_map and kind != "mlp":
        fit = "conv1x1" if is_map else "linear"
        raise UserError(f"An adapter of kind {kind!r} does not take features of shape {ours}; use {fit!r} or 'mlp'.")
    if not is_map and ours[1:-1] != theirs[1:-1]:
        raise UserError(
            f"The student has {ours[1]} tokens and the teacher {theirs[1]}; select or pool tokens so that they match."
        )
    size = None
    if is_map and ours[2:] != theirs[2:]:
        if resize == "none":
            raise UserError(
                f"The student's map is {ours[2]}x{ours[3]} and the teacher's {theirs[2]}x{theirs[3]}; "
                "pass resize='bilinear' or resize='average'."
            )
        size = (theirs[2], theirs[3])
    channel = 1 if is_map else -1
    if hidden is None:
        hidden = [theirs[channel]] if kind == "mlp" else []
    return Adapter(kind, ours[channel], theirs[channel], bias, hidden, norm, size, resize)

"""Small denoising networks for pictures of 8 to 64 pixels, with classes; their protocol is `DenoisingNet`.

Shapes: B samples, C channels, H height, W width, D width, F frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.diffusion.denoiser import ImageShape


class Condition(nn.Module):
    """Time and class as one vector [B, D]: an MLP of sines and cosines of the time, plus an embedded label.

    Frequencies reach from 0.001 to 10, so that indices up to 1000 and logarithms of sigma are told apart alike. The
    embedding has one row more than classes, for the null label.
    """

    frequencies_F: Tensor

    def __init__(self, width: int, num_classes: int | None, frequencies: int = 16) -> None:
        super().__init__()
        steps = torch.logspace(math.log10(0.001), 1, frequencies)
        self.register_buffer("frequencies_F", steps, persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, width)

    def forward(self, time_B: Tensor, label_B: Tensor | None) -> Tensor:
        angles_BF = time_B[:, None] * self.frequencies_F.to(time_B.dtype)
        out = self.time(torch.cat([angles_BF.sin(), angles_BF.cos()], -1))
        if self.label is not None:
            out = out + self.label(label_B)
        return F.silu(out)


class MlpBlock(nn.Module):
    """x + W2 silu(scale * norm(W1 x) + shift), scale and shift told by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(width, width), nn.LayerNorm(width, elementwise_affine=False)
        self.film = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x_BD: Tensor, condition_BD: Tensor) -> Tensor:
        scale, shift = self.film(condition_BD).chunk(2, -1)
        return x_BD + self.outer(F.silu((1 + scale) * self.norm(self.inner(x_BD)) + shift))


class DenoisingMlp(nn.Module):
    """Residual MLP on the pixels; the bottleneck is what its middle block gives, [B, width]."""

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 8,
        num_classes: int | None = None,
        width: int = 256,
        depth: int = 4,
    ) -> None:
        super().__init__()
        if depth < 2:
            raise UserError(f"the denoising mlp has {depth} blocks; it needs at least 2, one before its bottleneck")
        shape = {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}
        self.origin = {"name": "mlp", **shape, "config": {"width": width, "depth": depth}}
        self.image_shape, self.num_classes = ImageShape(in_channels, image_size, image_size), num_classes
        self.bottleneck, self.bottleneck_shape = f"blocks.{depth // 2 - 1}", (width, 1)
        pixels = in_channels * image_size**2
        self.condition = Condition(width, num_classes)
        self.first = nn.Linear(pixels, width)
        self.blocks = nn.ModuleList(MlpBlock(width) for _ in range(depth))
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, pixels))

    def forward(self, x_BCHW: Tensor, time_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        condition_BD = self.condition(time_B, label_B)
        out = self.first(x_BCHW.flatten(1))
        for block in self.blocks:
            out = block(out, condition_BD)
        return self.last(out).view_as(x_BCHW)


class ConvBlock(nn.Module):
    """Pre-norm residual block of two 3x3 convolutions, with scale and shift told by the condition."""

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = _norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(width, 2 * out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x_BCHW: Tensor, condition_BD: Tensor) -> Tensor:
        scale, shift = self.film(condition_BD)[:, :, None, None].chunk(2, 1)
        out = self.conv1(F.silu(self.norm1(x_BCHW)))
        out = self.conv2(F.silu((1 + scale) * self.norm2(out) + shift))
        return self.skip(x_BCHW) + out


class DenoisingUNet(nn.Module):
    """A small U-Net: one stage a number in `channels`, halved between stages; the bottleneck is the middle block's map.

    Raises `UserError` when the picture's side cannot be halved between all stages.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 8,
        num_classes: int | None = None,
        channels: Sequence[int] = (32, 64),
        blocks: int = 1,
    ) -> None:
        super().__init__()
        halvings = len(channels) - 1
        if halvings < 0 or image_size % 2**halvings:
            raise UserError(
                f"the denoising unet has {len(channels)} stages and pictures of {image_size} pixels, which cannot be "
                f"halved {halvings} times; give fewer channels, or pictures of a multiple of {2**halvings} pixels"
            )
        shape = {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}
        self.origin = {"name": "unet", **shape, "config": {"channels": list(channels), "blocks": blocks}}
        self.image_shape, self.num_classes = ImageShape(in_channels, image_size, image_size), num_classes
        self.bottleneck, self.bottleneck_shape = "middle", (channels[-1], image_size // 2**halvings)
        width = 4 * channels[0]
        self.condition = Condition(width, num_classes)
        self.first = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        downs = zip([channels[0], *channels], channels, strict=False)
        self.down = nn.ModuleList(_stage(before, after, width, blocks) for before, after in downs)
        self.middle = ConvBlock(channels[-1], channels[-1], width)
        ups = zip([channels[-1], *reversed(channels)], reversed(channels), strict=False)
        self.up = nn.ModuleList(_stage(below + after, after, width, blocks) for below, after in ups)
        self.last = nn.Sequential(_norm(channels[0]), nn.SiLU(), nn.Conv2d(channels[0], in_channels, 3, padding=1))
        nn.init.zeros_(self.last[-1].weight)  # type: ignore[arg-type]

    def forward(self, x_BCHW: Tensor, time_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        condition_BD = self.condition(time_B, label_B)
        out, kept = self.first(x_BCHW), []
        for number, stage in enumerate(self.down):
            out = _run(stage, F.avg_pool2d(out, 2) if number else out, condition_BD)
            kept.append(out)
        out = self.middle(out, condition_BD)
        for number, stage in enumerate(self.up):
            out = F.interpolate(out, scale_factor=2.0) if number else out
            out = _run(stage, torch.cat([out, kept.pop()], 1), condition_BD)
        return self.last(out)


def _stage(in_channels: int, out_channels: int, width: int, blocks: int) -> nn.ModuleList:
    first = ConvBlock(in_channels, out_channels, width)
    return nn.ModuleList([first, *(ConvBlock(out_channels, out_channels, width) for _ in range(blocks - 1))])


def _run(stage: Any, x_BCHW: Tensor, condition_BD: Tensor) -> Tensor:
    for block in stage:
        x_BCHW = block(x_BCHW, condition_BD)
    return x_BCHW


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


NETS: dict[str, Callable[..., nn.Module]] = {"mlp": DenoisingMlp, "unet": DenoisingUNet}

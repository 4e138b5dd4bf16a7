"""A discriminator's head on the inner map of a denoiser, whose trunk it shares.

Shapes: B samples, D channels of the map, S side of the map.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from limbeck.errors import UserError


class BottleneckDiscriminator(nn.Module):
    """`map_BDSS -> logits_B`, positive for real: the map is halved until 4x4, taken together, and read off.

    Conv4x4 of stride 2 while S > 4, then one SxS convolution without padding, each with GroupNorm and SiLU, then
    Conv1x1 to one logit. At S = 8 these are DMD2's heads for ImageNet and SD1.5 (768 and 1280 channels), at S = 32 its
    head for SDXL. Raises `UserError` where the map cannot be halved so.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        rest = side
        while rest > 4:
            if rest % 2:
                raise UserError(
                    f"a discriminator cannot halve a {side}x{side} map down to 4x4; give the diffusion model one stage "
                    "more or less, or pictures of another size"
                )
            layers += _block(channels, 4, stride=2, padding=1)
            rest //= 2
        layers += _block(channels, rest, stride=1, padding=0)
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, map_BDSS: Tensor) -> Tensor:
        return self.layers(map_BDSS).flatten()


def _block(channels: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, channels, kernel, stride=stride, padding=padding)
    # At least 8 channels a group: on a 1x1 map a group of one channel would be normalised to a constant.
    return [convolution, nn.GroupNorm(math.gcd(32, max(1, channels // 8), channels), channels), nn.SiLU()]

"""Views that recolour a picture and leave every object where it is: boxes and masks of the picture stay true.

Shapes: B samples, C channels (1 or 3), H height, W width, E erased rectangles of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.data.views import (
    VIEWS,
    Params,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    blur,
    to_grey,
    turn_hue,
)
from limbeck.errors import UserError, require_share

# Of each erasing pass: its share of the picture and its height over width, as Unbiased Teacher has them.
ERASED = (((0.05, 0.2), (0.3, 3.3)), ((0.02, 0.2), (0.1, 6.0)), ((0.02, 0.2), (0.05, 8.0)))


class Photometric:
    """Colour jitter, grey, blur, then up to three rectangles erased by noise; geometry stays.

    With probability `jitter_probability` brightness, contrast and saturation are scaled by factors in 1 +- `jitter`
    (three numbers) and hues turned by up to `hue` of the circle, in that order; grey with probability `grey`, Gaussian
    blur with a sigma drawn evenly from `sigma`, in pixels, with probability `blur` (the default is for pictures of 600
    pixels: scale it with their size); each number of `erasing` is the probability of one erasing pass, whose rectangle
    has a share of the picture and a shape drawn from `ERASED`. Pictures of one channel keep hue and saturation. Use it
    as `{name: photometric, of: weak}` to share another view's geometry.

    Source: the strong view of Unbiased Teacher (Liu et al. 2021), which LPLD and PS-TTL take over. Uniform noise
    replaces the erased pixels, where the official code draws normal noise that wraps around in 8 bits.
    """

    keeps_place = True

    def __init__(
        self,
        jitter: Sequence[float] = (0.4, 0.4, 0.4),
        hue: float = 0.1,
        jitter_probability: float = 0.8,
        grey: float = 0.2,
        blur: float = 0.5,
        sigma: tuple[float, float] = (0.1, 2.0),
        erasing: Sequence[float] = (0.7, 0.5, 0.3),
    ) -> None:
        require_share(jitter_probability=jitter_probability, grey=grey, blur=blur)
        if len(jitter) != 3 or not all(0 <= part <= 1 for part in jitter) or not 0 <= hue <= 0.5:
            raise UserError(f"Got jitter={list(jitter)} and hue={hue}, expected 3 numbers in 0..1, hue in 0..0.5.")
        if not 0 < sigma[0] <= sigma[1]:
            raise UserError(f"sigma is {list(sigma)}, expected two positive numbers of pixels in rising order.")
        if len(erasing) > len(ERASED) or not all(0 <= p <= 1 for p in erasing):
            raise UserError(f"erasing is {list(erasing)}, expected at most {len(ERASED)} probabilities.")
        self.jitter, self.hue, self.jitter_probability = tuple(jitter), hue, jitter_probability
        self.grey, self.blur, self.sigma, self.erasing = grey, blur, (sigma[0], sigma[1]), tuple(erasing)

    def draw(self, images: Tensor) -> Params:
        """`factors` [B,3]; `hue` (radians), `grey`, `sigma` (0: none) [B]; `erased` [B,E,4] (top, left, bottom, right
        as fractions; empty where nothing is erased); `noise` like the images."""
        rows, device = len(images), images.device
        jittered = torch.rand(rows, device=device) < self.jitter_probability
        spread = torch.tensor(self.jitter, device=device)
        factors = 1 + spread * (2 * torch.rand(rows, 3, device=device) - 1)
        hue = (2 * torch.rand(rows, device=device) - 1) * self.hue * 2 * torch.pi
        sigma = torch.empty(rows, device=device).uniform_(*self.sigma)
        return {
            "factors": torch.where(jittered[:, None], factors, 1.0),
            "hue": torch.where(jittered, hue, 0.0),
            "grey": torch.rand(rows, device=device) < self.grey,
            "sigma": torch.where(torch.rand(rows, device=device) < self.blur, sigma, 0.0),
            "erased": self._rectangles(rows, images.shape[-1] / images.shape[-2], device),
            "noise": torch.rand_like(images),
        }

    def _rectangles(self, rows: int, aspect: float, device: torch.device) -> Tensor:
        passes = []
        for probability, (scale, ratio) in zip(self.erasing, ERASED, strict=False):
            area = torch.empty(rows, device=device).uniform_(*scale)
            shape = torch.empty(rows, device=device).uniform_(*map(math.log, ratio)).exp() * aspect
            height = (area * shape).sqrt().clamp(max=1)
            width = (area / height).clamp(max=1)
            top = torch.rand(rows, device=device) * (1 - height)
            left = torch.rand(rows, device=device) * (1 - width)
            corners = torch.stack([top, left, top + height, left + width], 1)
            passes.append(torch.where(torch.rand(rows, 1, device=device) < probability, corners, 0.0))
        return torch.stack(passes, 1) if passes else torch.zeros(rows, 0, 4, device=device)

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """[B,C,H,W] to [B,C,H,W]."""
        brightness, contrast, saturation = params["factors"].unbind(1)
        out = adjust_contrast(adjust_brightness(images, brightness), contrast)
        out = turn_hue(adjust_saturation(out, saturation), params["hue"])
        out = torch.where(params["grey"].view(-1, 1, 1, 1), to_grey(out), out)
        if self.blur:
            out = blur(out, params["sigma"])
        return torch.where(_inside(params["erased"], images), params["noise"], out)

    def __call__(self, images: Tensor) -> Tensor:
        return self.apply(images, self.draw(images))


def _inside(erased_BE4: Tensor, images: Tensor) -> Tensor:
    """bool [B,1,H,W]: pixels whose centre lies in one of the rectangles."""
    height, width = images.shape[-2:]
    y = (torch.arange(height, device=images.device) + 0.5) / height
    x = (torch.arange(width, device=images.device) + 0.5) / width
    top, left, bottom, right = erased_BE4[..., None].unbind(2)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return (rows[..., :, None] & columns[..., None, :]).any(1, keepdim=True)


VIEWS["photometric"] = Photometric

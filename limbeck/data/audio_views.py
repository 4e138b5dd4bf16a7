"""Views of spectrograms [B,1,M,T]: standardised log-mel, so that 0 is the mean of the set. Made in a batch, one draw a
sample, random numbers from the device's global generator.

Chain them with `of`: `{window: {name: random_window, frames: 96}, mixed: {name: log_mixup, of: window},
first: {name: resize_crop, of: mixed}}`.

Letters: B samples, M mel bands, T frames, K spans of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.data.views import VIEWS, Params
from limbeck.errors import UserError, require_share


class RandomWindow:
    """`frames` successive frames from a uniform place: [B,1,M,T] to [B,1,M,frames].

    Raises `UserError` where the spectrograms are shorter.
    """

    def __init__(self, frames: int) -> None:
        if frames < 1:
            raise UserError(f"frames is {frames}, expected at least 1.")
        self.frames = frames

    def draw(self, images: Tensor) -> Params:
        """`start` int64 [B]: each window's first frame."""
        last = images.shape[-1] - self.frames
        if last < 0:
            raise UserError(
                f"A window of {self.frames} frames was asked for, the spectrograms have {images.shape[-1]}: "
                "lower frames, or load longer clips."
            )
        return {"start": torch.randint(last + 1, (len(images),), device=images.device)}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """The windows."""
        frame = params["start"][:, None] + torch.arange(self.frames, device=images.device)
        return images.gather(3, frame[:, None, None].expand(*images.shape[:3], -1))

    def __call__(self, images: Tensor) -> Tensor:
        return self.apply(images, self.draw(images))


class LogMixup:
    """Another sound in the background: log((1 - a) e^x + a e^m), a ~ U(0, ratio).

    m is one of the latest `memory` spectrograms that this view saw, unmixed, drawn for each sample from those before
    this batch; the first batch stays as it is. The memory is each process's own, is part of the stream's saved place,
    and is empty when a stream opens.

    Source: mixup of BYOL-A (Niizumi et al. 2021, section III-B), as LAPE has it.
    """

    def __init__(self, ratio: float = 0.4, memory: int = 2048) -> None:
        require_share(ratio=ratio)
        if memory < 1:
            raise UserError(f"memory is {memory}, expected at least 1.")
        self.ratio, self.size = ratio, memory
        self.reset()

    def reset(self) -> None:
        """Forget all that was seen."""
        self.memory: Tensor | None = None
        self.seen = 0

    def draw(self, images: Tensor) -> Params:
        """`share` [B] (a) and `partner` [B,1,M,T] (m); remembers `images`."""
        share = torch.rand(len(images), device=images.device) * self.ratio
        filled = min(self.seen, self.size)
        if self.memory is None:
            partner, share = images, torch.zeros_like(share)
        else:
            self.memory = self.memory.to(images.device)  # a restored one lies on the host
            partner = self.memory[torch.randint(filled, (len(images),), device=images.device)]
        self._remember(images)
        return {"share": share, "partner": partner}

    def _remember(self, images: Tensor) -> None:
        if self.memory is None:
            self.memory = images.new_zeros(self.size, *images.shape[1:])
        latest = images.detach()[-self.size :]
        place = (self.seen + torch.arange(len(latest), device=images.device)) % self.size
        self.memory[place] = latest
        self.seen += len(latest)

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """The mixed spectrograms."""
        share = params["share"][:, None, None, None]
        return torch.logaddexp(images + torch.log1p(-share), params["partner"] + share.log())

    def state_dict(self) -> dict[str, Any]:
        """What is remembered."""
        return {"memory": None if self.memory is None else self.memory.clone(), "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what was saved."""
        self.memory, self.seen = state["memory"], state["seen"]

    def __call__(self, images: Tensor) -> Tensor:
        return self.apply(images, self.draw(images))


class ResizeCrop:
    """A random box of a canvas with the spectrogram in its middle and zeros around, stretched to the old size.

    The box has `mel_scale` times the bands and `time_scale` times the frames of the spectrogram, each factor uniform in
    its range and cut off at the canvas, which is `canvas` times as large. Bicubic, corners on corners.

    Source: random resize crop of BYOL-A (Niizumi et al. 2021, section III-B). Where its code repeats the box's border
    to interpolate there, this one uses what lies beyond it on the canvas.
    """

    def __init__(
        self,
        mel_scale: tuple[float, float] = (0.6, 1.5),
        time_scale: tuple[float, float] = (0.6, 1.5),
        canvas: tuple[float, float] = (1.0, 1.5),
    ) -> None:
        if not (0 < mel_scale[0] <= mel_scale[1] and 0 < time_scale[0] <= time_scale[1]) or min(canvas) < 1:
            raise UserError(
                f"Got mel_scale={mel_scale}, time_scale={time_scale}, canvas={canvas}, expected positive ranges in "
                "rising order and a canvas of at least 1.0 x 1.0."
            )
        self.mel_scale, self.time_scale, self.canvas = tuple(mel_scale), tuple(time_scale), tuple(canvas)

    def draw(self, images: Tensor) -> Params:
        """`box` int64 [B,4]: top, left, height, width on the canvas."""
        sides = []
        for size, scale, canvas in zip(
            images.shape[-2:], (self.mel_scale, self.time_scale), self._canvas(images), strict=True
        ):
            extent = torch.empty(len(images), device=images.device).uniform_(*scale).mul(size)
            extent = extent.long().clamp(1, canvas)
            start = (torch.rand(len(images), device=images.device) * (canvas - extent + 1)).long()
            sides.append((start, extent))
        (top, height), (left, width) = sides
        return {"box": torch.stack([top, left, height, width], 1)}

    def _canvas(self, images: Tensor) -> tuple[int, int]:
        return int(images.shape[-2] * self.canvas[0]), int(images.shape[-1] * self.canvas[1])

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """[B,1,M,T] to [B,1,M,T]."""
        bands, frames = images.shape[-2:]
        height, width = self._canvas(images)
        above, before = (height - bands) // 2, (width - frames) // 2
        canvas = F.pad(images, (before, width - frames - before, above, height - bands - above))
        top, left, tall, wide = params["box"].float().unbind(1)
        y = top[:, None] + (tall - 1)[:, None] * torch.linspace(0, 1, bands, device=images.device)
        x = left[:, None] + (wide - 1)[:, None] * torch.linspace(0, 1, frames, device=images.device)
        y, x = 2 * y / max(1, height - 1) - 1, 2 * x / max(1, width - 1) - 1
        grid = torch.stack([x[:, None].expand(-1, bands, -1), y[:, :, None].expand(-1, -1, frames)], 3)
        return F.grid_sample(canvas, grid, mode="bicubic", padding_mode="border", align_corners=True)

    def __call__(self, images: Tensor) -> Tensor:
        return self.apply(images, self.draw(images))


class MaskSpans:
    """`mel_spans` bands and `time_spans` stretches of time are set to 0, the mean.

    A span's width is uniform in 0..`mel_width` bands (`time_width` frames), its place uniform.

    Source: SpecAugment (Park et al. 2019, section 2), without time warping.
    """

    def __init__(self, mel_spans: int = 2, mel_width: int = 8, time_spans: int = 2, time_width: int = 10) -> None:
        if min(mel_spans, mel_width, time_spans, time_width) < 0:
            raise UserError("The spans of mask_spans and their widths are at least 0.")
        self.mel = (mel_spans, mel_width)
        self.time = (time_spans, time_width)

    def draw(self, images: Tensor) -> Params:
        """`mel` and `time` int64 [B,K,2]: first band (frame) and width of each span."""
        bands, frames = images.shape[-2:]
        return {"mel": self._spans(images, bands, *self.mel), "time": self._spans(images, frames, *self.time)}

    @staticmethod
    def _spans(images: Tensor, size: int, spans: int, width: int) -> Tensor:
        if width > size:
            raise UserError(f"A span is up to {width} wide, the spectrograms have only {size}: lower its width.")
        extent = torch.randint(width + 1, (len(images), spans), device=images.device)
        start = (torch.rand(len(images), spans, device=images.device) * (size - extent + 1)).long()
        return torch.stack([start, extent], 2)

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """[B,1,M,T] to [B,1,M,T]."""
        bands, frames = images.shape[-2:]
        masked = _covered(params["mel"], bands)[:, :, None] | _covered(params["time"], frames)[:, None]
        return images.masked_fill(masked[:, None], 0)

    def __call__(self, images: Tensor) -> Tensor:
        return self.apply(images, self.draw(images))


def _covered(spans_BK2: Tensor, size: int) -> Tensor:
    """Bool [B,size], true where one of the spans lies."""
    place = torch.arange(size, device=spans_BK2.device)
    start, extent = spans_BK2[..., None].unbind(2)
    return ((place >= start) & (place < start + extent)).any(1)


VIEWS.update({"random_window": RandomWindow, "log_mixup": LogMixup, "resize_crop": ResizeCrop, "mask_spans": MaskSpans})

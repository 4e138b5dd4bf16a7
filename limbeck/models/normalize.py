"""A model's own normalisation: pictures reach it in [0, 1], so that teacher and student share a view.

Shapes: B samples, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """`(image - mean) / std` for each channel, of `image_BCHW` in [0, 1].

    `mean` and `std` have one number a channel, in units of the [0, 1] range. They are not part of the state
    dict: they belong to the architecture's description. Raises `UserError` when the picture has another number
    of channels (a broadcast would silently turn one channel into three).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or len(mean) == 0:
            raise UserError(f"mean has {len(mean)} numbers and std {len(std)}; give one of each a channel.")
        if min(std) <= 0:
            raise UserError(f"std must be positive in every channel, got {tuple(std)}.")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        channels = self.mean.shape[0]
        if image_BCHW.shape[-3] != channels:
            raise UserError(
                f"The picture has {image_BCHW.shape[-3]} channels but the normalisation {channels}; give a mean "
                f"and std of {image_BCHW.shape[-3]} numbers, or normalize='none'."
            )
        return (image_BCHW - self.mean.to(image_BCHW.dtype)) / self.std.to(image_BCHW.dtype)

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Resize(nn.Module):
    """Resizes `image_BCHW` to `size` x `size` (bilinear with antialiasing); the identity at that size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise UserError(f"size must be at least 1 pixel, got {size}.")
        self.size = size

    def forward(self, image_BCHW: Tensor) -> Tensor:
        if image_BCHW.shape[-2:] == (self.size, self.size):
            return image_BCHW
        return F.interpolate(image_BCHW, (self.size, self.size), mode="bilinear", antialias=True)

    def extra_repr(self) -> str:
        return f"size={self.size}"


class Normalized(nn.Module):
    """`model(normalize(image))`: a model that takes pictures in [0, 1].

    With `size`, pictures are first resized to `size` x `size`: a teacher made for 224 pixels can then watch the
    32-pixel views of its student. The weights keep their names under `model.`.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], size: int | None = None) -> None:
        super().__init__()
        self.resize = nn.Identity() if size is None else Resize(size)
        self.normalize = Normalize(mean, std)
        self.model = model

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.model(self.normalize(self.resize(image_BCHW)))

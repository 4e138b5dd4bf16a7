"""Pictures pasted at random places of an empty square, so that where the object lies is known.

Shapes: N samples, C channels, H height and W width of the pictures, S edge of the square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.data.samples import Samples
from limbeck.errors import UserError


def on_canvas(samples: Samples, edge: int, seed: int) -> Samples:
    """The samples with each image pasted at a random place of an empty (0) square of `edge` pixels.

    The place is a function of the seed and the sample's `index`. The field `hidden_box` float32 [N,4] (left, top,
    right, bottom, as fractions of the square) bounds the pixels that are not empty, for methods that measure
    themselves by it.

    Raises:
        UserError: the images are not in memory, or larger than the square.
    """
    images = samples.fields.get("image")
    if not isinstance(images, Tensor):
        raise UserError("canvas needs images in memory: raise data.memory_limit, or leave canvas out")
    size, channels, height, width = images.shape
    if max(height, width) > edge:
        raise UserError(f"canvas is {edge} and the images are {height}x{width}: give at least {max(height, width)}")
    generator = torch.Generator().manual_seed(seed)
    place_N2 = torch.rand(int(samples.index.max()) + 1, 2, generator=generator)[samples.index]
    corner_N2 = (place_N2 * torch.tensor([edge - height + 1, edge - width + 1])).long()
    rows = (corner_N2[:, :1] + torch.arange(height))[:, None, :, None]
    columns = (corner_N2[:, 1:] + torch.arange(width))[:, None, None, :]
    canvas = images.new_zeros(size, channels, edge, edge)
    canvas[torch.arange(size)[:, None, None, None], torch.arange(channels)[:, None, None], rows, columns] = images
    return samples.with_fields({"image": canvas, "hidden_box": _bounds(canvas.amax(1) > 0)})


def shown_share(crop: Tensor, box: Tensor) -> Tensor:
    """The share of each box's area that lies inside the crop, in 0..1, float32 [...].

    Both [...,4] (left, top, right, bottom), broadcast; 0 for a box of no area.
    """
    edges = (torch.minimum(crop[..., 2:], box[..., 2:]) - torch.maximum(crop[..., :2], box[..., :2])).clamp(min=0)
    return edges.prod(-1) / (box[..., 2:] - box[..., :2]).prod(-1).clamp(min=1e-12)


def _bounds(filled_NSS: Tensor) -> Tensor:
    """float32 [N,4]: left, top, right, bottom of what is filled, as fractions; of no area where nothing is."""
    edge = filled_NSS.shape[-1]
    sides = []
    for filled_NS in (filled_NSS.any(1), filled_NSS.any(2)):
        any_N = filled_NS.any(1)
        first = filled_NS.int().argmax(1)
        last = edge - filled_NS.flip(1).int().argmax(1)
        sides.append((first, torch.where(any_N, last, first)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], 1) / edge

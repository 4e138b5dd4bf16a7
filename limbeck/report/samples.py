"""Pictures of what a generator makes.

Shapes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from limbeck.errors import UserError

GAP = 0.85  # the grey between images


def sample_grid(
    images_NCHW: Tensor, label_N: Tensor | None = None, classes: Sequence[str] | None = None, each: int = 6
) -> Figure:
    """Images in [0, 1] in a grid: a column a class, named, with its first `each` images; without labels 10 columns.

    A class that has fewer images shows grey fields. Raises `UserError` for no images, for images that are neither grey
    nor coloured, and for labels of another number.
    """
    if images_NCHW.ndim != 4 or images_NCHW.shape[1] not in (1, 3) or not len(images_NCHW):
        raise UserError(f"a grid of samples needs [N, 1 or 3, H, W] with N > 0, got {list(images_NCHW.shape)}")
    if label_N is None:
        label_N, names = torch.arange(len(images_NCHW)) % 10, [""] * min(10, len(images_NCHW))
    else:
        names = list(classes) if classes is not None else [str(number) for number in range(int(label_N.max()) + 1)]
    if len(label_N) != len(images_NCHW):
        raise UserError(f"there are {len(images_NCHW)} images and {len(label_N)} labels; give one label an image")
    picture = _mosaic(images_NCHW.detach().float().cpu().clamp(0, 1), label_N.cpu(), len(names), each)
    height, width = picture.shape[:2]
    figure = Figure(figsize=(6.4, 6.4 * height / width + 0.3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture.numpy(), interpolation="nearest")
    axes.spines[:].set_visible(False)
    pitch = width / len(names)
    axes.set_xticks([(column + 0.5) * pitch for column in range(len(names))], [name[:12] for name in names])
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, labelsize=9)
    axes.set_yticks([])
    for text in axes.get_xticklabels():
        text.set_parse_math(False)
    return figure


def _mosaic(images_NCHW: Tensor, label_N: Tensor, columns: int, rows: int) -> Tensor:
    """[height, width, 3]: cells of one image each, one pixel apart."""
    _, channels, height, width = images_NCHW.shape
    cells = torch.full((rows, columns, channels, height + 1, width + 1), GAP)
    for column in range(columns):
        mine = images_NCHW[label_N == column][:rows]
        cells[: len(mine), column, :, :height, :width] = mine
    picture = cells.permute(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), channels)
    return picture.expand(-1, -1, 3)

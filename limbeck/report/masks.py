"""Pictures beside their class maps.

Shapes: N samples, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.report.plots import PALETTE

IGNORE = 255
_HATCHED = ("#999999", "#8c564b", "#F0E442", "#004D40", "#B2DF8A", "#6A3D9A", "#FB9A99", "#1B9E77")
_NOTHING = (1.0, 1.0, 1.0)  # ignored pixels are white


def class_colours(classes: int) -> list[tuple[float, float, float]]:
    """A colour for each class; from the sixteenth on they repeat, ever lighter."""
    base = [to_rgb(colour) for colour in (*PALETTE, *_HATCHED)]
    lap = [number // len(base) for number in range(classes)]
    return [
        (1 - (1 - r) * 0.6**k, 1 - (1 - g) * 0.6**k, 1 - (1 - b) * 0.6**k)
        for k, (r, g, b) in zip(lap, (base[number % len(base)] for number in range(classes)), strict=True)
    ]


def masks_figure(
    images_NCHW: Tensor, truth_NHW: Tensor, predicted_NHW: Tensor, classes: Sequence[str], ignore_index: int = IGNORE
) -> Figure:
    """A row a sample: picture, true mask, predicted mask; below them the classes that occur, with their colours.

    images uint8 or float in [0,1]; ignored pixels of the truth are white. Raises `UserError` for masks that do not
    fit their pictures.
    """
    shape = (len(images_NCHW), *images_NCHW.shape[2:])
    if truth_NHW.shape != shape or predicted_NHW.shape != shape or not len(images_NCHW):
        raise UserError(
            f"Got pictures {list(images_NCHW.shape)} with masks {list(truth_NHW.shape)} and "
            f"{list(predicted_NHW.shape)}; give at least one picture [N,C,H,W] and masks [N,H,W]."
        )
    colours = class_colours(len(classes))
    rows, height, width = shape
    columns = 6.4 / 3
    figure = Figure(
        figsize=(6.4, 0.7 + rows * columns * height / width + 0.2 * -(-len(classes) // 4)), layout="constrained"
    )
    axes = figure.subplots(rows, 3, squeeze=False)
    pictures = images_NCHW.detach().cpu()
    pixels = (pictures.numpy() if pictures.is_floating_point() else pictures.numpy() / 255).transpose(0, 2, 3, 1)
    for row in range(rows):
        shown = [pixels[row].repeat(3 if pixels.shape[-1] == 1 else 1, -1)]
        shown += [_painted(mask[row], colours, ignore_index) for mask in (truth_NHW, predicted_NHW)]
        for place, (picture, title) in enumerate(zip(shown, ("picture", "truth", "prediction"), strict=True)):
            axes[row, place].imshow(picture, interpolation="nearest", vmin=0, vmax=1)
            axes[row, place].axis("off")
            if row == 0:
                axes[row, place].set_title(title, fontsize=10)
    there = sorted({*truth_NHW.unique().tolist(), *predicted_NHW.unique().tolist()} - {ignore_index})
    patches = [Patch(facecolor=colours[number], label=str(classes[number])[:24]) for number in there]
    legend = figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _painted(mask_HW: Tensor, colours: Sequence[tuple[float, float, float]], ignore_index: int) -> np.ndarray:
    numbers = mask_HW.cpu().numpy().astype(int)
    table = np.array([*colours, _NOTHING])
    return table[np.where(numbers == ignore_index, len(colours), numbers)]

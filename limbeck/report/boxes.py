"""Pictures with the boxes that are true and those that a detector finds.

Shapes: N pictures, C channels, H height, W width, M boxes of a picture (padded with label -1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from limbeck.errors import UserError
from limbeck.models.detection import Detections, Targets
from limbeck.report.plots import PALETTE


def boxes_figure(
    images_NCHW: Tensor, truth: Targets, found: Detections, classes: Sequence[str], score: float = 0.3
) -> Figure:
    """One row a picture: the true boxes on the left, the detections with at least `score` on the right.

    Colour and a word above the box say the class, the number behind it the score in percent. Pictures are uint8 or
    float in [0, 1], boxes in their pixels.

    Raises:
        UserError: there is no picture, or pictures and boxes are not equally many.
    """
    count = len(images_NCHW)
    if not count or len(truth.labels) != count or len(found.labels) != count:
        raise UserError(
            f"There are {count} pictures, boxes of {len(truth.labels)} and detections of {len(found.labels)}; give "
            "equally many, at least one."
        )
    height, width = images_NCHW.shape[-2:]
    figure = Figure(figsize=(8, 0.4 + 4 * count * height / width), layout="constrained")
    grid = figure.subplots(count, 2, squeeze=False)
    grid[0, 0].set_title("True boxes", fontsize=10, loc="left")
    grid[0, 1].set_title(f"Found with a score of at least {score:g}", fontsize=10, loc="left")
    for picture, (left, right) in enumerate(grid):
        for axes in (left, right):
            axes.imshow(_pixels(images_NCHW[picture]))
            axes.axis("off")
        real = truth.labels[picture] >= 0
        _draw(left, truth.boxes[picture][real], truth.labels[picture][real], None, classes)
        shown = (found.labels[picture] >= 0) & (found.scores[picture] >= score)
        scores = found.scores[picture][shown]
        _draw(right, found.boxes[picture][shown], found.labels[picture][shown], scores, classes)
    return figure


def _pixels(image_CHW: Tensor) -> Any:
    image = image_CHW.detach().cpu()
    image = image.float() / 255 if not image.is_floating_point() else image.clamp(0, 1)
    return image.permute(1, 2, 0).expand(-1, -1, 3).numpy()


def _draw(axes: Axes, boxes: Tensor, labels: Tensor, scores: Tensor | None, classes: Sequence[str]) -> None:
    numbers = [None] * len(labels) if scores is None else scores.tolist()
    for (x1, y1, x2, y2), label, number in zip(boxes.tolist(), labels.tolist(), numbers, strict=True):
        colour = PALETTE[label % len(PALETTE)]
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.2))
        word = classes[label] if number is None else f"{classes[label]} {100 * number:.0f}"
        axes.text(x1, y1, word, fontsize=5, color="white", backgroundcolor=colour, parse_math=False).set_bbox(
            {"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
        )

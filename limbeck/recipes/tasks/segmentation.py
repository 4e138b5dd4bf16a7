"""Segmentation: a class for every pixel of a picture."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from limbeck.data import Data, Samples, load_segmentation
from limbeck.errors import UserError
from limbeck.evaluate import SegmentationEvaluator, predict_masks
from limbeck.models import load_segmenter
from limbeck.recipes.tasks.task import Evaluator, Task
from limbeck.report.masks import masks_figure

SHOWN = 4


class Segmentation(Task):
    """Mean intersection over union."""

    name = "segmentation"
    columns = ("miou", "pixel_accuracy", "parameters", "latency_ms", "seconds")
    load_data = staticmethod(load_segmentation)
    load_model = staticmethod(load_segmenter)

    def shape(self, data: Data, section: str) -> dict[str, Any]:
        return {"num_classes": data.num_classes, "in_channels": self.example(data).shape[1]}

    def samples(self, data: Data, stream: str) -> Samples:
        if stream == "unlabelled" and data.unlabelled is None:
            raise UserError(
                "the method needs the stream 'unlabelled', but the data have no unlabelled samples; set data.labels, "
                "data.labelled_fraction or data.unlabelled_names, or add an 'unlabelled' split"
            )
        return super().samples(data, stream)

    def evaluator(self, data: Data) -> Evaluator:
        return SegmentationEvaluator()

    def exhibits(self, model: nn.Module, data: Data) -> dict[str, Figure]:
        count = min(SHOWN, len(data.test))
        spread = torch.linspace(0, len(data.test) - 1, count).long()
        some = data.test.select(spread)
        images: Tensor = some.batch(torch.arange(count))["image"]
        figure = masks_figure(images, some.fields["mask"], predict_masks(model, some), data.test.classes or [])
        return {"Test pictures, their true masks (white: ignored) and what the student says": figure}


TASK = Segmentation()

"""Detection: boxes and classes of the objects on a picture."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from limbeck.data import Data, Samples, load_detection
from limbeck.errors import UserError
from limbeck.evaluate import DetectionEvaluator, detect_all
from limbeck.models.detection import Targets, load_detector
from limbeck.recipes.tasks.task import Evaluator, Task
from limbeck.report.boxes import boxes_figure

SHOWN = 3


class Detection(Task):
    """COCO's average precision, and the recall of each class.

    The stream `target` draws from the unlabelled split, the pictures of the domain that a detector is adapted to.
    """

    name = "detection"
    columns = ("map50", "map", "parameters", "latency_ms", "seconds")
    load_data = staticmethod(load_detection)
    load_model = staticmethod(load_detector)

    def shape(self, data: Data, section: str) -> dict[str, Any]:
        return {"num_classes": data.num_classes, "in_channels": self.example(data).shape[1]}

    def samples(self, data: Data, stream: str) -> Samples:
        if stream not in ("target", "unlabelled"):
            return super().samples(data, stream)
        if data.unlabelled is None:
            raise UserError(
                f"the method needs the stream '{stream}', but the data have no unlabelled pictures; set "
                "data.target_fraction or data.labelled_fraction, or add an 'unlabelled' split"
            )
        return data.unlabelled

    def evaluator(self, data: Data) -> Evaluator:
        return DetectionEvaluator()

    def exhibits(self, model: nn.Module, data: Data) -> dict[str, Figure]:
        rows = torch.linspace(0, len(data.test) - 1, min(SHOWN, len(data.test))).long()
        batch = data.test.batch(rows)
        truth, found = Targets(batch["boxes"], batch["box_labels"]), detect_all(model, data.test, rows=rows)
        figure = boxes_figure(batch["image"], truth, found, data.test.classes or [])
        return {"Test pictures, their true boxes and what the student finds": figure}


TASK = Detection()

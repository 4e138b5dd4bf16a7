"""Training a detector on boxes: the reference of every detection system, and how source models are made.

    L = sum of the detector's own losses on the labelled pictures

(for Faster R-CNN: objectness and box losses of its proposals, class and box losses of its regions).
"""

from __future__ import annotations

from typing import cast

from torch import nn

from limbeck.errors import UserError
from limbeck.models.detection import Detector, Targets
from limbeck.train import Batch, Losses, Method


class SupervisedDetection(Method):
    """The detector's own losses.

    Everything is local to a picture: several processes see other pictures and average their gradients.

    Args:
        student: any `limbeck.models.detection.Detector`.

    Raises:
        UserError: the student is no detector.
    """

    streams = {"labelled": ("weak", "boxes", "box_labels")}

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        if not isinstance(student, Detector):
            raise UserError(f"{type(student).__name__} is no detector: give one of limbeck.models.detection.")
        self.student = student

    def training_step(self, batch: Batch) -> Losses:
        labelled = batch["labelled"]
        targets = Targets(labelled["weak_boxes"], labelled["weak_box_labels"])
        return cast(Detector, self.student).losses(labelled["weak"], targets)

"""Cross-entropy on the labelled pixels: the reference that others are compared with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from limbeck.data import Stream
from limbeck.losses import pixel_cross_entropy
from limbeck.models import require_classes
from limbeck.train import Batch, Losses, Method


class SupervisedSegmentation(Method):
    """Mean cross-entropy over the pixels that have a class.

    Args:
        student: pictures to logits [B, C, H, W].

    Raises:
        UserError: the masks have other classes than the student.
    """

    streams = {"labelled": ("weak", "weak_mask")}

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def prepare(self, streams: Mapping[str, Stream]) -> None:
        require_classes(self.student, streams["labelled"].samples.num_classes)

    def training_step(self, batch: Batch) -> Losses:
        labelled = batch["labelled"]
        return {"ce": pixel_cross_entropy(self.student(labelled["weak"]), labelled["weak_mask"], reduction="mean")}

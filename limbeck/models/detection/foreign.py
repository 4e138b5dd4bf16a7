"""Detectors of transformers and of torchvision behind our protocol.

Shapes: B images, Q queries of an image, M boxes of an image (padded), K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.models.detection.assign import Targets
from limbeck.models.detection.boxes import best, clip_boxes
from limbeck.models.detection.two_stage import Detections
from limbeck.models.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from limbeck.models.unwrap import LogitsOf

DEFAULT_SCALE = (IMAGENET_MEAN, IMAGENET_STD)


class TransformersDetector(LogitsOf):
    """A model of the DETR family (DETR, Conditional and Deformable DETR, RT-DETR, YOLOS, ...) as a `Detector`.

    It trains by its own set loss (Hungarian matching) and needs no suppression: `detect` gives its `most` best queries
    with a score above `score`. Pictures are normalised as `scale` (mean, std) says.
    """

    def __init__(
        self, model: nn.Module, scale: tuple[Any, Any] = DEFAULT_SCALE, score: float = 0.05, most: int = 100
    ) -> None:
        super().__init__(model)
        self.normalize = Normalize(*scale)
        self.score, self.most = score, most
        config: Any = model.config
        self.num_classes: int = config.num_labels

    def forward(self, images_BCHW: Tensor) -> Detections:
        return self.detect(images_BCHW)

    def losses(self, images_BCHW: Tensor, targets: Targets) -> dict[str, Tensor]:
        """`set_loss`, the network's own weighted sum."""
        height, width = images_BCHW.shape[-2:]
        scale = targets.boxes.new_tensor([width, height, width, height])
        boxes = targets.boxes / scale
        centred = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)
        labels = [
            {"class_labels": label[valid], "boxes": box[valid]}
            for label, box, valid in zip(targets.labels, centred, targets.valid, strict=True)
        ]
        return {"set_loss": self.model(pixel_values=self.normalize(images_BCHW), labels=labels).loss}

    def detect(self, images_BCHW: Tensor) -> Detections:
        outputs = self.model(pixel_values=self.normalize(images_BCHW))
        scores_BQK = _class_scores(outputs.logits.float(), self.num_classes)
        centre, size = outputs.pred_boxes.float().split(2, -1)
        height, width = images_BCHW.shape[-2:]
        corners = torch.cat([centre - size / 2, centre + size / 2], -1)
        corners = clip_boxes(corners * corners.new_tensor([width, height, width, height]), height, width)
        boxes_BN4 = corners[:, :, None].expand(-1, -1, self.num_classes, -1).flatten(1, 2)
        labels_BN = torch.arange(self.num_classes, device=centre.device).repeat(corners.shape[1])
        labels_BN = labels_BN.expand(len(corners), -1)
        scores_BM, boxes_BM4, labels_BM = best(scores_BQK.flatten(1), self.most, boxes_BN4, labels_BN)
        found_BM = scores_BM > self.score
        return Detections(
            torch.where(found_BM[..., None], boxes_BM4, 0.0),
            scores_BM.masked_fill(~found_BM, 0.0),
            labels_BM.masked_fill(~found_BM, -1),
        )


def _class_scores(logits_BQC: Tensor, num_classes: int) -> Tensor:
    """[B, Q, K]: a softmax where the network has a class for "no object" (the last), else independent sigmoids."""
    if logits_BQC.shape[-1] == num_classes + 1:
        return logits_BQC.softmax(-1)[..., :-1]
    return logits_BQC.sigmoid()


class TorchvisionDetector(nn.Module):
    """One of torchvision's detectors as a `Detector`; class 0 is their background.

    Their losses exist in training mode and their detections in eval mode only, so each call sets the mode that it needs
    and gives back the one that was.
    """

    def __init__(self, model: nn.Module, num_classes: int, most: int = 100) -> None:
        super().__init__()
        self.model, self.num_classes, self.most = model, num_classes, most

    def forward(self, images_BCHW: Tensor) -> Detections:
        return self.detect(images_BCHW)

    def losses(self, images_BCHW: Tensor, targets: Targets) -> dict[str, Tensor]:
        """Their own loss terms."""
        wanted = [
            {"boxes": box[valid], "labels": label[valid] + 1}
            for box, label, valid in zip(targets.boxes, targets.labels, targets.valid, strict=True)
        ]
        return self._in_mode(True, list(images_BCHW), wanted)

    def detect(self, images_BCHW: Tensor) -> Detections:
        found = self._in_mode(False, list(images_BCHW))
        boxes = images_BCHW.new_zeros(len(found), self.most, 4)
        scores = images_BCHW.new_zeros(len(found), self.most)
        labels = torch.full((len(found), self.most), -1, device=images_BCHW.device)
        for row, one in enumerate(found):
            count = min(self.most, len(one["scores"]))
            boxes[row, :count], scores[row, :count] = one["boxes"][:count], one["scores"][:count]
            labels[row, :count] = one["labels"][:count] - 1
        return Detections(boxes, scores, labels)

    def _in_mode(self, training: bool, *inputs: Any) -> Any:
        before = self.model.training
        self.model.train(training)
        try:
            return self.model(*inputs)
        finally:
            self.model.train(before)

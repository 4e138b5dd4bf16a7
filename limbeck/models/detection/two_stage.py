"""A Faster R-CNN in plain PyTorch, and what every detector answers.

Shapes: B images, A anchors, R regions (proposals) of an image, S sampled regions, M boxes of an image (padded),
K classes (K is background), D width of a region's feature, h and w of the feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.detection.assign import Sampled, Targets, balanced_sample, match, sample_regions
from limbeck.models.detection.boxes import (
    anchor_grid,
    best,
    box_area,
    clip_boxes,
    decode_boxes,
    nms,
    pairwise_iou,
)
from limbeck.models.detection.losses import RPN_WEIGHTS, region_losses, rpn_losses
from limbeck.models.detection.roi_align import roi_align
from limbeck.models.normalize import Normalize


class Detections(NamedTuple):
    """What a detector finds on B images, best first: `boxes` [B, M, 4] in pixels, clipped to the picture, `scores`
    [B, M] in [0, 1], `labels` int64 [B, M]; padded with label -1, score 0 and boxes of zeros."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@runtime_checkable
class Detector(Protocol):
    """What every detector answers, ours, transformers' and torchvision's alike."""

    num_classes: int

    def losses(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The training losses by name, scalars whose sum is trained; pictures [B, C, H, W] in [0, 1]."""
        ...

    def detect(self, images: Tensor) -> Detections:
        """What is on these pictures [B, C, H, W] in [0, 1]."""
        ...


class Features(NamedTuple):
    """A backbone's map [B, C, h, w] and the size in pixels of the pictures that it was made from."""

    map: Tensor
    height: int
    width: int


class Rpn(NamedTuple):
    """Of every anchor: objectness `logits` [B, A], `deltas` [B, A, 4]; and the `anchors` [A, 4]."""

    logits: Tensor
    deltas: Tensor
    anchors: Tensor


class Proposals(NamedTuple):
    """Regions that may hold objects, best first: `boxes` [B, R, 4], clipped; objectness `scores` [B, R] (logits);
    `valid` [B, R], False in empty slots, whose boxes are zeros."""

    boxes: Tensor
    scores: Tensor
    valid: Tensor


class Scored(NamedTuple):
    """What the region head says of given boxes: `logits` [B, R, K+1] with background last, `deltas` [B, R, K, 4]
    (K = 1 for a class-agnostic head) and `features` [B, R, D], the pooled vector that both are read from."""

    logits: Tensor
    deltas: Tensor
    features: Tensor


@dataclass(frozen=True)
class TwoStageSettings:
    """Everything of a two-stage detector that is no weight. The defaults fit objects of 8-60 pixels on pictures of
    about 160x120; those of R50-C4 are `C4_SETTINGS`.

    Args:
        anchor_sizes, anchor_ratios: square roots of anchors' areas in pixels; heights over widths.
        rpn_iou: an anchor is background below the first and an object from the second on.
        rpn_samples, rpn_positive_share: anchors trained on in each image, and how many of them at most are objects.
        rpn_before: anchors per image before suppression, in training and test mode; `rpn_after`: proposals left.
        rpn_nms: IoU from which a proposal is suppressed.
        samples, positive_share, iou: regions that the head trains on, the share of objects, the IoU of an object.
        bins, sampling_ratio: of RoIAlign.
        score, nms, candidates, most: detections have at least this score, suppress their own class from this IoU on,
            are chosen among that many candidates, and are at most so many on a picture.
        class_agnostic: one box regression for all classes.
    """

    anchor_sizes: Sequence[float] = (10.0, 18.0, 28.0, 48.0)
    anchor_ratios: Sequence[float] = (1.0,)
    rpn_iou: tuple[float, float] = (0.3, 0.7)
    rpn_samples: int = 128
    rpn_positive_share: float = 0.5
    rpn_before: tuple[int, int] = (400, 300)
    rpn_after: tuple[int, int] = (150, 100)
    rpn_nms: float = 0.7
    samples: int = 64
    positive_share: float = 0.25
    iou: float = 0.5
    bins: int = 6
    sampling_ratio: int = 1
    score: float = 0.05
    nms: float = 0.5
    candidates: int = 300
    most: int = 100
    class_agnostic: bool = False


C4_SETTINGS: dict[str, Any] = {
    "anchor_sizes": (128.0, 256.0, 512.0),
    "anchor_ratios": (0.5, 1.0, 2.0),
    "rpn_samples": 256,
    "rpn_before": (12000, 6000),
    "rpn_after": (2000, 300),
    "samples": 512,
    "bins": 14,
    "candidates": 1000,
}


class TwoStageDetector(nn.Module):
    """Backbone, region proposals, RoIAlign and a region head with class-specific box regression.

    Its parts are called one by one by the systems that need more than `losses` and `detect`: `features`, `rpn`,
    `propose`, `pool`, `score_boxes` (any boxes, given from outside), `select`, `rpn_losses`, `sample`,
    `region_losses`. All work on padded batches; nothing loops over images.

    Everything is local to an image, and losses are means over the images of this process: averaged gradients of
    several processes equal those of one with all the images up to the number of regions found in each.

    Args:
        backbone: pictures to a map; has `stride` and `channels`.
        head: pooled regions [N, C, P, P] to features [N, D]; has `channels` (D).
        normalize: mean and standard deviation of each channel.

    Source: Faster R-CNN (Ren et al. 2015); samplers and normalisers as in detectron2.
    """

    origin: dict[str, Any]

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        num_classes: int,
        settings: TwoStageSettings,
        normalize: tuple[Sequence[float], Sequence[float]] = ((0.5,) * 3, (0.25,) * 3),
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(f"A detector needs at least one class, got num_classes={num_classes}.")
        self.num_classes, self.settings = num_classes, settings
        self.normalize = Normalize(*normalize)
        self.backbone, self.head = backbone, head
        channels: Any = backbone.channels
        hidden: Any = head.channels
        stride: Any = backbone.stride
        self.stride: int = stride
        anchors = len(settings.anchor_sizes) * len(settings.anchor_ratios)
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_objectness = nn.Conv2d(channels, anchors, 1)
        self.rpn_deltas = nn.Conv2d(channels, anchors * 4, 1)
        self.box_regressor = nn.Linear(hidden, 4 if settings.class_agnostic else num_classes * 4)
        self.classifier = nn.Linear(hidden, num_classes + 1)
        for layer, deviation in (
            (self.rpn_conv, 0.01),
            (self.rpn_objectness, 0.01),
            (self.rpn_deltas, 0.01),
            (self.classifier, 0.01),
            (self.box_regressor, 0.001),
        ):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.constant_(layer.bias, 0.0)  # type: ignore[arg-type]

    # -- the whole ----------------------------------------------------------------------------------------------

    def forward(self, images_BCHW: Tensor) -> Detections:
        return self.detect(images_BCHW)

    def losses(self, images_BCHW: Tensor, targets: Targets) -> dict[str, Tensor]:
        """`rpn_objectness`, `rpn_box`, `region_class`, `region_box`; draws the sampled anchors and regions."""
        return self.losses_from(self.features(images_BCHW), targets)

    def losses_from(self, features: Features, targets: Targets) -> dict[str, Tensor]:
        """`losses` of pictures whose features are known."""
        rpn = self.rpn(features)
        sampled = self.sample(self.propose(rpn, features, training=True), targets)
        return {
            **self.rpn_losses(rpn, targets),
            **self.region_losses(self.score_boxes(features, sampled.boxes), sampled),
        }

    def detect(self, images_BCHW: Tensor) -> Detections:
        """The detections of test mode."""
        features = self.features(images_BCHW)
        proposals = self.propose(self.rpn(features), features)
        return self.select(self.score_boxes(features, proposals.boxes), proposals.boxes, proposals.valid, features)

    # -- its parts ----------------------------------------------------------------------------------------------

    def features(self, images_BCHW: Tensor) -> Features:
        """The backbone's map."""
        return Features(self.backbone(self.normalize(images_BCHW)), *images_BCHW.shape[-2:])

    def rpn(self, features: Features) -> Rpn:
        """What the region proposal network says of every anchor."""
        hidden = F.relu(self.rpn_conv(features.map))
        logits_BA = self.rpn_objectness(hidden).permute(0, 2, 3, 1).flatten(1)
        deltas_BA4 = self.rpn_deltas(hidden).permute(0, 2, 3, 1).reshape(len(hidden), -1, 4)
        s = self.settings
        height, width = hidden.shape[-2:]
        anchors_A4 = anchor_grid(height, width, self.stride, s.anchor_sizes, s.anchor_ratios, hidden.device)
        return Rpn(logits_BA, deltas_BA4, anchors_A4)

    @torch.no_grad()
    def propose(self, rpn: Rpn, features: Features, *, training: bool = False) -> Proposals:
        """The best anchors, moved by their deltas, clipped and suppressed. No gradient: boxes are inputs to the head.

        `training` chooses how many there are; test mode's number is the one that adaptation mines.
        """
        s, mode = self.settings, 0 if training else 1
        anchors = rpn.anchors.expand(len(rpn.logits), -1, -1)
        scores, deltas, anchors = best(rpn.logits.float(), s.rpn_before[mode], rpn.deltas, anchors)
        boxes = clip_boxes(decode_boxes(deltas, anchors, RPN_WEIGHTS), features.height, features.width)
        scores = scores.masked_fill(box_area(boxes) <= 0, -torch.inf)
        scores = scores.masked_fill(~nms(boxes, scores, s.rpn_nms), -torch.inf)
        scores, boxes = best(scores, s.rpn_after[mode], boxes)
        valid = scores > -torch.inf
        return Proposals(torch.where(valid[..., None], boxes, 0.0), scores, valid)

    def pool(self, features: Features, boxes_BR4: Tensor) -> Tensor:
        """RoIAlign features [B, R, C, P, P] of any boxes."""
        return roi_align(features.map, boxes_BR4, self.stride, self.settings.bins, self.settings.sampling_ratio)

    def score_boxes(self, features: Features, boxes_BR4: Tensor) -> Scored:
        """The region head's answer for any boxes: no suppression, no threshold."""
        pooled = self.pool(features, boxes_BR4)
        features_BRD = self.head(pooled.flatten(0, 1)).unflatten(0, pooled.shape[:2])
        deltas_BRK4 = self.box_regressor(features_BRD).unflatten(-1, (-1, 4))
        return Scored(self.classifier(features_BRD), deltas_BRK4, features_BRD)

    @torch.no_grad()
    def select(self, scored: Scored, boxes_BR4: Tensor, valid_BR: Tensor, features: Features) -> Detections:
        """Each region's box for each class, thresholded, suppressed within its class, the best `most` of a picture."""
        s, classes = self.settings, self.num_classes
        decoded_BRK4 = decode_boxes(scored.deltas, boxes_BR4[:, :, None]).expand(-1, -1, classes, -1)
        decoded_BN4 = clip_boxes(decoded_BRK4, features.height, features.width).flatten(1, 2)
        scores_BN = scored.logits.float().softmax(-1)[..., :-1].flatten(1)
        allowed_BN = valid_BR[..., None].expand(-1, -1, classes).flatten(1) & (box_area(decoded_BN4) > 0)
        scores_BN = scores_BN.masked_fill(~allowed_BN | (scores_BN <= s.score), -torch.inf)
        labels_BN = torch.arange(classes, device=scores_BN.device).repeat(boxes_BR4.shape[1]).expand_as(scores_BN)
        scores_BN, boxes_BN4, labels_BN = best(scores_BN, s.candidates, decoded_BN4, labels_BN)
        scores_BN = scores_BN.masked_fill(~nms(boxes_BN4, scores_BN, s.nms, labels_BN), -torch.inf)
        scores_BM, boxes_BM4, labels_BM = best(scores_BN, s.most, boxes_BN4, labels_BN)
        found_BM = scores_BM > -torch.inf
        return Detections(
            torch.where(found_BM[..., None], boxes_BM4, 0.0),
            scores_BM.masked_fill(~found_BM, 0.0),
            labels_BM.masked_fill(~found_BM, -1),
        )

    def rpn_losses(self, rpn: Rpn, targets: Targets) -> dict[str, Tensor]:
        """`rpn_objectness` and `rpn_box` on a random choice of anchors."""
        s = self.settings
        iou_BAM = pairwise_iou(rpn.anchors[None], targets.boxes)
        matched_BA = match(iou_BAM, targets.valid, s.rpn_iou[1], s.rpn_iou[0], best_for_target=True)
        chosen_BA = balanced_sample(matched_BA, s.rpn_samples, s.rpn_positive_share)
        normalizer = float(s.rpn_samples * len(rpn.logits))
        objectness, box = rpn_losses(*rpn, matched_BA, chosen_BA, targets, normalizer=normalizer)
        return {"rpn_objectness": objectness, "rpn_box": box}

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets) -> Sampled:
        """The regions that the head is trained on: proposals and the targets themselves, matched and sampled."""
        s = self.settings
        return sample_regions(
            proposals.boxes,
            proposals.valid,
            targets,
            num_classes=self.num_classes,
            count=s.samples,
            positive_share=s.positive_share,
            iou=s.iou,
        )

    def region_losses(self, scored: Scored, sampled: Sampled) -> dict[str, Tensor]:
        """`region_class` and `region_box`; for other weights call `limbeck.models.detection.region_losses`."""
        class_loss, box_loss = region_losses(scored.logits, scored.deltas, sampled)
        return {"region_class": class_loss, "region_box": box_loss}


def as_targets(detections: Detections, keep_BM: Tensor) -> Targets:
    """The detections that `keep_BM` is True for as training targets; the others become padding."""
    keep_BM = keep_BM & (detections.labels >= 0)
    return Targets(torch.where(keep_BM[..., None], detections.boxes, 0.0), detections.labels.masked_fill(~keep_BM, -1))

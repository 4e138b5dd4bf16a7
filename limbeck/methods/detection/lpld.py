"""LPLD: source-free adaptation of a detector that also learns from the proposals its confident boxes leave uncovered.

Yoon et al.: Enhancing Source-Free Domain Adaptive Object Detection with Low-Confidence Pseudo Label Distillation,
ECCV 2024 (arXiv 2407.13524).

Teacher (theta_T) and student (theta_S) start from the source model. For a target picture with views weak and strong:

    HPL   = teacher's detections on weak with score > 0.7
    L_det = the detector's losses of the student on strong against HPL
    LPL   = teacher's proposals P, logits y_T, with  max IoU(refined P, HPL) <= 0.4,
            max p >= 0.9 for p = softmax(y_T without background),  and  softmax(y_T)_background <= 0.99
    L_lpl = 1/10 1/|LPL| sum_i w_i KL([p_i, 1e-9] || softmax(y_S,i)),   w_i = 1 - cos(g_S,i , g_T,i), detached
    L     = L_det + L_lpl;   after each epoch  theta_T <- 0.75 theta_T + 0.25 theta_S

where g and y are features and logits of the same proposals in both networks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.errors import UserError, require_share
from limbeck.labels import confident_boxes, uncovered
from limbeck.losses import cosine_distance, reduce, soft_cross_entropy
from limbeck.models.detection import (
    Proposals,
    Scored,
    Targets,
    TwoStageDetector,
    as_targets,
    decode_boxes,
    deltas_of,
    pairwise_iou,
)
from limbeck.teachers import EMA
from limbeck.train import Batch, Fields, Losses, Method

BACKGROUND_MASS = 1e-9  # what the target keeps of the background


class Foreground(NamedTuple):
    """Of logits [..., K+1]: the classes' distribution among themselves `classes` [..., K], and `background` [...],
    the background's share of the whole softmax."""

    classes: Tensor
    background: Tensor


def without_background(logits: Tensor) -> Foreground:
    """p = softmax over the K foreground classes alone, and softmax(logits)_background. Background is last."""
    logits = logits.detach().float()
    return Foreground(logits[..., :-1].softmax(-1), logits.softmax(-1)[..., -1])


def refined_boxes(proposals_BR4: Tensor, scored: Scored) -> Tensor:
    """The proposals [B, R, 4] moved by the deltas of their most likely class; as they are where that is background.

    Not clipped to the picture.
    """
    label_BR = scored.logits.argmax(-1)
    moved_BR4 = decode_boxes(deltas_of(scored.deltas, label_BR), proposals_BR4)
    return torch.where((label_BR == scored.logits.shape[-1] - 1)[..., None], proposals_BR4, moved_BR4)


def low_confidence(
    proposals: Proposals, scored: Scored, confident: Targets, *, iou: float, certainty: float, background: float
) -> Tensor:
    """LPL: bool [B, R], the teacher's proposals that become low-confidence pseudo labels.

    Kept: refined boxes that no confident box covers (max IoU <= `iou`), whose best class has at least `certainty` among
    the classes, and whose background share is at most `background`. Nothing where a picture has no confident box.
    """
    refined_BR4 = refined_boxes(proposals.boxes, scored)
    free_BR = uncovered(pairwise_iou(refined_BR4, confident.boxes), confident.labels, iou)
    p = without_background(scored.logits)
    sure_BR = (p.classes.amax(-1) >= certainty) & (p.background <= background)
    return proposals.valid & free_BR & sure_BR & confident.valid.any(-1, keepdim=True)


def on_objects(boxes_BR4: Tensor, labels_BR: Tensor, truth: Targets) -> Tensor:
    """bool [B, R]: boxes that overlap a true box of their class by an IoU of at least 0.5."""
    same_BRM = labels_BR[..., None] == truth.labels[:, None]
    return ((pairwise_iou(boxes_BR4, truth.boxes) >= 0.5) & same_BRM & truth.valid[:, None]).any(-1)


def distillation_loss(student: Scored, teacher: Scored, kept_BR: Tensor) -> Tensor:
    """(1/B) sum over images of (1/M) sum over its M kept regions of w KL([p, 1e-9] || softmax(y_S)); without the 1/10.

    w = 1 - cos(g_S, g_T) in [0, 2] is detached; an image that keeps nothing counts as 0. The sum to 1 + 1e-9 and
    background's mass in softmax(y_S) are meant: the student should call these regions objects.
    """
    target_BRC = nn.functional.pad(without_background(teacher.logits).classes, (0, 1), value=BACKGROUND_MASS)
    # xlogy: a teacher so sure that a class's probability rounds to 0 must not give 0 * log 0.
    negative_entropy_BR = torch.xlogy(target_BRC, target_BRC).sum(-1)
    kl_BR = soft_cross_entropy(student.logits, target_BRC, reduction="none") + negative_entropy_BR
    weight_BR = cosine_distance(student.features.detach(), teacher.features.detach(), reduction="none")
    kept_of_image_B1 = kept_BR.sum(-1, keepdim=True).clamp(min=1)
    return reduce(kl_BR / kept_of_image_B1, reduction="batchmean", weight=weight_BR, mask=kept_BR)


class LPLD(Method):
    """Mean teacher on confident boxes, plus distillation on low-confidence proposals.

    All of it is local to a picture: several processes adapt on other pictures and average their gradients.

    Args:
        student: the source model, a two-stage detector; the teacher starts as its copy.
        score: teacher's detections above it are confident boxes (HPL).
        iou, certainty, background: limits of the low-confidence labels, see `low_confidence`.
        scale: of L_lpl; 0 leaves the plain mean teacher.
        ema_decay: share of itself that the teacher keeps, over all weights and buffers.
        ema_every: when the teacher moves: after each `epoch` (official code) or `step`, where about 0.999 keeps the two
            networks apart.
        ship: the `teacher` or the `student`; the official script saves and tests both.

    Raises:
        UserError: the student is no two-stage detector, or a setting is out of range.
    """

    streams = {"target": ("weak", "strong")}
    epoch_stream = "target"

    student: TwoStageDetector

    def __init__(
        self,
        student: nn.Module,
        *,
        score: float = 0.7,
        iou: float = 0.4,
        certainty: float = 0.9,
        background: float = 0.99,
        scale: float = 0.1,
        ema_decay: float = 0.75,
        ema_every: Literal["epoch", "step"] = "epoch",
        ship: Literal["teacher", "student"] = "teacher",
    ) -> None:
        super().__init__()
        require_share(score=score, iou=iou, certainty=certainty, background=background, ema_decay=ema_decay)
        if not isinstance(student, TwoStageDetector):
            raise UserError(
                f"LPLD scores the teacher's proposals in both networks, which {type(student).__name__} does not do: "
                "give a two-stage detector, 'compact' or 'resnet-c4'."
            )
        self.student = student
        self.teacher = EMA(student, ema_decay, buffers="average")
        self.score, self.iou, self.certainty, self.background = score, iou, certainty, background
        self.scale, self.ema_every, self.ship = scale, ema_every, ship

    def training_step(self, batch: Batch) -> Losses:
        weak, strong = batch["target"]["weak"], batch["target"]["strong"]
        proposals, scored, confident = self.watch(weak)
        kept_BR = low_confidence(
            proposals, scored, confident, iou=self.iou, certainty=self.certainty, background=self.background
        )

        features = self.student.features(strong)
        losses = self.student.losses_from(features, confident)
        student = self.student.score_boxes(features, proposals.boxes)
        losses["lpl"] = self.scale * distillation_loss(student, scored, kept_BR)

        self._log_labels(proposals, scored, kept_BR, confident, batch["target"])
        return losses

    @torch.no_grad()
    def _log_labels(
        self, proposals: Proposals, scored: Scored, kept_BR: Tensor, confident: Targets, target: Fields
    ) -> None:
        """Labels of both kinds per picture, and how many of them are right where the data keep hidden boxes."""
        self.log(confident_boxes=confident.valid.float().sum(-1).mean(), low_confidence=kept_BR.float().sum(-1).mean())
        if "weak_boxes" in target:  # only measured
            truth = Targets(target["weak_boxes"], target["weak_box_labels"])
            label_BR = scored.logits[..., :-1].argmax(-1)
            refined_BR4 = refined_boxes(proposals.boxes, scored)
            right_BR = on_objects(refined_BR4, label_BR, truth) & kept_BR
            right_BM = on_objects(confident.boxes, confident.labels, truth) & confident.valid
            self.log(
                confident_right=right_BM.float().sum(-1).mean(), low_confidence_right=right_BR.float().sum(-1).mean()
            )

    @torch.no_grad()
    def watch(self, weak: Tensor) -> tuple[Proposals, Scored, Targets]:
        """What the teacher says of the weak view: its test-mode proposals, their scores, and the confident boxes."""
        teacher: TwoStageDetector = self.teacher.model  # type: ignore[assignment]
        features = teacher.features(weak)
        proposals = teacher.propose(teacher.rpn(features), features)
        scored = teacher.score_boxes(features, proposals.boxes)
        found = teacher.select(scored, proposals.boxes, proposals.valid, features)
        return proposals, scored, as_targets(found, confident_boxes(found.scores, found.labels, self.score))

    def after_step(self) -> None:
        if self.ema_every == "step":
            self.teacher.update(self.student, self.clock.step)

    def after_epoch(self) -> None:
        if self.ema_every == "epoch":
            self.teacher.update(self.student, self.clock.step)

    def shipped(self) -> nn.Module:
        return self.teacher.model if self.ship == "teacher" else self.student

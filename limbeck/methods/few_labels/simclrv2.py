"""SimCLRv2: pre-train a big network without labels, fine-tune it on few, distil it on the unlabelled samples.

Chen, Kornblith, Swersky, Norouzi, Hinton: Big Self-Supervised Models are Strong Semi-Supervised Learners,
NeurIPS 2020; google-research/simclr.

    1. z = g(f(x)) of two views a, b, of unit length; with sim = z . z' / tau over the 2B - 1 other views,
           L = mean_i CE(a_i finds b_i) + mean_i CE(b_i finds a_i)                 (a sum: twice the usual mean)
    2. h(g_1(f(x))) on the labels, from the first layer g_1 of the projector with a new linear head h
    3. L = -(1 - alpha) mean_labelled log P_S(y | x) - alpha t^2 mean_x sum_y P_T(y | x; t) log P_S(y | x; t)

Shapes: B samples, D width of the features, C classes.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data import Data
from limbeck.distributed import gather_with_gradient, rank
from limbeck.errors import UserError, require_positive, require_share
from limbeck.losses import nt_xent, soft_cross_entropy
from limbeck.models import Projector, split_head
from limbeck.teachers import Frozen, Teacher
from limbeck.train import Batch, CrossEntropy, Losses, Method, Stage, Workspace


def simclrv2(
    ws: Workspace,
    data: Data,
    student: nn.Module,
    teacher: nn.Module,
    *,
    pretrain: Stage,
    finetune: Stage,
    self_distill: Stage | None = None,
    distill: Stage | None = None,
    temperature: float = 0.1,
    projection_layers: int = 3,
    projection_width: int = 128,
    finetune_layer: int = 1,
    distill_temperature: float = 1.0,
    alpha: float = 1.0,
    distill_on: Literal["unlabelled", "labelled"] = "unlabelled",
) -> nn.Module:
    """The three stages. Ships the student, or the fine-tuned teacher where there is no stage `distill`.

    Args:
        student, teacher: classifiers [B, C] with a linear head; the teacher is the big one.
        pretrain: streams `unlabelled` with the views `first` and `second`.
        finetune: stream `labelled` with the view `weak`.
        self_distill: the teacher teaches a fresh copy of its own architecture first, which then teaches the student.
        distill: stream `unlabelled` with the view `weak`; with alpha < 1 `labelled` too.
        temperature: tau of the contrastive loss; 0.1 for ImageNet, 0.5 in the paper's CIFAR-10 recipe.
        projection_layers, projection_width: of g.
        finetune_layer: how many layers of g the classifier keeps; 0 is SimCLR's way.
        distill_temperature: t > 0.
        alpha: share of the teacher's term in [0, 1]; with 1 no label is read.
        distill_on: the pool that is distilled on; `labelled` is the paper's ablation.

    Raises:
        UserError: an argument out of range, a network without linear head, or data without unlabelled samples.
    """
    require_positive(temperature=temperature, distill_temperature=distill_temperature)
    require_share(alpha=alpha)
    if not 0 <= finetune_layer <= projection_layers:
        raise UserError(
            f"finetune_layer is {finetune_layer}; it is between 0 and projection_layers={projection_layers}"
        )
    if data.unlabelled is None:
        raise UserError(
            "simclrv2 pre-trains on unlabelled samples and the data have none; set data.labels_per_class or "
            "data.labelled_fraction, or add an 'unlabelled' split"
        )
    architecture = copy.deepcopy(teacher)
    encoder, head = split_head(teacher)
    projector = Projector(head.in_features, out=projection_width, layers=projection_layers)

    contrast = SimCLR(encoder, projector, temperature=temperature)
    contrast = ws.fit("pretrain", contrast, pretrain.on(unlabelled=data.unlabelled), pretrain.trainer)

    width = projector.widths[finetune_layer]
    classifier = Classifier(contrast.student, contrast.projector.first(finetune_layer), width, head.out_features)
    tuned = ws.fit(
        "finetune",
        CrossEntropy(classifier),
        finetune.on(labelled=data.train),
        finetune.trainer,
        validation=data.validation,
    ).student
    if distill is None:
        return tuned

    pool = data.unlabelled if distill_on == "unlabelled" else data.train

    def taught(stage: str, settings: Stage, network: nn.Module, by: nn.Module) -> nn.Module:
        method = Distill(network, Frozen(by), temperature=distill_temperature, alpha=alpha)
        labelled = {"labelled": data.train} if alpha < 1 else {}
        streams = settings.on(unlabelled=pool, **labelled)
        return ws.fit(stage, method, streams, settings.trainer, validation=data.validation).student

    if self_distill is not None:
        tuned = taught("self_distill", self_distill, architecture, tuned)
    return taught("distill", distill, student, tuned)


class SimCLR(Method):
    """Stage 1: each view finds the other one of its sample among all views of the batch, of all processes.

    Args:
        student: the encoder f, inputs to features [B, D].
        projector: g, [B, D] to [B, P].
        temperature: tau.
    """

    streams = {"unlabelled": ("first", "second")}
    epoch_stream = "unlabelled"

    def __init__(self, student: nn.Module, projector: Projector, *, temperature: float) -> None:
        super().__init__()
        self.student, self.projector, self.temperature = student, projector, temperature

    def training_step(self, batch: Batch) -> Losses:
        views = torch.cat([batch["unlabelled"]["first"], batch["unlabelled"]["second"]])
        first_BP, second_BP = F.normalize(self.projector(self.student(views)).float(), dim=1).chunk(2)
        loss = nt_xent(
            first_BP,
            second_BP,
            first_keys_KD=gather_with_gradient(first_BP),
            second_keys_KD=gather_with_gradient(second_BP),
            offset=rank() * len(first_BP),
            temperature=self.temperature,
            normalize=False,
            halves="sum",
            reduction="mean",
        )
        return {"contrast": loss}


class Classifier(nn.Module):
    """Encoder, the first layers of the projector, and a new linear head that starts as N(0, 0.01)."""

    def __init__(self, encoder: nn.Module, projection: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.projection, self.head = encoder, projection, nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        for parameter in self.head.parameters():
            parameter.spared = True  # type: ignore[attr-defined]  # neither decayed nor adapted by LARS

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.head(self.projection(self.encoder(image_BCHW)))


class Distill(Method):
    """Stage 3: the teacher's probabilities on the pool, from the very view that the student sees.

    With `alpha` = 1 there is no stream `labelled` at all.
    """

    epoch_stream = "unlabelled"

    def __init__(self, student: nn.Module, teacher: Teacher, *, temperature: float = 1.0, alpha: float = 1.0) -> None:
        super().__init__()
        self.student, self.teacher, self.temperature = student, teacher, temperature
        self.weights = {"ce": 1 - alpha, "distill": alpha}
        self.streams = {"unlabelled": ("weak",), **({"labelled": ("weak", "label")} if alpha < 1 else {})}

    def training_step(self, batch: Batch) -> Losses:
        unlabelled, t = batch["unlabelled"], self.temperature
        target_BC = (self.teacher.logits(unlabelled, "weak") / t).softmax(-1)
        logits_BC = self.student(unlabelled["weak"]).float()
        losses = {"distill": t**2 * soft_cross_entropy(logits_BC / t, target_BC, reduction="batchmean")}
        if "labelled" in batch:
            labelled = batch["labelled"]
            losses["ce"] = F.cross_entropy(self.student(labelled["weak"]).float(), labelled["label"])
        return losses

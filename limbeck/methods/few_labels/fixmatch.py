"""FixMatch: confident predictions on weak views are the labels of strong views.

Sohn et al.: FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence, NeurIPS 2020.

With p = softmax(z_weak), detached:

    L = CE(z_labelled, y) + lambda_u (1/Bu) sum_b 1[max p_b >= tau] CE(z_strong, argmax p_b)

The divisor is the whole unlabelled batch, so few confident samples mean a small loss.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from limbeck.errors import require_share
from limbeck.labels import DistributionAlignment, hard, one_hot
from limbeck.losses import soft_cross_entropy
from limbeck.models import find_head
from limbeck.teachers import EMA
from limbeck.train import Batch, Losses, Method


class FixMatch(Method):
    """Supervised cross-entropy, and pseudo-labels with a fixed threshold.

    Labelled, weak and strong samples go through the network in one batch, so BatchNorm sees them together.

    Args:
        student: inputs to logits [B, C].
        threshold: tau in [0, 1].
        unlabelled_weight: lambda_u.
        target: train strong views on the `hard` argmax (the paper) or on the whole `soft` distribution.
        align: divide p by its mean over the last 32 batches and renormalise (distribution alignment).
        ema_decay: of the averaged weights that are evaluated and shipped.

    Raises:
        UserError: the threshold is not in [0, 1], or with `align` the student has no final linear layer.
    """

    streams = {"labelled": ("weak", "label"), "unlabelled": ("weak", "strong")}
    epoch_stream = "unlabelled"

    def __init__(
        self,
        student: nn.Module,
        *,
        threshold: float = 0.95,
        unlabelled_weight: float = 1.0,
        target: Literal["hard", "soft"] = "hard",
        align: bool = False,
        ema_decay: float = 0.999,
    ) -> None:
        super().__init__()
        require_share(threshold=threshold)
        self.student = student
        self.ema = EMA(student, ema_decay)
        self.threshold = threshold
        self.weights = {"unlabelled": unlabelled_weight}
        self.target = target
        self.alignment = DistributionAlignment(find_head(student)[1].out_features) if align else None

    def training_step(self, batch: Batch) -> Losses:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        together = torch.cat([labelled["weak"], unlabelled["weak"], unlabelled["strong"]])
        sizes = [len(labelled["weak"]), len(unlabelled["weak"]), len(unlabelled["strong"])]
        logits_BC, weak_UC, strong_UC = self.student(together).float().split(sizes)

        p_UC = weak_UC.detach().softmax(-1)
        if self.alignment is not None:
            p_UC = self.alignment(p_UC)
        confident_U = (p_UC.amax(-1) >= self.threshold).float()
        target_UC = one_hot(hard(p_UC), p_UC.shape[-1]) if self.target == "hard" else p_UC
        self.log(utilisation=confident_U.mean())
        return {
            "ce": F.cross_entropy(logits_BC, labelled["label"]),
            "unlabelled": soft_cross_entropy(strong_UC, target_UC, weight=confident_U, reduction="batchmean"),
        }

    def after_step(self) -> None:
        self.ema.update(self.student, self.clock.step)

    def shipped(self) -> nn.Module:
        return self.ema.model

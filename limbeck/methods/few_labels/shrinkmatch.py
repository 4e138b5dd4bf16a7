"""ShrinkMatch: FixMatch that also learns from uncertain samples, in a class space without the classes that confuse.

Yang et al.: Shrinking Class Space for Enhanced Certainty in Semi-Supervised Learning, ICCV 2023 (arXiv 2308.06777).

With p = softmax(z_weak), detached, q_0 >= q_1 >= ... its sorted entries and tau the threshold:

    certain (q_0 >= tau):    l_b = sum_c -p_c log softmax(z_strong)_c
    uncertain:               c* = first c in 2..C-1 with q_0 / (q_0 + sum_{j >= c} q_j) >= tau
                             s_b = -q_0 log softmax(aux_strong at ranks {0, c*, ..., C-1})_0, 0 if no c passes
    L = CE(z_labelled, y) + (1/Bu) sum_certain l_b + r (1/Bu) sum_uncertain s_b

where r is the running share of certain samples and aux an auxiliary head that is thrown away in the end.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.distributed import mean_across
from limbeck.errors import require_share
from limbeck.labels import DistributionAlignment, hard, one_hot
from limbeck.losses import soft_cross_entropy
from limbeck.models import split_head
from limbeck.teachers import EMA
from limbeck.train import Batch, Losses, Method


class Shrunk(NamedTuple):
    """Per sample: the loss in the shrunk class space (before any weight), whether a shrunk space passed, and q_0."""

    loss_B: Tensor
    passed_B: Tensor
    confidence_B: Tensor


def shrink(aux_logits_BC: Tensor, probabilities_BC: Tensor, threshold: float) -> Shrunk:
    """Cross-entropy of the top class among the classes that leave it confident.

    Removes the runner-up, then the next, ... until the top class's renormalised probability reaches `threshold`. All
    steps at once: with S_c = sum_{j >= c} q_j the confidences are q_0 / (q_0 + S_c). Where the top class is not
    confident beside the last one alone, and always with two classes, nothing passes: the top class stays by itself and
    the loss is 0.

    aux_logits_BC get the gradient, none at removed classes; probabilities_BC: rows sum to 1, detached by the caller.
    Source: section 3.3 and `shrink_loss` of the official CIFAR code.
    """
    sorted_BC, order_BC = probabilities_BC.sort(dim=-1, descending=True)
    top_B1 = sorted_BC[:, :1]
    tails_BC = sorted_BC.flip(-1).cumsum(-1).flip(-1)
    confident_BK = top_B1 / (top_B1 + tails_BC[:, 2:]) >= threshold
    # Confidence grows with c, so the classes that a sample removes are the runner-up and as many as the c that fail.
    removed_B1 = 1 + (~confident_BK).sum(-1, keepdim=True)
    ranks_C = torch.arange(sorted_BC.shape[-1], device=sorted_BC.device)
    removed_BC = (ranks_C >= 1) & (ranks_C <= removed_B1)
    kept_BC = aux_logits_BC.gather(-1, order_BC).masked_fill(removed_BC, -torch.inf)
    return Shrunk(-kept_BC.log_softmax(-1)[:, 0], confident_BK.any(-1), top_B1.squeeze(-1))


class ShrinkMatch(Method):
    """FixMatch plus the shrunk loss on the samples below the threshold.

    Labelled, weak and strong samples go through the network in one batch; the auxiliary head sees strong ones only.

    Args:
        student: inputs to logits [B, C]; it is taken apart in place: its last linear layer is the main head, what comes
            before feeds both heads.
        threshold: tau in [0, 1].
        target: train certain samples on the whole `soft` distribution (CIFAR code) or its `hard` argmax (STL, SVHN).
        align: divide p by its mean over the last 32 batches and renormalise, for threshold and sorting alike.
        ema_decay: of the averaged weights that are evaluated and shipped.
        ratio_decay: of the running share r of certain samples.

    Raises:
        UserError: the threshold or the decay is not in [0, 1], or the student has no final linear layer.
    """

    streams = {"labelled": ("weak", "label"), "unlabelled": ("weak", "strong")}
    epoch_stream = "unlabelled"

    student: nn.Sequential
    certain_ratio: Tensor

    def __init__(
        self,
        student: nn.Module,
        *,
        threshold: float = 0.95,
        target: Literal["soft", "hard"] = "soft",
        align: bool = False,
        ema_decay: float = 0.999,
        ratio_decay: float = 0.999,
    ) -> None:
        super().__init__()
        require_share(threshold=threshold, ratio_decay=ratio_decay)
        backbone, head = split_head(student)
        self.student = nn.Sequential(OrderedDict(backbone=backbone, head=head))
        self.aux = auxiliary_head(head.in_features, head.out_features)
        self.ema = EMA(self.student, ema_decay)
        self.threshold, self.target, self.ratio_decay = threshold, target, ratio_decay
        self.alignment = DistributionAlignment(head.out_features) if align else None
        self.register_buffer("certain_ratio", torch.tensor(float("nan")))

    def networks(self) -> list[nn.Module]:
        return [*self.student, self.aux]

    def training_step(self, batch: Batch) -> Losses:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        together = torch.cat([labelled["weak"], unlabelled["weak"], unlabelled["strong"]])
        sizes = [len(labelled["weak"]), len(unlabelled["weak"]), len(unlabelled["strong"])]
        backbone, head = self.student
        features = backbone(together)
        logits_BC, weak_UC, strong_UC = head(features).float().split(sizes)
        aux_UC = self.aux(features.split(sizes)[-1]).float()

        p_UC = weak_UC.detach().softmax(-1)
        if self.alignment is not None:
            p_UC = self.alignment(p_UC)
        certain_U = (p_UC.amax(-1) >= self.threshold).float()
        target_UC = one_hot(hard(p_UC), p_UC.shape[-1]) if self.target == "hard" else p_UC
        shrunk = shrink(aux_UC, p_UC, self.threshold)
        used_U = (1 - certain_U) * shrunk.passed_B
        ratio = self._update_ratio(certain_U.mean())

        self._log_use(certain_U, used_U, p_UC, unlabelled.get("hidden_label"))
        return {
            "ce": F.cross_entropy(logits_BC, labelled["label"]),
            "certain": soft_cross_entropy(strong_UC, target_UC, weight=certain_U, reduction="batchmean"),
            # Divided by the whole unlabelled batch, weighted by q_0 (is the sample reliable?) and r (is the model?).
            "shrunk": ratio * (used_U * shrunk.confidence_B * shrunk.loss_B).mean(),
        }

    @torch.no_grad()
    def _update_ratio(self, certain_share: Tensor) -> Tensor:
        """r, the running mean of the share of certain samples; starts at the first batch's share."""
        share = mean_across(certain_share)
        moved = self.ratio_decay * self.certain_ratio + (1 - self.ratio_decay) * share
        # The official CIFAR code starts r anew in every epoch by an oversight; like its STL code, this one goes on.
        self.certain_ratio.copy_(torch.where(self.certain_ratio.isnan(), share, moved))
        return self.certain_ratio.clone()

    def _log_use(self, certain_U: Tensor, used_U: Tensor, p_UC: Tensor, truth_U: Tensor | None) -> None:
        self.log(utilisation=(certain_U + used_U).mean(), certain_share=certain_U.mean())
        if truth_U is not None:  # only measured, where the data keep it
            right_U = (p_UC.argmax(-1) == truth_U).float()
            # A share of the batch and not of its shrunk samples: the mean over steps must not count a step without any.
            self.log(shrunk_right=(right_U * used_U).mean())

    def after_step(self) -> None:
        self.ema.update(self.student, self.clock.step)

    def shipped(self) -> nn.Module:
        return self.ema.model


def auxiliary_head(features: int, classes: int) -> nn.Sequential:
    """The MLP that is trained in shrunk class spaces: D -> D/4 -> D/4 -> C with BatchNorm and LeakyReLU(0.1)."""
    hidden = max(1, features // 4)
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden),
        nn.LeakyReLU(0.1),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        nn.LeakyReLU(0.1),
        nn.Linear(hidden, classes),
    )

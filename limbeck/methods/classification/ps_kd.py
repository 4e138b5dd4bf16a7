"""PS-KD: a network learns from its own predictions of the epoch before.

Kim et al.: Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021 (arXiv 2006.12000).

In epoch e = 0..E-1 with alpha_e = alpha_T (e + 1) / E, and P the softmax that was emitted for a sample one epoch ago
(one-hot in epoch 0):

    t = (1 - alpha_e) onehot(y) + alpha_e P[index]
    L = -(1/B) sum_b sum_c t_bc log softmax(z_b)_c

The gradient is (softmax(z) - t) / B: samples that were learnt well an epoch ago pull less, hard ones relatively more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from limbeck.data import Stream
from limbeck.errors import require_share
from limbeck.labels import PredictionTable, mix_targets, one_hot
from limbeck.losses import soft_cross_entropy
from limbeck.models import class_count
from limbeck.train import Batch, Losses, Method


class PSKD(Method):
    """Targets that move from the labels to the network's own past, as much as `alpha` has grown.

    Args:
        student: inputs to logits [B, C].
        alpha_final: alpha_T in [0, 1], the weight of the past in the last epoch.
        half_precision_table: keep the past probabilities as float16 (half of N x C x 4 bytes).

    Raises:
        UserError: alpha_final is not in [0, 1].
    """

    streams = {"labelled": ("weak", "label", "index")}

    def __init__(self, student: nn.Module, *, alpha_final: float = 0.8, half_precision_table: bool = False) -> None:
        super().__init__()
        require_share(alpha_final=alpha_final)
        self.student = student
        self.alpha_final = alpha_final
        self.half_precision_table = half_precision_table

    def prepare(self, streams: Mapping[str, Stream]) -> None:
        # One-hot for every sample from the start: a sample that a dropped last batch skips keeps its label.
        samples = streams["labelled"].samples
        labels_N = torch.zeros(int(samples.index.max()) + 1, dtype=torch.long)
        labels_N[samples.index] = samples.labels
        dtype = torch.float16 if self.half_precision_table else torch.float32
        classes = class_count(self.student) or samples.num_classes
        self.past = PredictionTable(labels_N, classes, dtype=dtype)

    def training_step(self, batch: Batch) -> Losses:
        labelled = batch["labelled"]
        alpha = self.alpha_final * (self.clock.epoch + 1) / self.clock.epochs
        hard_BC = one_hot(labelled["label"], self.past.table.shape[1])
        target_BC = mix_targets(hard_BC, self.past.read(labelled["index"]), alpha)

        logits_BC = self.student(labelled["weak"]).float()
        # What this very forward said (augmented view, BatchNorm in training mode) is the past of the next epoch.
        self.past.write(labelled["index"], logits_BC.detach().softmax(-1))
        return {"ce": soft_cross_entropy(logits_BC, target_BC, reduction="mean")}

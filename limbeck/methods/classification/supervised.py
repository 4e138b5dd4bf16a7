"""Plain training on labels: the baseline that every claim is measured against.

    L = -(1/B) sum_b sum_c t_bc log softmax(z_b)_c,   t = (1 - s) onehot(y) + s / C

with the label smoothing s = 0 by default (Szegedy et al. 2016, section 7).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from limbeck.errors import require_share
from limbeck.train import Batch, Losses, Method


class Supervised(Method):
    """Cross-entropy of the student on labelled samples.

    Args:
        student: inputs to logits [B, C].
        label_smoothing: s in [0, 1], the share of the target that is spread evenly over all classes.

    Raises:
        UserError: the label smoothing is not in [0, 1].
    """

    streams = {"labelled": ("weak", "label")}

    def __init__(self, student: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        require_share(label_smoothing=label_smoothing)
        self.student = student
        self.label_smoothing = label_smoothing

    def training_step(self, batch: Batch) -> Losses:
        labelled = batch["labelled"]
        logits_BC = self.student(labelled["weak"]).float()
        return {"ce": F.cross_entropy(logits_BC, labelled["label"], label_smoothing=self.label_smoothing)}

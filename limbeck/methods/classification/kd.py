"""Knowledge distillation: the student matches the teacher's softened class probabilities.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, section 2.

    L = (1 - alpha) CE(z_S, y) + alpha T^2 KL(softmax(z_T / T) || softmax(z_S / T))

Both terms sum over classes and average over the batch. The factor T^2 keeps the second term's gradient at the size
of the first's whatever T is.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from limbeck.errors import require_positive, require_share
from limbeck.losses import kl_divergence
from limbeck.teachers import Teacher
from limbeck.train import Batch, Losses, Method


class KD(Method):
    """Cross-entropy on the labels and KL divergence from a frozen teacher, on the same view.

    Args:
        student: inputs to logits [B, C].
        teacher: gives logits [B, C].
        temperature: T > 0. The paper tries 1 to 20; 4 is the setting of the later CIFAR literature.
        alpha: share of the teacher's term in [0, 1]; the paper wants "a considerably lower weight" on the labels.

    Raises:
        UserError: the temperature is not positive or alpha not in [0, 1].
    """

    streams = {"labelled": ("weak", "label")}

    def __init__(self, student: nn.Module, teacher: Teacher, *, temperature: float = 4.0, alpha: float = 0.9) -> None:
        super().__init__()
        require_positive(temperature=temperature)
        require_share(alpha=alpha)
        self.student, self.teacher = student, teacher
        self.temperature = temperature
        self.weights = {"ce": 1 - alpha, "kd": alpha}

    def training_step(self, batch: Batch) -> Losses:
        labelled = batch["labelled"]
        logits_BC = self.student(labelled["weak"]).float()
        teacher_BC = self.teacher.logits(labelled, "weak")
        return {
            "ce": F.cross_entropy(logits_BC, labelled["label"]),
            "kd": kl_divergence(
                logits_BC, teacher_BC, temperature=self.temperature, scale_by_t2=True, reduction="batchmean"
            ),
        }

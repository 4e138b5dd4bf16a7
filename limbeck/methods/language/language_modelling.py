"""Language modelling: predict the next token of the data, the student alone.

With labels of -100 on the prompt this is supervised fine-tuning (SFT): z_i the logits of place i, y the tokens,

    L = (1 / n) sum_{i: y_{i+1} is scored} -log softmax(z_i)_{y_{i+1}}        n: scored tokens of the batch

It trains the teachers of the family, and is what distilled students are measured against.
"""

from __future__ import annotations

from torch import nn

from limbeck.errors import require_share
from limbeck.losses import shift, token_cross_entropy
from limbeck.train import Batch, Losses, Method


class LanguageModelling(Method):
    """Cross-entropy of the next token, averaged over the scored tokens of a batch.

    Args:
        student: `tokens -> logits_BLV`, causal.
        label_smoothing: share of the target that is spread evenly over the vocabulary, in [0, 1].
    """

    streams = {"labelled": ("tokens", "labels")}

    def __init__(self, student: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        require_share(label_smoothing=label_smoothing)
        self.student, self.label_smoothing = student, label_smoothing

    def training_step(self, batch: Batch) -> Losses:
        labelled = batch["labelled"]
        logits_BLV, labels_BL = shift(self.student(labelled["tokens"]), labelled["labels"])
        ce = token_cross_entropy(logits_BLV, labels_BL, reduction="token_mean", label_smoothing=self.label_smoothing)
        return {"ce": ce}

"""Training objectives that systems of several stages use as they are."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import nn

from limbeck.data import Data, Samples
from limbeck.errors import require_share
from limbeck.teachers import Frozen
from limbeck.train.method import Batch, Losses, Method
from limbeck.train.stage import Stage, viewed_field
from limbeck.train.workspace import Workspace


class CrossEntropy(Method):
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


def linear_probe(ws: Workspace, stage: str, encoder: nn.Module, width: int, data: Data, settings: Stage) -> nn.Module:
    """A linear classifier on a frozen encoder's embeddings, which are computed once. Returns encoder and classifier.

    Args:
        encoder: inputs to embeddings [B, D]; it stays as it is.
        width: D.
        settings: of the classifier's training; its stream `labelled` holds embeddings, so its views are identities.

    The classifier has a BatchNorm without affine before its linear layer, as linear probing of masked autoencoders
    has (He et al. 2022, appendix A.1): embeddings of any scale then suit one learning rate.
    """
    frozen = Frozen(copy.deepcopy(encoder))
    known = ws.label(f"{stage}_embeddings", frozen, data.train, view=viewed_field(data.train), keep=("logits",))
    rows = Samples({"features": known.fields["logits"], "label": data.train.labels}, data.classes)
    head = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, data.num_classes))
    ws.fit(stage, CrossEntropy(head), settings.on(labelled=rows), settings.trainer)
    return nn.Sequential(encoder, head)

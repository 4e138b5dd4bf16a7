"""A network's own past as its teacher: a snapshot that is renewed now and then."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from limbeck.models import Outputs


class Past(nn.Module):
    """The network as it was at the last `renew` (epochs ago, stages ago); part of the checkpoint, always in eval mode.

    Methods that need the past outputs of the very training forward keep them in `labels.PredictionTable` instead.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Past:
        """Stay in eval mode whatever the method around it does."""
        return super().train(False)

    @torch.no_grad()
    def renew(self, model: nn.Module) -> None:
        """Take over the weights and buffers that `model` has now."""
        self.model.load_state_dict(model.state_dict())

    def forward(self, fields: Mapping[str, Any], view: str) -> Outputs:
        """The snapshot's answer for one stream's batch; no gradient."""
        with torch.no_grad():
            return Outputs(logits=self.model(fields[view]))

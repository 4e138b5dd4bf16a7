"""The exponential moving average of a network as its own teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.models import Outputs


class EMA(nn.Module):
    """A copy of a network that follows it: theta_ema <- d theta_ema + (1 - d) theta.

    It is part of the checkpoint, always in eval mode, and its parameters never require gradients.

    Args:
        model: the network to follow; copied.
        decay: d in [0, 1].
        warmup: let d grow with the step s as min(decay, (1 + s) / (10 + s)), so that early weights are forgotten; with
            "mean" as min(decay, 1 - 1 / (s + 1)), the plain mean of the first weights (mean teacher; 0 at s = 0).
        buffers: `copy` them (BatchNorm statistics of the student as they are), `average` the floating ones too, or
            `keep` the copy's own, for a teacher that gathers its statistics in forward passes of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        *,
        warmup: bool | Literal["mean"] = False,
        buffers: Literal["copy", "average", "keep"] = "copy",
    ) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; it lies between 0 (follow at once) and 1 (never move)")
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.warmup, self.buffer_rule = decay, warmup, buffers

    def train(self, mode: bool = True) -> EMA:
        """Stay in eval mode whatever the method around it does."""
        return super().train(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards `model`. `step` (from 0) counts updates; it only matters with warm-up."""
        decay = self._decay_at(step)
        averaged: list[Tensor] = list(self.model.parameters())
        followed: list[Tensor] = list(model.parameters())
        copied = []
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            if self.buffer_rule == "average" and mine.is_floating_point():
                averaged.append(mine)
                followed.append(theirs)
            elif self.buffer_rule != "keep":
                copied.append((mine, theirs))
        torch._foreach_lerp_(_data(averaged), _data(followed), 1 - decay)
        if copied:
            torch._foreach_copy_([mine for mine, _ in copied], [theirs for _, theirs in copied])

    def _decay_at(self, step: int) -> float:
        if self.warmup == "mean":
            return min(self.decay, 1 - 1 / (step + 1))
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def forward(self, fields: Mapping[str, Any], view: str) -> Outputs:
        """The teacher's answer for one stream's batch; no gradient."""
        with torch.no_grad():
            return Outputs(logits=self.model(fields[view]))


def _data(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]

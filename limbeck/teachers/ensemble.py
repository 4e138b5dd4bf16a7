"""Several teachers that answer as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.models import Outputs
from limbeck.teachers.teacher import Teacher


class Ensemble(Teacher):
    """Weighted mean of several teachers' answers.

    `logits`: sum_m w_m z_m. `probabilities`: log sum_m w_m softmax(z_m), given as logits, so that a softmax of them is
    the mean of the members' probabilities.

    Args:
        teachers: the members; their class counts are equal.
        average: what is averaged.
        weights: one non-negative number a member, [M], rescaled to sum to 1; equal when None. For weights that depend
            on the sample give `combine` a tensor [M, B].
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        average: Literal["logits", "probabilities"] = "logits",
        weights: Sequence[float] | None = None,
    ) -> None:
        counts = {teacher.class_count for teacher in teachers}
        if not teachers or len(counts) > 1:
            raise UserError(f"the members of an ensemble have {sorted(map(str, counts))} classes; they need the same count")
        if weights is not None and (len(weights) != len(teachers) or min(weights) < 0 or sum(weights) <= 0):
            raise UserError(f"{len(teachers)} teachers need {len(teachers)} non-negative weights, got {list(weights)}")
        self.teachers = list(teachers)
        self.average = average
        self.weights = torch.tensor(weights or [1.0] * len(teachers))
        self.class_count = counts.pop()

    def __call__(self, fields: Mapping[str, Any], view: str) -> Outputs:
        logits_MBC = torch.stack([_logits(teacher(fields, view)) for teacher in self.teachers])
        return Outputs(logits=combine(logits_MBC, self.weights.to(logits_MBC.device), self.average))

    def to(self, device: torch.device | None = None, memory_format: torch.memory_format | None = None) -> Self:
        for teacher in self.teachers:
            teacher.to(device, memory_format)
        if device is not None:
            self.weights = self.weights.to(device)
        return self

    def compile(self) -> None:
        for teacher in self.teachers:
            teacher.compile()


def combine(logits_MBC: Tensor, weights: Tensor, average: Literal["logits", "probabilities"]) -> Tensor:
    """Weighted mean over the members M, as logits [B, C]; `weights` [M] or [M, B], rescaled to sum to 1 over M."""
    weights = (weights / weights.sum(0)).reshape(len(weights), -1, 1)
    logits_MBC = logits_MBC.float()
    if average == "logits":
        return (weights * logits_MBC).sum(0)
    return (logits_MBC.log_softmax(-1) + weights.log()).logsumexp(0)


def _logits(outputs: Outputs) -> Tensor:
    if outputs.logits is None:
        raise UserError("a member of the ensemble gives no logits; leave it out or give it a classifier")
    return outputs.logits

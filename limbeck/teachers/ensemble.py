"""Several teachers that answer as one.

Letters: M members, B samples, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor

from limbeck.data import Stream
from limbeck.errors import UserError
from limbeck.models import Outputs
from limbeck.teachers.teacher import Teacher


class Ensemble(Teacher):
    """Weighted mean of several teachers' answers.

    `logits`: sum_m w_m z_m. `probabilities`: log sum_m w_m softmax(z_m), given as logits, so that a softmax of them is
    the mean of the members' probabilities.

    Args:
        teachers: the members; their class counts are equal, where they are known.
        average: what is averaged.
        weights: one non-negative number a member, [M], rescaled to sum to 1; equal when None. For weights that depend
            on the sample give `combine` a tensor [M, B].

    Raises:
        UserError: there are no teachers, their class counts differ, or the weights do not fit them.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        average: Literal["logits", "probabilities"] = "logits",
        weights: Sequence[float] | None = None,
    ) -> None:
        if not teachers:
            raise UserError("an ensemble needs at least one teacher, got none")
        counts = {teacher.class_count for teacher in teachers} - {None}
        if len(counts) > 1:
            shown = ", ".join(str(teacher.class_count) for teacher in teachers)
            raise UserError(f"the members of an ensemble have {shown} classes; they need the same count")
        if weights is not None and (len(weights) != len(teachers) or min(weights) < 0 or sum(weights) <= 0):
            raise UserError(f"{len(teachers)} teachers need {len(teachers)} non-negative weights, got {list(weights)}")
        self.teachers = list(teachers)
        self.average = average
        self.weights = torch.tensor(weights or [1.0] * len(teachers))
        self.class_count = counts.pop() if counts else None

    def __call__(self, fields: Mapping[str, Any], view: str) -> Outputs:
        logits_MBC = torch.stack([teacher.logits(fields, view) for teacher in self.teachers])
        return Outputs(logits=combine(logits_MBC, self.weights.to(logits_MBC.device), self.average))

    def fingerprint(self) -> str:
        """Of the members, how they are averaged, and their weights."""
        members = " ".join(teacher.fingerprint() for teacher in self.teachers)
        return hashlib.sha256(f"{self.average} {self.weights.tolist()} {members}".encode()).hexdigest()

    def join(self, streams: Mapping[str, Stream]) -> None:
        for teacher in self.teachers:
            teacher.join(streams)

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
    """Weighted mean over the members, as logits [B, C] in float32.

    Weights [M] or [M, B] are rescaled to sum to 1 over M; those of a sample must not all be 0.
    """
    weights = (weights / weights.sum(0)).reshape(len(weights), -1, 1)
    logits_MBC = logits_MBC.float()
    if average == "logits":
        return (weights * logits_MBC).sum(0)
    return (logits_MBC.log_softmax(-1) + weights.log()).logsumexp(0)

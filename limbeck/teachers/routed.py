"""A pool of teachers from which each sample has its own.

Letters: M teachers, B samples, K picked by each sample, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from limbeck.data import Stream
from limbeck.errors import UserError
from limbeck.models import Outputs
from limbeck.models.moe import pick
from limbeck.teachers.teacher import Teacher


class Routed(Teacher):
    """M teachers; which one answers for a sample is said by the caller, or by a field of the batch.

    `stacked` asks all of them, in batches as any teacher: [M,B,C]. `picked` gives each sample its own K, gathered by
    index. Called as a teacher it reads the field `route` int64 [B], e.g. the domain or language of the sample.

    Args:
        teachers: the pool; their class counts are equal, where they are known.
        names: of the teachers, in that order; by default 0, 1, ...
        route: the field that a call reads.

    Raises:
        UserError: there are no teachers, names and teachers differ in number, or class counts differ.
    """

    def __init__(
        self, teachers: Sequence[Teacher], names: Sequence[str] | None = None, *, route: str = "route"
    ) -> None:
        if not teachers:
            raise UserError("a pool of teachers needs at least one, got none")
        counts = {teacher.class_count for teacher in teachers} - {None}
        if len(counts) > 1:
            shown = ", ".join(str(teacher.class_count) for teacher in teachers)
            raise UserError(f"the teachers of a pool have {shown} classes; they need the same count")
        self.teachers, self.route = list(teachers), route
        self.names = [str(number) for number in range(len(teachers))] if names is None else list(names)
        if len(self.names) != len(self.teachers):
            raise UserError(f"{len(self.teachers)} teachers need {len(self.teachers)} names, got {len(self.names)}")
        self.class_count = counts.pop() if counts else None

    def __len__(self) -> int:
        return len(self.teachers)

    def stacked(self, fields: Mapping[str, Any], view: str) -> Tensor:
        """The logits of all teachers: [M,B,C], or [M,B,C,H,W] of dense ones."""
        return torch.stack([teacher.logits(fields, view) for teacher in self.teachers])

    def picked(self, fields: Mapping[str, Any], view: str, index_BK: Tensor) -> Tensor:
        """[K,B,C]: the logits of each sample's own teachers, in the order of its picks."""
        return pick(self.stacked(fields, view), index_BK)

    def __call__(self, fields: Mapping[str, Any], view: str) -> Outputs:
        if self.route not in fields:
            raise UserError(
                f"a pool of teachers reads the field '{self.route}' to know who answers for a sample; the batch has "
                f"{', '.join(fields)}"
            )
        return Outputs(logits=self.picked(fields, view, fields[self.route][:, None])[0])

    def join(self, streams: Mapping[str, Stream]) -> None:
        for teacher in self.teachers:
            teacher.join(streams)

    def to(self, device: torch.device | None = None, memory_format: torch.memory_format | None = None) -> Self:
        for teacher in self.teachers:
            teacher.to(device, memory_format)
        return self

    def compile(self) -> None:
        for teacher in self.teachers:
            teacher.compile()

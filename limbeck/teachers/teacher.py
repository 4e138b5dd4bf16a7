"""The one call that every frozen teacher answers, wherever its outputs come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from limbeck.data import Stream
from limbeck.errors import UserError
from limbeck.models import Outputs, TopK


class Teacher:
    """Anything that gives outputs for a batch and is not trained.

    A plain object, not an `nn.Module`: assigned to a method it adds nothing to `parameters()` or `state_dict()`, is
    never put in training mode by `method.train()`, and a deep copy of the method shares it.
    """

    class_count: int | None = None  # classes that its logits speak of; None when it gives none or they are unknown
    sparse: bool = False  # whether it only knows the likeliest classes, so that its logits are filled up

    def __call__(self, fields: Mapping[str, Any], view: str) -> Outputs:
        """Outputs for one stream's batch: `fields[view]` is read by live teachers, `fields["index"]` by stored ones."""
        raise NotImplementedError

    def logits(self, fields: Mapping[str, Any], view: str) -> Tensor:
        """The logits [B, C] alone. Raises `UserError` for a teacher that gives none."""
        logits = self(fields, view).logits
        if logits is None:
            raise UserError(f"the teacher ({type(self).__name__}) gives no logits; give one that classifies")
        return logits

    def top_k(self, fields: Mapping[str, Any], view: str, k: int) -> TopK:
        """The k likeliest classes (or words) of each item. Teachers that know no more than these keep them sparse."""
        return TopK.of(self.logits(fields, view), k)

    def fingerprint(self) -> str:
        """What tells its answers from another teacher's, e.g. a hash of its weights. `UserError` where nothing does."""
        raise UserError(f"the answers of a {type(self).__name__} depend on more than its weights and cannot be stored")

    def join(self, streams: Mapping[str, Stream]) -> None:
        """Told of a stage's streams before its first step: a teacher on disk compares its rows with the samples here,
        has the views replayed that it answered for, and puts its answers into the batches."""

    def to(self, device: torch.device | None = None, memory_format: torch.memory_format | None = None) -> Self:
        """Move what it holds to a device or memory format, in place."""
        return self

    def compile(self) -> None:
        """Compile the networks it holds, in place."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

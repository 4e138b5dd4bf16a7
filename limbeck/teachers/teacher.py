"""The one call that every frozen teacher answers, wherever its outputs come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.models import Outputs


class Teacher:
    """Anything that gives outputs for a batch and is not trained.

    A plain object, not an `nn.Module`: assigned to a method it adds nothing to `parameters()` or `state_dict()`, is
    never put in training mode by `method.train()`, and a deep copy of the method shares it.
    """

    class_count: int | None = None  # classes that its logits speak of; None when it gives none or they are unknown

    def __call__(self, fields: Mapping[str, Any], view: str) -> Outputs:
        """Outputs for one stream's batch: `fields[view]` is read by live teachers, `fields["index"]` by stored ones."""
        raise NotImplementedError

    def logits(self, fields: Mapping[str, Any], view: str) -> Tensor:
        """The logits [B, C] alone. Raises `UserError` for a teacher that gives none."""
        logits = self(fields, view).logits
        if logits is None:
            raise UserError(f"the teacher ({type(self).__name__}) gives no logits; give one that classifies")
        return logits

    def to(self, device: torch.device | None = None, memory_format: torch.memory_format | None = None) -> Self:
        """Move what it holds to a device or memory format, in place."""
        return self

    def compile(self) -> None:
        """Compile the networks it holds, in place."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

"""A network that supervises and does not learn."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from limbeck.models import Outputs, Taps, class_count, find_head
from limbeck.models.compiled import compile_in_place
from limbeck.models.taps import INPUT
from limbeck.teachers.teacher import Teacher


class Frozen(Teacher):
    """A live network in eval mode, without gradients, that is not saved with the student.

    Args:
        model: inputs to logits. It is put in eval mode and its parameters stop requiring gradients.
        taps: names of inner modules whose outputs are wanted too (`outputs.features[name]`).
        embedding: give the pooled feature too that the final linear layer reads (`outputs.embedding`).
        batch_statistics: normalise by the batch's own statistics in BatchNorm layers, as some papers' teachers do.
            The model then loses its running statistics: give a copy of it where they are needed elsewhere.
    """

    def __init__(
        self, model: nn.Module, *, taps: Sequence[str] = (), embedding: bool = False, batch_statistics: bool = False
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.class_count = class_count(model)
        self.read_by_head = f"{find_head(model)[0]}{INPUT}" if embedding else None
        tapped = [*taps, *([self.read_by_head] if self.read_by_head else [])]
        self.taps = Taps(self.model, tapped) if tapped else None
        if batch_statistics:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    # Without running statistics BatchNorm uses the batch's, in eval mode too, and nothing moves.
                    module.running_mean = module.running_var = None

    def __call__(self, fields: Mapping[str, Any], view: str) -> Outputs:
        with torch.inference_mode():
            inputs = fields[view]
            outputs = self.taps(inputs) if self.taps else Outputs(logits=self.model(inputs))
        if self.read_by_head:
            outputs.embedding = outputs.features.pop(self.read_by_head)
        # A loss may save its target for backward, which tensors born in inference mode refuse: hand out copies.
        return outputs.map(Tensor.clone)

    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes and bytes of all parameters and buffers."""
        digest = hashlib.sha256()
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | None = None, memory_format: torch.memory_format | None = None) -> Self:
        if device is not None:
            self.model.to(device)
        if memory_format is not None:
            self.model.to(memory_format=memory_format)  # type: ignore[call-overload]
        return self

    def compile(self) -> None:
        compile_in_place(self.model)

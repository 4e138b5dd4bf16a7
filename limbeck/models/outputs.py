"""What a model says of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Outputs:
    """Everything that losses and labels may ask of a model for one batch of B samples.

    `logits` [B, C] (None when a forward was stopped before the head); `features` inner tensors by module
    name, as the module gave them ([B, C, H, W], [B, tokens, D] or [B, D]); `embedding` [B, D], the pooled
    feature that the classifier reads; `attention` attention weights [B, heads, tokens, tokens] by module name.
    """

    logits: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None
    attention: dict[str, Tensor] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> Outputs:
        """The same outputs with `function` applied to every tensor."""
        return Outputs(
            logits=None if self.logits is None else function(self.logits),
            features={name: function(value) for name, value in self.features.items()},
            embedding=None if self.embedding is None else function(self.embedding),
            attention={name: function(value) for name, value in self.attention.items()},
        )

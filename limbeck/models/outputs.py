"""What a model says of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Rest = Literal["spread", "ignore"]


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


@dataclass(frozen=True)
class TopK:
    """The K likeliest of C classes (or words) of each item, and what is left of the probability mass.

    Attributes:
        ids: int64 [..., K], the likeliest first.
        log_probs: float32 [..., K], log of their probabilities among all C.
        rest: float32 [...], 1 minus the sum of the K probabilities, in [0, 1].
        classes: C.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor
    classes: int

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TopK:
        """The K largest of logits [..., C] under their softmax. ValueError for k outside 1..C."""
        classes = logits.shape[-1]
        if not 1 <= k <= classes:
            raise ValueError(f"k is {k}; these logits have {classes} classes, so it lies in 1..{classes}")
        # Cut first: a log-softmax of all of them would be a second tensor as large as the logits.
        top, ids = logits.topk(k, dim=-1)
        log_probs = top.float() - logits.float().logsumexp(-1, keepdim=True)
        return cls(ids, log_probs, (1 - log_probs.exp().sum(-1)).clamp(min=0), classes)

    def dense(self, rest: Rest = "spread") -> Tensor:
        """Log-probabilities of all classes, float32 [..., C].

        `spread` gives each class that was not kept an equal share of the mass that is left; `ignore` gives it none
        (-inf) and rescales the kept ones to sum to 1.
        """
        others = self.classes - self.ids.shape[-1]
        if rest == "ignore" or others == 0:
            filler = torch.full_like(self.rest, -torch.inf)
            kept = self.log_probs - self.log_probs.logsumexp(-1, keepdim=True)
        else:
            # Rounding can leave nothing at all; the smallest float keeps logarithms and KL finite.
            filler = (self.rest / others).clamp(min=torch.finfo(torch.float32).tiny).log()
            kept = self.log_probs
        dense = filler[..., None].expand(*self.rest.shape, self.classes)
        return dense.scatter(-1, self.ids, kept)

    def cut(self, k: int) -> TopK:
        """The k likeliest of the K. ValueError for k above K."""
        if k > self.ids.shape[-1]:
            raise ValueError(f"{k} classes of each item are wanted and {self.ids.shape[-1]} were kept")
        left_out = self.log_probs[..., k:].exp().sum(-1)
        return TopK(self.ids[..., :k], self.log_probs[..., :k], self.rest + left_out, self.classes)

"""Routers: which of several experts or teachers a sample goes to, and with what weight.

Letters: B samples (or tokens), M experts or teachers, K of them that are picked, C classes, D width, H height, W width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from limbeck.errors import UserError


class Choice(NamedTuple):
    """The picked experts in falling order of score, int64 [B,K], and their weights [B,K]."""

    index_BK: Tensor
    weight_BK: Tensor


def top_k(scores_BM: Tensor, k: int) -> Choice:
    """The `k` largest scores of each row. Of equal scores the expert with the smaller number comes first.

    (`torch.topk` leaves ties to the device.) The weights are the scores and carry gradient; the index does not.
    Raises `UserError` where k is not in 1..M.
    """
    if not 1 <= k <= scores_BM.shape[-1]:
        raise UserError(f"k is {k}, but there are {scores_BM.shape[-1]} to pick from; give 1 to that number")
    scores, index = scores_BM.sort(dim=-1, descending=True, stable=True)
    return Choice(index[..., :k], scores[..., :k])


def pick(values_MB: Tensor, index_BK: Tensor) -> Tensor:
    """[K,B,...]: of each sample the values of its picked experts; values [M,B,...]. One gather for all samples."""
    place = index_BK.T.reshape(*index_BK.T.shape, *[1] * (values_MB.ndim - 2))
    return values_MB.gather(0, place.expand(-1, -1, *values_MB.shape[2:]))


def shares(index_BK: Tensor, experts: int) -> Tensor:
    """[M], sums to 1: which share of the picks goes to each expert. No value is read back from the device."""
    picked = torch.nn.functional.one_hot(index_BK, experts)
    return picked.flatten(0, -2).float().mean(0)


class GateNet(nn.Module):
    """Linear(C, 2C), Linear(2C, M), nothing between them: a student's logits [B,C] to gate logits [B,M].

    Source: `GateNet` of the official code of MST-Distill.
    """

    def __init__(self, classes: int, experts: int) -> None:
        super().__init__()
        self.inner = nn.Linear(classes, 2 * classes)
        self.out = nn.Linear(2 * classes, experts)

    def forward(self, logits_BC: Tensor) -> Tensor:
        return self.out(self.inner(logits_BC))


class DenseGateNet(nn.Module):
    """A map of logits [B,C,H,W] to gate logits [B,M]: a 1x1 convolution to 2C, ReLU, a depthwise 3x3 one of stride 2,
    ReLU, the mean over positions, Linear(2C, M).

    Source: `GateNet_dense` of the official code of MST-Distill.
    """

    def __init__(self, classes: int, experts: int) -> None:
        super().__init__()
        hidden = 2 * classes
        self.inner = nn.Sequential(
            nn.Conv2d(classes, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, stride=2, padding=1, groups=hidden),
            nn.ReLU(),
        )
        self.out = nn.Linear(hidden, experts)

    def forward(self, logits_BCHW: Tensor) -> Tensor:
        return self.out(self.inner(logits_BCHW).mean(dim=(2, 3)))


class TopKRouter(nn.Module):
    """p = softmax(W x) in float32, the k largest, their weights rescaled to sum to 1 where `renormalise`.

    Args:
        width: D of x [B,D].
        experts: M.
        k: how many a sample goes to.
        renormalise: divide the weights by their sum.
        bias: of the linear layer.
        jitter: in training x is multiplied by noise, uniform in 1 - jitter .. 1 + jitter (Switch Transformer).

    `forward(x, allowed)` gives `(gate logits [B,M], Choice)`; `allowed` bool [M] or [B,M] says which experts may be
    picked (a modality's own), the others have the logit -inf. At least k must be allowed.
    """

    def __init__(
        self, width: int, experts: int, k: int = 2, *, renormalise: bool = True, bias: bool = False, jitter: float = 0.0
    ) -> None:
        super().__init__()
        if not 1 <= k <= experts:
            raise UserError(f"k is {k}, but the router has {experts} experts; give 1 to that number")
        self.k, self.renormalise, self.jitter = k, renormalise, jitter
        self.gate = nn.Linear(width, experts, bias=bias)

    def forward(self, x_BD: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Choice]:
        if self.training and self.jitter:
            x_BD = x_BD * torch.empty_like(x_BD).uniform_(1 - self.jitter, 1 + self.jitter)
        logits_BM = self.gate(x_BD).float()
        if allowed is not None:
            logits_BM = logits_BM.masked_fill(~allowed, -torch.inf)
        choice = top_k(logits_BM.softmax(-1), self.k)
        if self.renormalise:
            choice = Choice(choice.index_BK, choice.weight_BK / choice.weight_BK.sum(-1, keepdim=True))
        return logits_BM, choice

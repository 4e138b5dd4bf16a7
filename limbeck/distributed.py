"""Statistics and tensors that span all processes. Every function is the identity in a single process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together (1 without a process group)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_across(x: Tensor) -> Tensor:
    """Sum of `x` over the processes; no gradient."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def mean_across(x: Tensor) -> Tensor:
    """Mean of `x` over the processes; no gradient."""
    return x if world_size() == 1 else sum_across(x) / world_size()


def gather(x: Tensor) -> Tensor:
    """`x` of every process concatenated along dimension 0 in rank order; no gradient. Equal shapes."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(x: Tensor) -> Tensor:
    """Like `gather`, and the gradients that other processes hold for this process's rows flow back (summed)."""
    return x if world_size() == 1 else _Gather.apply(x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Every process computed a gradient for all rows; this process's share of each adds up to the whole.
        return sum_across(gradient)[rank() * ctx.rows :][: ctx.rows]

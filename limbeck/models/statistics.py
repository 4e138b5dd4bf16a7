"""What BatchNorm layers read in one forward, against what they remember of the training data.

Shapes: B samples, C channels, L layers; further axes of a layer's input are averaged like the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from limbeck.distributed import gather_with_gradient
from limbeck.errors import UserError


class LayerStatistics(NamedTuple):
    """One layer's input of this forward and its memory, all float32 [C]; the variances are biased for this forward
    and, as BatchNorm keeps them, unbiased for the memory."""

    mean: Tensor
    variance: Tensor
    running_mean: Tensor
    running_variance: Tensor


def forward_with_statistics(
    model: nn.Module, inputs: Any, *, across: bool = False
) -> tuple[Tensor, list[LayerStatistics]]:
    """The model's output, and the statistics of every BatchNorm layer's input in the order of registration.

    The statistics carry gradient. The hooks are there during this call only, and the model stays in its mode: in eval
    mode, as for inversion, it normalises by what it remembers.

    Args:
        across: statistics of the concatenated batch of all processes, as one process with all of it would have; the
            gradient of each process's part is summed over the processes. False: those of this process alone.

    Raises:
        UserError: the model has no BatchNorm layer that remembers statistics, or the forward left one out.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    if not layers:
        raise UserError(f"{type(model).__name__} has no BatchNorm layer with running statistics to match; take another")
    found: dict[nn.Module, LayerStatistics] = {}

    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        memory: Any = layer
        found[layer] = LayerStatistics(
            *_statistics(args[0], across), memory.running_mean.float(), memory.running_var.float()
        )

    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        output = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if len(found) < len(layers):
        missed = next(name for name, layer in model.named_modules() if layer in layers and layer not in found)
        raise UserError(f"the forward never ran the BatchNorm layer '{missed}'; take a network that runs all of them")
    return output, [found[layer] for layer in layers]


def statistics_distance(found: Sequence[LayerStatistics], first: float = 1.0) -> Tensor:
    """sum_l c_l (||var_l - running_var_l||_2 + ||mean_l - running_mean_l||_2), c_1 = `first`, 1 for all others.

    Source: DeepInversion (Yin et al. 2020), equation 4 with plain norms; the factor of the first layer is SRe2L's.
    """
    terms = [
        torch.linalg.vector_norm(layer.variance - layer.running_variance)
        + torch.linalg.vector_norm(layer.mean - layer.running_mean)
        for layer in found
    ]
    return first * terms[0] + sum(terms[1:], torch.zeros_like(terms[0]))


def _statistics(x: Tensor, across: bool) -> tuple[Tensor, Tensor]:
    variance_C, mean_C = torch.var_mean(x.float(), [d for d in range(x.ndim) if d != 1], correction=0)
    if not across:
        return mean_C, variance_C
    count = mean_C.new_full((1,), x.numel() / x.shape[1])
    parts_PX = gather_with_gradient(torch.cat([mean_C, variance_C, count])[None])
    means_PC, variances_PC, counts_P1 = parts_PX.split([len(mean_C), len(mean_C), 1], 1)
    share_P1 = counts_P1 / counts_P1.sum()
    mean_C = (share_P1 * means_PC).sum(0)
    return mean_C, (share_P1 * (variances_PC + (means_PC - mean_C).square())).sum(0)

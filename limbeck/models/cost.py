"""What a model costs: parameters, floating-point operations, milliseconds, bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from limbeck.errors import UserError
from limbeck.models.modes import evaluating

Input = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """`parameters` (count), `flops` a sample (one multiply-add is 2), `latency_ms` of one batch of `batch_size`
    (median), `weight_bytes` of parameters and buffers as they are stored."""

    parameters: int
    flops: int
    latency_ms: float
    batch_size: int
    weight_bytes: int


def measure_cost(model: nn.Module, example: Input, batch_size: int = 1, repeats: int = 20) -> Cost:
    """All costs of `model` on inputs like `example` (tensor or dict of tensors, any number of rows)."""
    return Cost(
        parameters=count_parameters(model),
        flops=count_flops(model, example),
        latency_ms=measure_latency(model, example, batch_size, repeats),
        batch_size=batch_size,
        weight_bytes=count_weight_bytes(model),
    )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; a shared one counts once."""
    return sum(p.numel() for p in model.parameters())


def count_weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and saved buffers in their own precision; shared memory counts once."""
    stored = {(t.device, t.data_ptr()): t.numel() * t.element_size() for t in model.state_dict().values()}
    return sum(stored.values())


def count_flops(model: nn.Module, example: Input) -> int:
    """Floating-point operations of one sample's forward: matrix products, convolutions and attention.

    One multiply-add is 2. Normalisation and element-wise work are not counted (torch.utils.flop_counter).
    """
    one = take_rows(example, 1)
    # Fused attention kernels of the CPU are not in the counter's table; the plain one is made of products.
    with (
        evaluating(model),
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(one)
    return counter.get_total_flops()


def measure_latency(model: nn.Module, example: Input, batch_size: int = 1, repeats: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of a forward of `batch_size` rows in eval mode, after `warmup` forwards.

    Threads, device and precision are as they are; the device is waited for before each reading of the clock.
    """
    if repeats < 1 or batch_size < 1:
        raise UserError(f"repeats and batch_size must be at least 1, got {repeats} and {batch_size}.")
    batch = take_rows(example, batch_size)
    times = []
    with evaluating(model), torch.inference_mode():
        for _ in range(warmup):
            model(batch)
        for _ in range(repeats):
            _wait(batch)
            start = time.perf_counter()
            model(batch)
            _wait(batch)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def take_rows(example: Input, rows: int) -> Input:
    """The first `rows` rows of `example`, repeated from the start when it has fewer."""
    if not isinstance(example, Tensor):
        return {key: _rows_of(value, rows) for key, value in example.items()}
    return _rows_of(example, rows)


def _rows_of(tensor: Tensor, rows: int) -> Tensor:
    if len(tensor) == 0:
        raise UserError("The example batch has no rows; give at least one.")
    return tensor[torch.arange(rows, device=tensor.device) % len(tensor)]


def _wait(batch: Input) -> None:
    tensor = batch if isinstance(batch, Tensor) else next(iter(batch.values()))
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)

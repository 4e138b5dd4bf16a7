"""How outputs lie in the columns of a store, and how they come back.

Letters: N rows, K kept classes, C classes, T items (rows, or the kept places of all rows of a batch).

A column is a NumPy array of one fixed shape a row. Values are kept as `float32`, `float16`, `bfloat16` (its 16 bits)
or `int8`: 255 levels between the smallest and the largest value of an item (`.low` and `.step`, float32 beside it),
level 0 being -inf. Class numbers take the smallest unsigned integers that hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.models import TopK

Dtype = Literal["float32", "float16", "bfloat16", "int8"]
Values = Literal["log_probabilities", "logits"]
LEVELS = 255


def encode(name: str, values: Tensor, dtype: Dtype) -> dict[str, Tensor]:
    """Columns of values [T, ...]: `name`, and for `int8` also `name.low` and `name.step`. Nothing is read back from the
    device; `refuse_bad` looks at the columns on the host."""
    values = values.float()
    if dtype != "int8":
        return {name: values.to(getattr(torch, dtype))}
    flat = values.flatten(1) if values.dim() > 1 else values[:, None]
    out = flat.isneginf()
    nothing = out.all(1)
    low_T = flat.masked_fill(out, torch.inf).amin(1).masked_fill(nothing, 0.0)
    high_T = flat.amax(1).masked_fill(nothing, 0.0)
    step_T = (high_T - low_T) / (LEVELS - 1)
    level = (flat - low_T[:, None]) / step_T.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = level.round().clamp(0, LEVELS - 1).add(1).masked_fill(out, 0).to(torch.uint8)
    return {name: codes.view(values.shape), f"{name}.low": low_T, f"{name}.step": step_T}


def refuse_bad(name: str, values: Tensor) -> None:
    """Raise `UserError` where an encoded column holds NaN or +inf."""
    if values.is_floating_point() and bool((values.isnan() | values.isposinf()).any()):
        raise UserError(
            f"the teacher's {name} hold NaN or infinity as {str(values.dtype).removeprefix('torch.')}; look for bad "
            "inputs, or keep a wider dtype"
        )


def decode(name: str, columns: Mapping[str, Tensor]) -> Tensor:
    """The float32 values [T, ...] of what `encode` made, on the device of the columns."""
    kept = columns[name]
    if f"{name}.low" not in columns:
        return kept.float()
    shape = (-1, *[1] * (kept.dim() - 1))
    low, step = columns[f"{name}.low"].view(shape), columns[f"{name}.step"].view(shape)
    return torch.where(kept == 0, -torch.inf, low + (kept.float() - 1) * step)


def encode_top(name: str, logits: Tensor | TopK, k: int, values: Values, dtype: Dtype) -> dict[str, Tensor]:
    """Columns of the k likeliest of logits [T, C]: `name.ids`, `name.top`, `name.rest` (mass that is left), and with
    `values="logits"` the log of the sum of all exponentials, `name.total`, that turns them into log-probabilities."""
    top = logits.cut(k) if isinstance(logits, TopK) else TopK.of(logits, k)
    columns: dict[str, Tensor] = {f"{name}.ids": top.ids, f"{name}.rest": top.rest}
    if values == "logits":
        if isinstance(logits, TopK):
            raise UserError("this teacher only knows log-probabilities; keep values='log_probabilities'")
        kept = logits.gather(-1, top.ids).float()
        columns[f"{name}.total"] = kept[..., 0] - top.log_probs[..., 0]
        return columns | encode(f"{name}.top", kept, dtype)
    return columns | encode(f"{name}.top", top.log_probs, dtype)


def decode_top(name: str, columns: Mapping[str, Tensor], classes: int) -> TopK:
    """The `TopK` of what `encode_top` made. What rounding adds to the kept mass is taken from the rest."""
    log_probs = decode(f"{name}.top", columns)
    if f"{name}.total" in columns:
        log_probs = log_probs - columns[f"{name}.total"][..., None]
    return TopK(columns[f"{name}.ids"].long(), log_probs, columns[f"{name}.rest"].float(), classes)


@dataclass(frozen=True)
class Kept:
    """A column's items as they are written: [R, ...], or for tokens [T, ...] with the number of each row's, `counts`.

    `dtype` is the one that the tensor had; NumPy has no bfloat16.
    """

    items: np.ndarray
    dtype: str
    counts: np.ndarray | None = None

    @classmethod
    def of(cls, values: Tensor, counts: np.ndarray | None = None, *, classes: int | None = None) -> Kept:
        """A tensor, fetched; class numbers below `classes` shrink to the smallest unsigned type that holds them."""
        values = values.detach().cpu().contiguous()
        if classes is not None:
            array = values.numpy().astype(np.min_scalar_type(max(classes - 1, 0)))
            return cls(array, str(array.dtype), counts)
        dtype = str(values.dtype).removeprefix("torch.")
        if values.dtype == torch.bfloat16:
            return cls(values.view(torch.int16).numpy(), dtype, counts)
        return cls(values.numpy().astype(np.uint8) if dtype == "bool" else values.numpy(), dtype, counts)

    @classmethod
    def joined(cls, parts: Sequence[Kept]) -> Kept:
        """The rows of several, one after the other."""
        first = parts[0]
        counts = (
            None if first.counts is None else np.concatenate([part.counts for part in parts if part.counts is not None])
        )
        return cls(np.concatenate([part.items for part in parts]), first.dtype, counts)


def to_tensor(array: np.ndarray, dtype: str) -> Tensor:
    """The tensor that was kept; `dtype` is the one it had. Unsigned class numbers come back as int32 or int64.

    The array must be the caller's own: the tensor shares its memory.
    """
    if dtype == "bfloat16":
        return torch.from_numpy(array).view(torch.bfloat16)
    if dtype == "bool":
        return torch.from_numpy(array).bool()
    if array.dtype in (np.uint16, np.uint32):
        return torch.from_numpy(array.astype(np.int32 if array.dtype == np.uint16 else np.int64))
    return torch.from_numpy(array)

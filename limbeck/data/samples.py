"""Samples in columns, and the splits of one data set.

Shapes: N samples, B rows of a batch, C channels or classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.data.images import EncodedImages
from limbeck.errors import UserError

Column = Tensor | dict[str, Tensor] | EncodedImages | list


class Samples:
    """A set of samples, one column a field.

    A column is a tensor [N, ...] (images uint8 [N,C,H,W]), a dict of tensors [N, ...] (tokens), a list of N
    objects (texts), or `EncodedImages`, which decode when they are asked for. NumPy arrays become tensors.
    The field `index` (int64 [N]) is a sample's stable number in its data set: it counts from 0 when it isn't
    given, and every selection keeps it. An integer field `label` [N] lies in 0..C-1, where C is the number of
    `classes`; without `classes` they are named "0", "1", ... up to the largest label.

    Raises `UserError` for columns of different lengths, a label out of range and a NaN, naming field and row.
    """

    def __init__(self, fields: Mapping[str, Tensor | Sequence], classes: Sequence[str] | None = None) -> None:
        self.fields: dict[str, Any] = {name: _column(values) for name, values in fields.items()}
        sizes = {name: _length(column) for name, column in self.fields.items()}
        if len(set(sizes.values())) != 1:
            raise UserError(f"Samples need at least one field and all of one length, got {sizes or 'none'}.")
        self._size = next(iter(sizes.values()))
        self.fields.setdefault("index", torch.arange(self._size))
        self.classes = None if classes is None else [str(name) for name in classes]
        for name, column in self.fields.items():
            _refuse_nan(name, column)
        self._check_labels()

    def _check_labels(self) -> None:
        label = self.fields.get("label")
        if not isinstance(label, Tensor) or label.dim() != 1 or label.is_floating_point():
            return
        label = self.fields["label"] = label.long()
        if self.classes is None:
            self.classes = [str(c) for c in range(int(label.max()) + 1 if len(label) else 0)]
        outside = ((label < 0) | (label >= len(self.classes))).nonzero().flatten()
        if len(outside):
            row = int(outside[0])
            raise UserError(
                f"The label of row {row} is {int(label[row])}, expected 0..{len(self.classes) - 1} "
                f"({len(self.classes)} classes): mend the label or name more classes."
            )

    @classmethod
    def _of(cls, fields: dict[str, Any], classes: list[str] | None, size: int) -> Samples:
        """Samples of columns that were checked before: a selection must not read all the pixels again."""
        samples = cls.__new__(cls)
        samples.fields, samples.classes, samples._size = fields, classes, size
        return samples

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {_describe(column)}" for name, column in self.fields.items())
        return f"Samples({self._size}; {parts})"

    @property
    def index(self) -> Tensor:
        """int64 [N]: each sample's stable number in its data set."""
        return self.fields["index"]

    @property
    def labels(self) -> Tensor:
        """int64 [N]. Raises `UserError` where the samples are not labelled with classes."""
        label = self.fields.get("label")
        if not isinstance(label, Tensor):
            raise UserError(f"These samples have no field 'label', they have {', '.join(self.fields)}.")
        return label

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each occurs. Raises `UserError` where there are none."""
        if self.classes is None:
            raise UserError("These samples have no classes: pass classes=[...] or an integer field 'label'.")
        return len(self.classes)

    def select(self, rows: Tensor | Sequence[int]) -> Samples:
        """The samples of these rows in this order; each keeps its `index`, the set its classes."""
        rows = torch.as_tensor(rows, dtype=torch.long)
        fields = {name: _select(column, rows) for name, column in self.fields.items()}
        return self._of(fields, self.classes, len(rows))

    def with_fields(self, fields: Mapping[str, Tensor | Sequence]) -> Samples:
        """The same samples with these columns added or replaced."""
        return Samples({**self.fields, **fields}, self.classes)

    def without(self, *names: str) -> Samples:
        """The same samples without these fields; the classes stay known."""
        return self._of({k: v for k, v in self.fields.items() if k not in names}, self.classes, self._size)

    def batch(self, rows: Tensor) -> dict:
        """`{field: rows}` on the host, as they are stored (uint8 images stay uint8, texts a list)."""
        return {name: _take(column, rows) for name, column in self.fields.items()}


@dataclass(frozen=True)
class Data:
    """One data set: its splits, which share their classes.

    `unlabelled` are further samples without a field `label`.
    """

    train: Samples
    test: Samples
    validation: Samples | None = None
    unlabelled: Samples | None = None
    name: str = "data"

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, `None` where the set has none."""
        return self.train.classes

    @property
    def num_classes(self) -> int:
        """Number of classes. Raises `UserError` where the set has none."""
        return self.train.num_classes


def _column(values: object) -> Column:
    if isinstance(values, Tensor | EncodedImages | list):
        return values
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        return torch.from_numpy(np.ascontiguousarray(values))
    if isinstance(values, Mapping):
        return {name: torch.as_tensor(part) for name, part in values.items()}
    return list(values)  # type: ignore[call-overload]


def _length(column: Column) -> int:
    return len(next(iter(column.values()))) if isinstance(column, dict) else len(column)


def _select(column: Column, rows: Tensor) -> Column:
    return column.select(rows) if isinstance(column, EncodedImages) else _take(column, rows)


def _take(column: Column, rows: Tensor) -> Tensor | dict[str, Tensor] | list:
    if isinstance(column, Tensor):
        return column.index_select(0, rows)
    if isinstance(column, dict):
        return {name: part.index_select(0, rows) for name, part in column.items()}
    if isinstance(column, EncodedImages):
        return column.decode(rows)
    return [column[row] for row in rows.tolist()]


def _refuse_nan(name: str, column: Column) -> None:
    for part in column.values() if isinstance(column, dict) else [column]:
        if not isinstance(part, Tensor) or not part.is_floating_point() or not part.numel():
            continue
        bad = part.isnan().flatten(1).any(1) if part.dim() > 1 else part.isnan()
        if bad.any():
            rows = bad.nonzero().flatten()
            raise UserError(
                f"The field {name!r} holds NaN in {len(rows)} rows, first in row {int(rows[0])}: "
                "fill in or leave out these samples."
            )


def _describe(column: Column) -> str:
    if isinstance(column, Tensor):
        return f"{str(column.dtype).removeprefix('torch.')}{list(column.shape[1:])}"
    return type(column).__name__

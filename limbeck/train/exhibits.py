"""What a system shows in its run's report, as plain data: the report draws it.

Shapes: N things, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pictures:
    """Pictures [N,C,H,W], uint8 or float in [0,1], with a name each where `names` are given."""

    images: Tensor
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Scatter:
    """Points [N,2], coloured by their group int64 [N]; `names` of the groups."""

    points: Tensor
    groups: Tensor
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Bars:
    """A number for each name."""

    values: Mapping[str, float]


@dataclass(frozen=True)
class Rows:
    """A table: headings, and rows of texts or numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]


Exhibit = Pictures | Scatter | Bars | Rows

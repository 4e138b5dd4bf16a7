"""Scalars that change over a run: learning-rate factors, loss weights, mixing coefficients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from limbeck.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """A scalar as a function of the step: `end + (start - end) * shape(t)`, after a linear warm-up.

    `t` in [0, 1] is the share of the steps behind the warm-up that are done. The shape falls from 1 to:
    constant: 1; linear: 1 - t; cosine: (1 + cos(pi t / stretch)) / 2; cosine_7_16: cos(7 pi t / 16) (FixMatch; ends at
    0.195); poly: (1 - t)^power; step: gamma^(number of milestones that t has reached).

    Args:
        kind: the shape.
        start, end: the values at t = 0 and where the shape reaches 0; for learning rates factors of the base rate.
        warmup: steps (a whole number) or share of all steps (below 1) of linear growth from `warmup_start * start`.
        milestones: shares of the run in (0, 1) at which `step` multiplies by `gamma`.
        stretch: at least 1; with 2 the cosine ends half-way (the smoothed cosine of data-set distillation).
    """

    kind: Literal["constant", "linear", "cosine", "cosine_7_16", "step", "poly"] = "constant"
    start: float = 1.0
    end: float = 0.0
    warmup: float = 0
    warmup_start: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    power: float = 0.9
    stretch: float = 1.0

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise UserError(f"warmup is {self.warmup}; it is a number of steps, or a share of the run below 1")
        if self.stretch < 1:
            raise UserError(f"stretch is {self.stretch}; it is 1 or more, for a cosine that ends before its zero")
        if any(not 0 < m < 1 for m in self.milestones):
            raise UserError(f"milestones are {list(self.milestones)}; each is a share of the run between 0 and 1")

    def __call__(self, step: int, steps: int) -> float:
        """The value at optimiser step `step` (from 0) of `steps`."""
        warmup = self.warmup * steps if self.warmup < 1 else self.warmup
        if step < warmup:
            return self.start * (self.warmup_start + (1 - self.warmup_start) * step / warmup)
        t = min(1.0, (step - warmup) / max(1.0, steps - warmup))
        return self.end + (self.start - self.end) * self._shape(t)

    def _shape(self, t: float) -> float:
        match self.kind:
            case "constant":
                return 1.0
            case "linear":
                return 1 - t
            case "cosine":
                return (1 + math.cos(math.pi * t / self.stretch)) / 2
            case "cosine_7_16":
                return math.cos(7 * math.pi * t / 16)
            case "poly":
                return (1 - t) ** self.power
            case "step":
                return self.gamma ** sum(t >= m for m in self.milestones)

"""Votes of several networks: who sits in a committee, and how much each voice counts.

Shapes: K networks, S seats of a committee.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from limbeck.errors import UserError, require_positive


def vote_weights(
    priors: Sequence[float], temperature: float, voting: Literal["prior", "equal", "random"] = "prior"
) -> Tensor:
    """float32 [K], sum 1: softmax(prior / T), or equal, or softmax of uniform random numbers.

    Priors are in percent, so that the papers' temperatures (5, 10) fit: two networks 5 points apart count 1 : e at T =
    5. T -> 0 leaves the best network alone, T -> infinity makes all equal. Source: CV-DD, `recover` (T = 5) and
    `relabel` (T = 10).
    """
    require_positive(temperature=temperature)
    known = torch.tensor(list(priors), dtype=torch.float32)
    if voting == "equal":
        known = torch.zeros_like(known)
    elif voting == "random":
        known = torch.rand(len(known)) * temperature
    elif voting != "prior":
        raise UserError(f"voting is '{voting}'; choose prior, equal or random")
    return (known / temperature).softmax(0)


def seats(
    number: int, priors: Sequence[float], size: int, how: Literal["best", "walk", "random"] = "walk"
) -> tuple[int, ...]:
    """Which networks sit in committee `number` (0, 1, ...), in rising order.

    best: the `size` highest priors, for every number. walk: all committees of that size in lexicographic order, one
    after another and from the start again. random: drawn without replacement from torch's generator.
    Raises `UserError` for more seats than networks.
    """
    if not 1 <= size <= len(priors):
        raise UserError(f"a committee of {size} cannot be chosen from {len(priors)} networks; change voters")
    match how:
        case "best":
            ranked = sorted(range(len(priors)), key=lambda network: -priors[network])
            return tuple(sorted(ranked[:size]))
        case "walk":
            every = list(itertools.combinations(range(len(priors)), size))
            return every[number % len(every)]
        case "random":
            return tuple(sorted(torch.randperm(len(priors))[:size].tolist()))
    raise UserError(f"committees are chosen by best, walk or random, not '{how}'")

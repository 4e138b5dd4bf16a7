"""How honest confidences are, and the search for the number that makes them so.

Letters: N predictions, M values that were tried.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def expected_calibration_error(confidence_N: Tensor, correct_N: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error, sum over bins of share * |accuracy - mean confidence|: a scalar in [0, 1].

    Bins are of equal width and closed above, (m/bins, (m+1)/bins]; a confidence of 0 falls into the first.

    Args:
        confidence_N: probability of each top prediction, in [0, 1].
        correct_N: whether it was right (bool, or 0 and 1).

    Raises ValueError for shapes that differ and for no predictions. Source: Guo et al. 2017, section 2.
    """
    if confidence_N.shape != correct_N.shape or confidence_N.dim() != 1 or not len(confidence_N):
        raise ValueError(
            f"confidence has the shape {list(confidence_N.shape)} and correct {list(correct_N.shape)}: both must be "
            "[N] with N > 0."
        )
    confidence_N = confidence_N.detach().float().contiguous()
    edges = torch.arange(1, bins, device=confidence_N.device) / bins
    bin_N = torch.bucketize(confidence_N, edges)
    # A bin's share times the gap of its means is the sum of its gaps over N.
    gap_M = torch.bincount(bin_N, weights=correct_N.float() - confidence_N, minlength=bins)
    return gap_M.abs().sum() / len(confidence_N)


def grid_search(
    score: Callable[[float], Tensor],
    *,
    lowest: float = 0.1,
    highest: float = 1.0,
    step: float = 0.1,
    fine: float = 0.02,
) -> tuple[Tensor, Tensor]:
    """Minimise a function of one number on a coarse grid, then on a fine one around its best value.

    The coarse grid is lowest, lowest + step, ..., highest; the fine one the multiples of `fine` away from the best
    coarse value that lie within one step of it and above 0. With the defaults this is FIRST's search for c (Shum et al.
    2024, section 4).

    Returns `(values_M, scores_M)`, float64, all that was tried in ascending order; `values_M[scores_M.argmin()]` is the
    best, the smallest of several.
    """
    coarse = [lowest + number * step for number in range(round((highest - lowest) / step) + 1)]
    tried = {round(value, 9): float(score(value)) for value in coarse}
    best = min(tried, key=lambda value: (tried[value], value))
    around = round(step / fine)
    for number in range(-around, around + 1):
        value = round(best + number * fine, 9)
        if value > 0 and value not in tried:
            tried[value] = float(score(value))
    values = sorted(tried)
    return torch.tensor(values, dtype=torch.float64), torch.tensor([tried[v] for v in values], dtype=torch.float64)

"""Redundancy reduction: two views of a sample agree feature by feature, and features differ from each other.

Letters: B samples (of all processes: gather them with gradient before), D features. Computed in float32 (float64
stays), also under autocast. Gradient flows into both arguments: detach what comes from a momentum encoder.
"""

from __future__ import annotations

from torch import Tensor

from .reduction import check_same_shape, upcast
from .relation import full_precision


@full_precision
def cross_correlation(first_BD: Tensor, second_BD: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """C = z(first)^T z(second) / B, [D,D] in -1..1, z(x) = (x - mean) / sqrt(variance + epsilon) over the batch.

    The variance is the biased one, as BatchNorm's in training. Raises ValueError for shapes that differ.
    """
    check_same_shape(first_BD, second_BD)
    first_BD, second_BD = _standardised(upcast(first_BD), epsilon), _standardised(upcast(second_BD), epsilon)
    return first_BD.T @ second_BD / len(first_BD)


@full_precision
def barlow_twins(first_BD: Tensor, second_BD: Tensor, *, redundancy_weight: float, epsilon: float = 1e-5) -> Tensor:
    """sum_i (C_ii - 1)^2 + redundancy_weight * sum_{i != j} C_ij^2, with C the `cross_correlation`; a scalar.

    Symmetric in its arguments; 0 where the views agree and no two features are correlated. The paper takes the weight
    5e-3, DeLoRes-M takes 1 and 5e-5 / 32 times the whole. Source: Zbontar et al. 2021, equation 1.
    """
    c_DD = cross_correlation(first_BD, second_BD, epsilon=epsilon)
    diagonal_D = c_DD.diagonal()
    agreement = (diagonal_D - 1).square().sum()
    redundancy = c_DD.square().sum() - diagonal_D.square().sum()
    return agreement + redundancy_weight * redundancy


def _standardised(x_BD: Tensor, epsilon: float) -> Tensor:
    centred_BD = x_BD - x_BD.mean(0)
    return centred_BD * (centred_BD.square().mean(0) + epsilon).rsqrt()

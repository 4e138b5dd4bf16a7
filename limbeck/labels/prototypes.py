"""Soft assignment to prototypes: how much a feature belongs to each of K points (codes, centroids, class means).

Shapes: [..., D] features of width D, K prototypes, C classes, N samples. Results are float32 (float64 stays); nothing
is detached.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.distributed import sum_across
from limbeck.labels.targets import soften

Metric = Literal["cosine", "euclidean", "squared_euclidean"]


def prototype_scores(features: Tensor, prototypes_KD: Tensor, *, metric: Metric = "cosine") -> Tensor:
    """Higher is nearer, [..., K]: cosine in [-1, 1], or the negative (squared) Euclidean distance.

    A zero vector has the cosine 0 to all; where a feature lies on a prototype, the gradient of the distance is 0.
    Raises ValueError for widths that differ or an unknown metric.
    """
    if features.shape[-1] != prototypes_KD.shape[-1]:
        raise ValueError(
            f"features have width {features.shape[-1]} and prototypes {prototypes_KD.shape[-1]}: they must be equal."
        )
    features, prototypes_KD = _at_least_float32(features), _at_least_float32(prototypes_KD)
    if metric == "cosine":
        return F.normalize(features, dim=-1) @ F.normalize(prototypes_KD, dim=-1).T
    if metric not in ("euclidean", "squared_euclidean"):
        raise ValueError(f'metric is {metric!r}: choose "cosine", "euclidean" or "squared_euclidean".')
    dot = features @ prototypes_KD.T
    squared = features.square().sum(-1, keepdim=True) - 2 * dot + prototypes_KD.square().sum(-1)
    # Rounding can bring a distance of 0 below 0, and the root has no gradient there.
    squared = squared.clamp(min=1e-12)
    return -squared if metric == "squared_euclidean" else -squared.sqrt()


def soft_assignment(
    features: Tensor, prototypes_KD: Tensor, *, temperature: float | Tensor, metric: Metric = "cosine"
) -> Tensor:
    """softmax_k(score_k / T), [..., K]; for T -> 0 the one-hot of the nearest prototype, for T -> infinity uniform.

    Raises ValueError unless T > 0.
    """
    return soften(prototype_scores(features, prototypes_KD, metric=metric), temperature)


def class_means(features_ND: Tensor, labels_N: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The mean feature of each class over the batches of all processes, [C, D], and which classes occur, bool [C].

    A class that does not occur has the mean 0 and False. No gradient where several processes train.
    """
    features_ND = _at_least_float32(features_ND)
    sums_CD = features_ND.new_zeros(num_classes, features_ND.shape[1]).index_add(0, labels_N, features_ND)
    counts_C = features_ND.new_zeros(num_classes).index_add(0, labels_N, torch.ones_like(features_ND[:, 0]))
    sums_CD, counts_C = sum_across(sums_CD), sum_across(counts_C)
    return sums_CD / counts_C.clamp(min=1)[:, None], counts_C > 0


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

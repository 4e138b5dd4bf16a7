"""Target distributions: made from classes, softened, sharpened, mixed.

Shapes [..., C] with classes last; the leading dimensions are items. Results are float32 (float64 stays).
Nothing is detached here: these are plain functions of tensors. `pseudo_labels` and everything with a memory
detach.
"""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot(labels: Tensor, num_classes: int, *, smoothing: float = 0.0) -> Tensor:
    """(1 - smoothing) onehot(y) + smoothing / C: int64 [...] -> float32 [..., C].

    The uniform part includes the true class (Szegedy et al. 2016). Labels lie in 0..C-1; one outside fails in
    the scatter. Raises ValueError for smoothing outside [0, 1].
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing is {smoothing}: it must lie in [0, 1].")
    target = torch.full((*labels.shape, num_classes), smoothing / num_classes, device=labels.device)
    return target.scatter(-1, labels.unsqueeze(-1), 1 - smoothing + smoothing / num_classes)


def soften(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """softmax(logits / T) over the last dimension; flatter for T > 1. Raises ValueError unless T > 0."""
    return (_at_least_float32(logits) / _positive(temperature)).softmax(-1)


def sharpen(probabilities: Tensor, temperature: float | Tensor) -> Tensor:
    """p_c^(1/T) / sum_k p_k^(1/T): more peaked for T < 1, unchanged at T = 1; a zero stays zero.

    Computed through logarithms, so small probabilities do not underflow together. Raises ValueError unless T
    > 0. Source: MixMatch (Berthelot et al. 2019), equation 7.
    """
    return (_at_least_float32(probabilities).log() / _positive(temperature)).softmax(-1)


def hard(probabilities: Tensor) -> Tensor:
    """The most probable class, int64 [...]."""
    return probabilities.argmax(-1)


def mix_targets(first: Tensor, second: Tensor, share: float | Tensor) -> Tensor:
    """(1 - share) first + share second, for distributions [..., C]; share: a number or one per item, in [0,
    1].

    Two distributions give a distribution. PS-KD: first = one-hot label, second = the past prediction, share =
    alpha. mixup with lambda: first = the partner's target, second = one's own, share = lambda.
    Raises ValueError for shapes that differ or a number outside [0, 1].
    """
    if first.shape != second.shape:
        raise ValueError(f"targets have shapes {tuple(first.shape)} and {tuple(second.shape)}: they must be equal.")
    if isinstance(share, Tensor):
        share = share.reshape(share.shape + (1,) * (first.ndim - share.ndim))
    elif not 0 <= share <= 1:
        raise ValueError(f"share is {share}: it must lie in [0, 1].")
    return (1 - share) * _at_least_float32(first) + share * _at_least_float32(second)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _positive(temperature: float | Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be positive.")
    return temperature

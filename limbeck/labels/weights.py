"""How much a pseudo-label counts: weights per item from a teacher's probabilities [..., C], classes last.

Weights are float32 [...], detached. They are not normalised to a mean of 1; divide by their mean where a
paper does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from limbeck.distributed import gather


def confidence(probabilities: Tensor) -> Tensor:
    """max_c p_c, in [1 / C, 1]."""
    return probabilities.detach().float().amax(-1)


def negative_entropy(probabilities: Tensor) -> Tensor:
    """sum_c p_c log p_c in nats, in [-log C, 0]: a score (higher is surer), not yet a weight."""
    p = probabilities.detach().float()
    return torch.special.xlogy(p, p).sum(-1)


def certainty(probabilities: Tensor) -> Tensor:
    """1 - H(p) / log C, in [0, 1]: 1 for one-hot, 0 for uniform. Raises ValueError for fewer than two
    classes."""
    classes = probabilities.shape[-1]
    if classes < 2:
        raise ValueError(f"probabilities have {classes} class: certainty needs at least two.")
    return (1 + negative_entropy(probabilities) / math.log(classes)).clamp(0, 1)


def margin(probabilities: Tensor) -> Tensor:
    """The highest probability minus the second highest, in [0, 1]. Raises ValueError for fewer than two
    classes."""
    if probabilities.shape[-1] < 2:
        raise ValueError(f"probabilities have {probabilities.shape[-1]} class: a margin needs at least two.")
    best = probabilities.detach().float().topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


class TruncatedGaussian(nn.Module):
    """SoftMatch: full weight above the running mean of the confidence, a Gaussian's fall below it.

    w = exp(-min(0, max p - mu)^2 sigmas^2 / (2 var)); mu and var are moving averages of the batch's mean and
    unbiased variance of max p, updated with this batch first; they start at 1 / C and 1.
    forward(probabilities_BC) -> [B] in (0, 1]. Statistics are those of all processes' batch; they move only
    in train mode.
    Source: SoftMatch (Chen et al. 2023), equations 8 to 11. State: `mean`, `variance`.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, num_classes: int, *, decay: float = 0.999, sigmas: float = 2.0):
        super().__init__()
        self.decay = decay
        self.sigmas = sigmas
        self.register_buffer("mean", torch.tensor(1 / num_classes))
        self.register_buffer("variance", torch.tensor(1.0))

    @torch.no_grad()
    def forward(self, probabilities_BC: Tensor) -> Tensor:
        confidence_B = confidence(probabilities_BC)
        if self.training:
            everyone = gather(confidence_B)
            # One sample has no unbiased variance.
            variance, mean = torch.var_mean(everyone, correction=min(1, len(everyone) - 1))
            self.mean.lerp_(mean, 1 - self.decay)
            self.variance.lerp_(variance, 1 - self.decay)
        shortfall_B = (confidence_B - self.mean).clamp(max=0)
        # A batch of equal confidences drives the variance to 0, and 0 / 0 must not follow.
        return torch.exp(-shortfall_B.square() * self.sigmas**2 / (2 * self.variance.clamp(min=1e-12)))

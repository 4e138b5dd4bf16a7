"""Losses of diffusion models and of their distillation, all on predictions of x0.

A denoiser's error in eps, v or velocity is its error in x0 times a function of the signal-to-noise ratio SNR = alpha^2
/ sigma^2, so one loss with a weight serves all of them. Computed in float32 (float64 stays).

Shapes: B samples, behind it any dimensions of one image.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .reduction import Reduction, check_same_shape, reduce, upcast

Weighting = Literal["edm", "eps", "x0", "v", "flow", "min_snr"]

# Where a weight has no bound (no noise at all), it stops here.
LARGEST_LOG_SNR = 30.0


def x0_weight(log_snr_B: Tensor, weighting: Weighting, *, sigma_data: float = 0.5, gamma: float = 5.0) -> Tensor:
    """The weight [B] of squared errors in x0 that makes them squared errors in what the network says.

    x0: 1; eps: SNR; v: SNR + 1; flow: (sqrt(SNR) + 1)^2 (velocity eps - x0); edm: SNR + 1 / sigma_data^2, which is
    Karras et al. 2022's (sigma^2 + sigma_data^2) / (sigma sigma_data)^2; min_snr: min(SNR, gamma) (Hang et al. 2023).
    """
    snr_B = log_snr_B.double().clamp(max=LARGEST_LOG_SNR).exp()
    match weighting:
        case "x0":
            weight_B = torch.ones_like(snr_B)
        case "eps":
            weight_B = snr_B
        case "v":
            weight_B = snr_B + 1
        case "flow":
            weight_B = (snr_B.sqrt() + 1) ** 2
        case "edm":
            weight_B = snr_B + sigma_data**-2
        case "min_snr":
            weight_B = snr_B.clamp(max=gamma)
        case _:
            raise ValueError(f"weighting is {weighting!r}: choose one of edm, eps, x0, v, flow, min_snr.")
    return weight_B.to(upcast(log_snr_B).dtype)


def denoising(
    predicted_x0: Tensor,
    x0: Tensor,
    log_snr_B: Tensor,
    *,
    weighting: Weighting,
    sigma_data: float = 0.5,
    gamma: float = 5.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The mean over samples of `x0_weight` times the mean over an image of (predicted_x0 - x0)^2.

    `x0` is detached. `mean` is the mean over all elements, as in the papers' code.
    """
    check_same_shape(predicted_x0, x0)
    error_B = (upcast(predicted_x0) - upcast(x0.detach())).square().flatten(1).mean(1)
    weight_B = x0_weight(log_snr_B, weighting, sigma_data=sigma_data, gamma=gamma).to(error_B.dtype)
    return reduce(weight_B * error_B, reduction=reduction)


def gradient_as_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient with respect to `x` is `gradient` / x.numel(), and which is half the mean of gradient^2.

    0.5 mean (x - sg(x - g))^2; both `gradient` and the target are detached.
    """
    x = upcast(x)
    return 0.5 * F.mse_loss(x, (x - upcast(gradient)).detach())


def distribution_matching_gradient(x: Tensor, real_x0: Tensor, fake_x0: Tensor, smallest: float = 1e-8) -> Tensor:
    """The direction in which the law of `x` moves away from the teacher's: g = (fake_x0 - real_x0) / w, detached.

    w = mean |x - real_x0| over each sample. It is clamped at `smallest`, for the official code's c / 0 becomes 3e38;
    0 / 0 is 0 as there. Going down along g moves x towards what the teacher expects and away from what the fake score
    does. Source: DMD2 (arXiv 2405.14867), equations 1 and 2 with DMD's weight; `edm_guidance.py`.

    Args:
        x: [B, ...], the generator's samples.
        real_x0, fake_x0: what the teacher and the fake score expect behind the same noisy x.
    """
    check_same_shape(x, real_x0)
    check_same_shape(x, fake_x0)
    with torch.no_grad():
        away_real, away_fake = upcast(x) - upcast(real_x0), upcast(x) - upcast(fake_x0)
        weight_B = away_real.abs().flatten(1).mean(1).clamp(min=smallest)
        gradient = (away_real - away_fake) / weight_B.reshape(-1, *[1] * (x.ndim - 1))
        return gradient.nan_to_num()


def distribution_matching(x: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """DMD2's loss for the generator: `distribution_matching_gradient` as a loss; only `x` gets a gradient."""
    return gradient_as_loss(x, distribution_matching_gradient(x, real_x0, fake_x0))


def realism(fake_logits: Tensor) -> Tensor:
    """The generator's non-saturating GAN term: mean softplus(-logit of a fake)."""
    return F.softplus(-upcast(fake_logits)).mean()


def discrimination(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's term: mean softplus(-logit of a real) + mean softplus(logit of a fake)."""
    return F.softplus(-upcast(real_logits)).mean() + F.softplus(upcast(fake_logits)).mean()


def pseudo_huber(
    predicted: Tensor,
    target: Tensor,
    *,
    c: float | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """sqrt(||predicted - target||^2 + c^2) - c, the norm over a whole sample and not over its elements.

    c is by default 0.00054 sqrt(d), d the elements of a sample (Song and Dhariwal 2024, section 3.3). Nothing is
    detached. Gradients are finite where both are equal, if c > 0.
    """
    check_same_shape(predicted, target)
    distance_B = (upcast(predicted) - upcast(target)).flatten(1)
    size = 0.00054 * distance_B.shape[1] ** 0.5 if c is None else c
    return reduce((distance_B.square().sum(1) + size**2).sqrt() - size, weight=weight, reduction=reduction)

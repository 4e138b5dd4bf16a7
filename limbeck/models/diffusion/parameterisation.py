"""What a diffusion network predicts, and the exact way from one such prediction to another.

A noisy image is x_t = alpha x0 + sigma eps. The four predictions of the literature are linear in one another:

    eps         the noise
    x0          the clean image
    v           alpha eps - sigma x0   (Salimans and Ho 2022, appendix D; alpha^2 + sigma^2 = 1)
    flow        eps - x0               (rectified flow's velocity when alpha = 1 - t, sigma = t)

Shapes: B samples, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["eps", "x0", "v", "flow"]


def convert(
    prediction_BCHW: Tensor, x_BCHW: Tensor, alpha_B: Tensor, sigma_B: Tensor, source: Prediction, target: Prediction
) -> Tensor:
    """`prediction_BCHW`, which is a `source`, as the `target` that says the same of x_t = `x_BCHW`.

    Computed in float64, because alpha is near 0 at high noise and sigma at low noise; the result has the dtype of
    `x_BCHW`. Differentiable. `x0` from `eps` at alpha = 0, and `eps` from `x0` at sigma = 0, do not exist and are not
    finite.
    """
    if source == target:
        return prediction_BCHW.to(x_BCHW.dtype)
    alpha, sigma = spread(alpha_B, x_BCHW).double(), spread(sigma_B, x_BCHW).double()
    x0 = _to_x0(prediction_BCHW.double(), x_BCHW.double(), alpha, sigma, source)
    return _from_x0(x0, x_BCHW.double(), alpha, sigma, target).to(x_BCHW.dtype)


def _to_x0(prediction: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, source: Prediction) -> Tensor:
    match source:
        case "x0":
            return prediction
        case "eps":
            return (x - sigma * prediction) / alpha
        case "v":
            return (alpha * x - sigma * prediction) / (alpha**2 + sigma**2)
        case "flow":
            return (x - sigma * prediction) / (alpha + sigma)


def _from_x0(x0: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, target: Prediction) -> Tensor:
    if target == "x0":
        return x0
    eps = (x - alpha * x0) / sigma
    match target:
        case "eps":
            return eps
        case "v":
            return alpha * eps - sigma * x0
        case "flow":
            return eps - x0


def spread(values_B: Tensor, like_B: Tensor) -> Tensor:
    """One value a sample, with dimensions of size 1 behind it, to multiply `like_B` [B, ...]."""
    return values_B.reshape(-1, *[1] * (like_B.ndim - 1))


def to_model(images_BCHW: Tensor) -> Tensor:
    """Pictures in [0, 1] as diffusion models take them: in [-1, 1]."""
    return 2 * images_BCHW - 1


def to_images(x_BCHW: Tensor) -> Tensor:
    """What a diffusion model made, as pictures in [0, 1]."""
    return ((x_BCHW + 1) / 2).clamp(0, 1)


def random_normal(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise of the shape, dtype and device of `like`; drawn where the generator lives."""
    if generator is None:
        return torch.randn_like(like)
    return torch.randn(like.shape, dtype=like.dtype, device=generator.device, generator=generator).to(like.device)

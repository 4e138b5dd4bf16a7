"""Denoisers: networks of any parameterisation and schedule behind one call, mu(x_t, t, label) = the expected x0.

Shapes: B samples, C channels, H height, W width, D width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from limbeck.errors import UserError, require_positive
from limbeck.models.diffusion.parameterisation import Prediction, convert, spread
from limbeck.models.diffusion.schedules import NoiseSchedule, VarianceExploding
from limbeck.models.taps import Taps

GuidanceBase = Literal["conditional", "unconditional"]
Weighting = Literal["eps", "x0", "v", "flow", "edm"]


class ImageShape(NamedTuple):
    """Channels, height and width."""

    channels: int
    height: int
    width: int


class DenoisingNet(Protocol):
    """What a denoiser wants of its network: `net(x_BCHW, time_B, label_B) -> prediction_BCHW`.

    `label_B` is None for a network without classes; class `num_classes` is the null label. `bottleneck` names an inner
    module whose output ([B, D], [B, tokens, D] or [B, D, h, w]) a discriminator may read, `bottleneck_shape` is
    (D, side) of that output as a map [B, D, side, side]. `origin` describes the network for `load_denoiser`.
    """

    image_shape: ImageShape
    num_classes: int | None
    bottleneck: str
    bottleneck_shape: tuple[int, int]
    origin: dict[str, Any]


class Denoiser(nn.Module):
    """mu(x_t, t, label), the x0 that the network expects, with x_t = alpha(t) x0 + sigma(t) eps.

    Args:
        net: a `DenoisingNet`.
        schedule: what the times mean.
        prediction: what the network says of x_t; it becomes x0 in float64.
    """

    net: nn.Module
    schedule: NoiseSchedule
    sigma_data: float = 1.0  # the root mean square of the images, where the parameterisation knows of it

    def __init__(self, net: nn.Module, schedule: NoiseSchedule, prediction: Prediction = "eps") -> None:
        super().__init__()
        self.net, self.schedule, self.prediction = net, schedule, prediction
        self.image_shape: ImageShape = net.image_shape  # type: ignore[assignment]
        self.num_classes: int | None = net.num_classes  # type: ignore[assignment]
        self.bottleneck_shape: tuple[int, int] = net.bottleneck_shape  # type: ignore[assignment]

    @property
    def weighting(self) -> Weighting:
        """The weight under which errors in x0 are errors in what the network says; see `losses.diffusion.denoising`."""
        return self.prediction

    def forward(self, x_BCHW: Tensor, time_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        """x0 in the dtype of `x_BCHW`; without `label_B` a network with classes answers for none in particular."""
        prediction = self.net(x_BCHW, self.schedule.position(time_B).to(x_BCHW.dtype), self._label(x_BCHW, label_B))
        alpha_B, sigma_B = self.schedule.alpha(time_B), self.schedule.sigma(time_B)
        return convert(prediction, x_BCHW, alpha_B, sigma_B, self.prediction, "x0")

    def bottleneck(self, x_BCHW: Tensor, time_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        """float32 [B, D, side, side]: the inner map of the same network; what comes behind it does not run."""
        time_B = self.schedule.position(time_B).to(x_BCHW.dtype)
        return self._map(x_BCHW, time_B, self._label(x_BCHW, label_B))

    def _map(self, x_BCHW: Tensor, time_B: Tensor, label_B: Tensor | None) -> Tensor:
        name = f"net.{self.net.bottleneck}"
        inputs = (x_BCHW, time_B, label_B)
        inner = Taps(_OfOneArgument(self.net), [name], stop_early=True)(inputs).features[name]
        if inner.ndim == 3:
            inner = inner.transpose(1, 2)
        return inner.float().reshape(len(inner), self.bottleneck_shape[0], *[self.bottleneck_shape[1]] * 2)

    def _label(self, x_BCHW: Tensor, label_B: Tensor | None) -> Tensor | None:
        if self.num_classes is None:
            return None
        if label_B is None:
            return torch.full((x_BCHW.shape[0],), self.num_classes, device=x_BCHW.device)
        return label_B

    def get_classifier(self) -> None:
        """There is none: `limbeck.models.class_count` asks by this name."""

    @property
    def origin(self) -> dict[str, Any]:
        """What `load_denoiser` builds it from again."""
        return {**self.net.origin, "prediction": self.prediction, "schedule": self.schedule.settings}  # type: ignore[dict-item]


class EDMDenoiser(Denoiser):
    """The preconditioned network of Karras et al. 2022 (section 5, table 1); the time is sigma.

        mu(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4)
        c_skip = s_d^2 / (sigma^2 + s_d^2), c_out = sigma s_d / sqrt(sigma^2 + s_d^2), c_in = 1 / sqrt(sigma^2 + s_d^2)

    Args:
        net: F.
        sigma_data: s_d, about the root mean square of the images.
    """

    def __init__(self, net: nn.Module, sigma_data: float = 0.5, schedule: VarianceExploding | None = None) -> None:
        super().__init__(net, schedule or VarianceExploding(), "x0")
        require_positive(sigma_data=sigma_data)
        self.sigma_data = sigma_data

    @property
    def weighting(self) -> Weighting:
        return "edm"

    def forward(self, x_BCHW: Tensor, time_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        sigma_B, c_in_B = time_B.double(), self._c_in(time_B)
        c_skip, c_out, c_in = (
            spread(value_B, x_BCHW).to(x_BCHW.dtype)
            for value_B in ((self.sigma_data * c_in_B) ** 2, sigma_B * self.sigma_data * c_in_B, c_in_B)
        )
        inner = self.net(c_in * x_BCHW, self._c_noise(time_B).to(x_BCHW.dtype), self._label(x_BCHW, label_B))
        return c_skip * x_BCHW + c_out * inner.to(x_BCHW.dtype)

    def bottleneck(self, x_BCHW: Tensor, time_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        c_in = spread(self._c_in(time_B), x_BCHW).to(x_BCHW.dtype)
        return self._map(c_in * x_BCHW, self._c_noise(time_B).to(x_BCHW.dtype), self._label(x_BCHW, label_B))

    def _c_in(self, time_B: Tensor) -> Tensor:
        return (time_B.double() ** 2 + self.sigma_data**2).rsqrt()

    @staticmethod
    def _c_noise(time_B: Tensor) -> Tensor:
        return time_B.double().log() / 4

    @property
    def origin(self) -> dict[str, Any]:
        return {**super().origin, "prediction": "edm", "sigma_data": self.sigma_data}


class _OfOneArgument(nn.Module):
    """A network whose inputs come as one tuple, as `Taps` hands them on."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: tuple[Any, ...]) -> Tensor:
        return self.net(*inputs)


def denoiser_of(model: nn.Module) -> Denoiser:
    """The denoiser itself, or the one inside a sampler. Raises `UserError` for a network that is neither."""
    inner = getattr(model, "denoiser", model)
    if not isinstance(inner, Denoiser):
        raise UserError(
            f"a {type(model).__name__} is no diffusion model; load one by limbeck.models.diffusion.load_denoiser, or "
            "wrap your network in Denoiser or EDMDenoiser"
        )
    return inner


def require_images(denoiser: Denoiser, shape: Sequence[int], labels_N: Tensor | None) -> None:
    """Raise `UserError` where a denoiser cannot take images of this (C, H, W) or these classes."""
    if tuple(shape) != tuple(denoiser.image_shape):
        made, given = ("x".join(map(str, each)) for each in (denoiser.image_shape, shape))
        raise UserError(f"the diffusion model makes images {made} and the data's are {given} (channels, height, width)")
    if denoiser.num_classes is None:
        return
    if labels_N is None:
        raise UserError(
            f"the diffusion model has {denoiser.num_classes} classes, but the images have no label; label them, or "
            "build the model without classes"
        )
    low, high = int(labels_N.min()), int(labels_N.max())
    if low < 0 or high >= denoiser.num_classes:
        raise UserError(
            f"the label {low if low < 0 else high} is outside of the diffusion model's {denoiser.num_classes} classes "
            f"(0 to {denoiser.num_classes - 1}); mend the labels, or build the model with more classes"
        )


def guide(conditional: Tensor, unconditional: Tensor, scale: float, base: GuidanceBase) -> Tensor:
    """Classifier-free guidance in both conventions of the literature.

    base `conditional`: c + w (c - u), off at w = 0 (Ho and Salimans 2022); base `unconditional`: u + w (c - u), off at
    w = 1 (Stable Diffusion, DiT). Both weigh c and u by factors that add up to 1, so predictions of x0, eps, v and flow
    may be guided alike.
    """
    start = conditional if base == "conditional" else unconditional
    return start + scale * (conditional - unconditional)


def denoise_guided(
    denoiser: Denoiser, x_BCHW: Tensor, time_B: Tensor, label_B: Tensor | None, scale: float, base: GuidanceBase
) -> Tensor:
    """mu(x, t, label) under guidance: both predictions in one batch, one where guidance is off."""
    if label_B is None or denoiser.num_classes is None or scale == (0.0 if base == "conditional" else 1.0):
        return denoiser(x_BCHW, time_B, label_B)
    null_B = torch.full_like(label_B, denoiser.num_classes)
    twice = denoiser(torch.cat([x_BCHW, x_BCHW]), torch.cat([time_B, time_B]), torch.cat([label_B, null_B]))
    conditional, unconditional = twice.chunk(2)
    return guide(conditional, unconditional, scale, base)


@contextmanager
def weights_fixed(*modules: nn.Module) -> Iterator[None]:
    """What is computed inside has gradients for its inputs, and none for the modules' parameters."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)

"""Samplers: from noise and a denoiser to images.

The solvers are functions of any x0-predictor; times fall, and behind the last one comes the clean image. What ships is
a module around one of them: `FewStepSampler` for a distilled generator, `OdeSampler` for a diffusion model.

Shapes: B samples, C channels, H height, W width, S steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.diffusion.denoiser import Denoiser, GuidanceBase, denoise_guided
from limbeck.models.diffusion.parameterisation import random_normal, to_images
from limbeck.models.diffusion.schedules import NoiseSchedule

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_BCHW, time_B) -> x0_BCHW
Solver = Literal["heun", "euler", "ddim"]


def ddim(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_BCHW: Tensor,
    times_S: Tensor,
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, equation 12) from x at `times_S[0]` down to the clean image.

    x <- alpha' x0 + sqrt(sigma'^2 - s^2) eps + s noise,  s = eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)

    With eta = 0 this is Euler's method on the probability-flow ODE in x / alpha over sigma / alpha, for any schedule;
    with eta = 1, s^2 is the variance of the true posterior: ancestral sampling.
    """
    alphas_S, sigmas_S = schedule.alpha(times_S), schedule.sigma(times_S)
    for step in range(len(times_S)):
        x0 = denoise(x_BCHW, times_S[step].expand(x_BCHW.shape[0]))
        if step == len(times_S) - 1:
            return x0
        alpha, sigma, after_alpha, after_sigma = alphas_S[step], sigmas_S[step], alphas_S[step + 1], sigmas_S[step + 1]
        eps = (x_BCHW.double() - alpha * x0.double()) / sigma
        fresh = eta * after_sigma * (1 - (alpha * after_sigma / (after_alpha * sigma)) ** 2).sqrt()
        x = after_alpha * x0.double() + (after_sigma**2 - fresh**2).clamp(min=0).sqrt() * eps
        if eta:
            x = x + fresh * random_normal(x, generator)
        x_BCHW = x.to(x_BCHW.dtype)
    return x_BCHW


def heun(denoise: Denoise, schedule: NoiseSchedule, x_BCHW: Tensor, times_S: Tensor) -> Tensor:
    """Heun's method on dy/dr = (y - x0) / r with y = x / alpha, r = sigma / alpha (EDM's algorithm 1, no churn).

    Two calls of the denoiser a step, one at the last. The first time must not be pure noise (alpha = 0, as in flow
    matching): y would not be finite there; `ddim` is.
    """
    alphas_S, sigmas_S = schedule.alpha(times_S), schedule.sigma(times_S)
    ratios_S, y = sigmas_S / alphas_S, x_BCHW.double() / alphas_S[0]
    for step in range(len(times_S)):
        slope = (y - _at(denoise, y, alphas_S[step], times_S[step], x_BCHW.dtype)) / ratios_S[step]
        if step == len(times_S) - 1:
            y = y - ratios_S[step] * slope
            break
        width = ratios_S[step + 1] - ratios_S[step]
        guess = y + width * slope
        behind = _at(denoise, guess, alphas_S[step + 1], times_S[step + 1], x_BCHW.dtype)
        y = y + width * (slope + (guess - behind) / ratios_S[step + 1]) / 2
    return y.to(x_BCHW.dtype)


def _at(denoise: Denoise, y: Tensor, alpha: Tensor, time: Tensor, dtype: torch.dtype) -> Tensor:
    return denoise((alpha * y).to(dtype), time.expand(y.shape[0])).double()


def renoised(
    denoiser: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    schedule: NoiseSchedule,
    times_S: Tensor,
    noises: Sequence[Tensor],
    label_B: Tensor | None,
) -> Tensor:
    """What a few-step generator is given at the last of `times_S`: its x0 of the level before, noised anew.

    At the first level this is pure noise and the generator is not called at all. `noises` are S standard normal
    tensors [B, C, H, W], one a level.
    """
    x_BCHW = schedule.prior(noises[0])
    for step in range(1, len(times_S)):
        x0 = denoiser(x_BCHW, times_S[step - 1].expand(x_BCHW.shape[0]), label_B)
        x_BCHW = schedule.add_noise(x0, noises[step], times_S[step].expand(x_BCHW.shape[0]))
    return x_BCHW


class Sampler(nn.Module):
    """Noise to images: `sampler(noise_BCHW, label_B) -> images_BCHW` in [0, 1], or `sampler.sample(n, generator)`.

    Noise and labels may also come as one mapping with the keys `noise` and `label`. A model with classes that is given
    no labels makes images of no class in particular.
    """

    times_S: Tensor

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.image_shape, self.num_classes = denoiser.image_shape, denoiser.num_classes

    def forward(
        self,
        noise_BCHW: Tensor | dict[str, Tensor],
        label_B: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`generator` draws the noise that is added on the way, if any."""
        if isinstance(noise_BCHW, dict):
            label_B = noise_BCHW.get("label")
            noise_BCHW = noise_BCHW["noise"]
        return to_images(self.solve(noise_BCHW, label_B, generator))

    def solve(self, noise_BCHW: Tensor, label_B: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """x0 in [-1, 1] from standard normal noise."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(
        self,
        count: int,
        generator: torch.Generator | None = None,
        *,
        label_B: Tensor | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """`count` images [count, C, H, W] on the model's device, of random classes where none are asked for.

        Raises `UserError` for labels that the model does not know.
        """
        device = next(self.parameters()).device
        drawn = generator.device if generator is not None else device
        noise = torch.randn(count, *self.image_shape, device=drawn, generator=generator)
        if self.num_classes is not None:
            if label_B is None:
                label_B = torch.randint(self.num_classes, (count,), device=drawn, generator=generator)
            outside = (label_B < 0) | (label_B > self.num_classes)  # num_classes itself is the null label
            if outside.any():
                raise UserError(
                    f"a label to sample is {int(label_B[outside][0])}; the model has {self.num_classes} classes, "
                    f"0 to {self.num_classes - 1}"
                )
        parts = []
        for rows in torch.arange(count).split(batch_size):
            label = None if label_B is None else label_B[rows.to(label_B.device)].to(device)
            parts.append(self(noise[rows.to(drawn)].to(device), label, generator))
        return torch.cat(parts)

    def _keep_times(self, times_S: Tensor) -> None:
        """On the device of the denoiser, which may have been moved there before."""
        self.register_buffer("times_S", times_S.to(next(self.denoiser.parameters()).device), persistent=False)

    def get_classifier(self) -> None:
        """There is none: `limbeck.models.class_count` asks by this name."""

    @property
    def origin(self) -> dict[str, Any]:
        """What `load_sampler` builds it from again."""
        arguments = {name: getattr(self, name) for name in self._settings()}
        return {"sampler": type(self).__name__, "arguments": arguments, "denoiser": self.denoiser.origin}

    @classmethod
    def _settings(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "denoiser")]


class FewStepSampler(Sampler):
    """x0 at one level, noised anew to the next, and so on: consistency models' and DMD2's sampler.

    Args:
        levels: falling positions among `level_count` levels of the schedule; the first is the last level, pure noise.

    Raises:
        UserError: the levels do not fall from the last one.
    """

    def __init__(self, denoiser: Denoiser, levels: Sequence[int] = (999,), level_count: int = 1000) -> None:
        super().__init__(denoiser)
        levels = list(levels)
        falls = all(0 <= below < above for above, below in zip(levels, levels[1:], strict=False))
        if not levels or levels[0] != level_count - 1 or not falls:
            raise UserError(
                f"levels are {levels}; they fall from {level_count - 1}, the level of pure noise, e.g. "
                f"{[level_count * part // 4 - 1 for part in (4, 3, 2, 1)]}"
            )
        self.levels, self.level_count = levels, level_count
        self._keep_times(denoiser.schedule.levels(level_count)[torch.tensor(levels)])

    def solve(self, noise_BCHW: Tensor, label_B: Tensor | None, generator: torch.Generator | None) -> Tensor:
        noises = [noise_BCHW, *(random_normal(noise_BCHW, generator) for _ in self.levels[1:])]
        x_BCHW = renoised(self.denoiser, self.denoiser.schedule, self.times_S, noises, label_B)
        return self.denoiser(x_BCHW, self.times_S[-1].expand(x_BCHW.shape[0]), label_B)


class OdeSampler(Sampler):
    """The probability-flow ODE in `steps` steps over the schedule's levels, from the last one down.

    Args:
        solver: `heun` (2 steps - 1 calls), or `euler`, which is DDIM (as many calls as steps).
        guidance: w of u + w (c - u); 1 is off. Guided models take two calls for one.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        steps: int = 18,
        solver: Solver = "heun",
        guidance: float = 1.0,
        guidance_base: GuidanceBase = "unconditional",
    ) -> None:
        super().__init__(denoiser)
        if steps < 1:
            raise UserError(f"a sampler has {steps} steps; give at least 1")
        if denoiser.num_classes is None and guidance != (1.0 if guidance_base == "unconditional" else 0.0):
            raise UserError(f"guidance is {guidance}, but the model has no classes to be guided to; leave it out")
        self.steps, self.solver, self.guidance, self.guidance_base = steps, solver, guidance, guidance_base
        if solver == "heun" and denoiser.schedule.ends_in_pure_noise:
            raise UserError("Heun's method cannot start from pure noise as flow matching does; set the solver to euler")
        self._keep_times(denoiser.schedule.levels(steps).flip(0))

    def solve(self, noise_BCHW: Tensor, label_B: Tensor | None, generator: torch.Generator | None) -> Tensor:
        def denoise(x_BCHW: Tensor, time_B: Tensor) -> Tensor:
            return denoise_guided(self.denoiser, x_BCHW, time_B, label_B, self.guidance, self.guidance_base)

        start, schedule = self.denoiser.schedule.prior(noise_BCHW), self.denoiser.schedule
        return (heun if self.solver == "heun" else ddim)(denoise, schedule, start, self.times_S)


SAMPLERS: dict[str, type[Sampler]] = {"FewStepSampler": FewStepSampler, "OdeSampler": OdeSampler}

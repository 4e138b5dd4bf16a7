"""Noise schedules: how much of the image and how much noise x_t = alpha(t) x0 + sigma(t) eps holds.

The time `t` is whatever the schedule's networks are conditioned on: a sigma (`VarianceExploding`), an index 0..T-1
(`VariancePreserving`) or a number in [0, 1] (`FlowMatching`). Coefficients are float64: log-SNRs reach +-20.

Shapes: B samples, N levels, T trained steps.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from limbeck.errors import UserError, require_positive
from limbeck.models.diffusion.parameterisation import spread


class NoiseSchedule(nn.Module):
    """The coefficients as functions of the time, and the times that are worth visiting.

    `settings` are the constructor's arguments, as text for a file.
    """

    settings: dict[str, Any]
    ends_in_pure_noise: ClassVar[bool] = False  # whether alpha is 0 at the last level

    def alpha(self, time_B: Tensor) -> Tensor:
        """float64 [B]: the factor of the image."""
        raise NotImplementedError

    def sigma(self, time_B: Tensor) -> Tensor:
        """float64 [B]: the factor of the noise."""
        raise NotImplementedError

    def levels(self, count: int) -> Tensor:
        """float64 [N]: `count` times from little noise to the most; one level is the most."""
        raise NotImplementedError

    def draw(self, count: int, device: torch.device | str) -> Tensor:
        """float64 [B]: times to train a denoiser at, drawn from the schedule's usual distribution."""
        raise NotImplementedError

    def prior(self, noise_BCHW: Tensor) -> Tensor:
        """Pure noise, as sampling starts from it at the last level; `noise_BCHW` is standard normal."""
        return noise_BCHW

    def position(self, time_B: Tensor) -> Tensor:
        """The time as an eps-, v- or flow-network is told it: between 0 and about 1000."""
        return time_B

    def log_snr(self, time_B: Tensor) -> Tensor:
        """float64 [B]: log(alpha^2 / sigma^2)."""
        return 2 * (self.alpha(time_B).log() - self.sigma(time_B).log())

    def add_noise(self, x0_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma noise, in the dtype of `x0_BCHW`."""
        alpha, sigma = (spread(value(time_B), x0_BCHW).to(x0_BCHW.dtype) for value in (self.alpha, self.sigma))
        return alpha * x0_BCHW + sigma * noise_BCHW


class VarianceExploding(NoiseSchedule):
    """alpha = 1, sigma = t: the time is the noise level itself (Karras et al. 2022, EDM).

    Args:
        sigma_min, sigma_max: the levels reach from one to the other.
        rho: bends them towards low noise: sigma_i = (a + i / (N - 1) (b - a))^rho, a and b the ends' rho-th roots.
        mean_log_sigma, std_log_sigma: times to train at are exp(N(mean, std^2)).
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        mean_log_sigma: float = -1.2,
        std_log_sigma: float = 1.2,
    ) -> None:
        super().__init__()
        require_positive(sigma_min=sigma_min, rho=rho, std_log_sigma=std_log_sigma)
        if sigma_max <= sigma_min:
            raise UserError(f"sigma_max is {sigma_max} and sigma_min {sigma_min}; sigma_max is the larger one")
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        self.mean_log_sigma, self.std_log_sigma = mean_log_sigma, std_log_sigma
        self.settings = {
            "sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho,
            "mean_log_sigma": mean_log_sigma, "std_log_sigma": std_log_sigma,
        }  # fmt: skip

    def alpha(self, time_B: Tensor) -> Tensor:
        return torch.ones_like(time_B, dtype=torch.float64)

    def sigma(self, time_B: Tensor) -> Tensor:
        return time_B.double()

    def levels(self, count: int) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        ramp_N = torch.linspace(1, 0, count, dtype=torch.float64).flip(0)
        return (low + ramp_N * (high - low)) ** self.rho

    def draw(self, count: int, device: torch.device | str) -> Tensor:
        normal_B = torch.randn(count, device=device, dtype=torch.float64)
        return (self.mean_log_sigma + self.std_log_sigma * normal_B).exp()

    def prior(self, noise_BCHW: Tensor) -> Tensor:
        return self.sigma_max * noise_BCHW


Beta = Literal["cosine", "linear", "scaled_linear"]


class VariancePreserving(NoiseSchedule):
    """alpha^2 = prod_{s <= t} (1 - beta_s), sigma^2 = 1 - alpha^2; the time is an index 0..steps-1 (DDPM).

    Args:
        kind: of the betas: `linear` from `beta_start` to `beta_end` (Ho et al. 2020), `scaled_linear` with linear
            square roots (Stable Diffusion: 0.00085 to 0.012), or `cosine` (Nichol and Dhariwal 2021, clipped at 0.999).
        steps: T.
    """

    alphas_T: Tensor
    sigmas_T: Tensor

    def __init__(
        self, kind: Beta = "linear", steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> None:
        super().__init__()
        if steps < 2:
            raise UserError(f"a noise schedule has {steps} steps; give at least 2")
        if not 0 < beta_start < beta_end < 1:
            raise UserError(f"betas go from {beta_start} to {beta_end}; they rise, and lie between 0 and 1")
        self.steps = steps
        self.settings = {"kind": kind, "steps": steps, "beta_start": beta_start, "beta_end": beta_end}
        betas_T = _betas(kind, steps, beta_start, beta_end)
        log_alpha2_T = torch.log1p(-betas_T).cumsum(0)
        self.register_buffer("alphas_T", (log_alpha2_T / 2).exp(), persistent=False)
        # expm1, for 1 - alpha^2 of the first steps would lose half of its digits.
        self.register_buffer("sigmas_T", (-torch.expm1(log_alpha2_T)).sqrt(), persistent=False)

    def alpha(self, time_B: Tensor) -> Tensor:
        return self.alphas_T[time_B.long()]

    def sigma(self, time_B: Tensor) -> Tensor:
        return self.sigmas_T[time_B.long()]

    def levels(self, count: int) -> Tensor:
        return torch.linspace(self.steps - 1, 0, count, dtype=torch.float64).flip(0).round()

    def draw(self, count: int, device: torch.device | str) -> Tensor:
        return torch.randint(self.steps, (count,), device=device).double()


class FlowMatching(NoiseSchedule):
    """alpha = 1 - t, sigma = t for t in [0, 1] (rectified flow; Lipman et al. 2023, Liu et al. 2023).

    Args:
        shift: s moves the levels towards noise, t <- s t / (1 + (s - 1) t) (Esser et al. 2024, section 5.3.2).
        logit_normal: times to train at are sigmoid(N(0, 1)) and not uniform (the same, section 3.1).
    """

    ends_in_pure_noise = True

    def __init__(self, shift: float = 1.0, logit_normal: bool = True) -> None:
        super().__init__()
        require_positive(shift=shift)
        self.shift, self.logit_normal = shift, logit_normal
        self.settings = {"shift": shift, "logit_normal": logit_normal}

    def alpha(self, time_B: Tensor) -> Tensor:
        return 1 - time_B.double()

    def sigma(self, time_B: Tensor) -> Tensor:
        return time_B.double()

    def levels(self, count: int) -> Tensor:
        return self._shifted(torch.arange(1, count + 1, dtype=torch.float64) / count)

    def draw(self, count: int, device: torch.device | str) -> Tensor:
        if self.logit_normal:
            return self._shifted(torch.randn(count, device=device, dtype=torch.float64).sigmoid())
        # Away from 0, where the noise, and with it what an eps-network learns, is not determined.
        return self._shifted(torch.rand(count, device=device, dtype=torch.float64).clamp(min=1e-4))

    def position(self, time_B: Tensor) -> Tensor:
        return 1000 * time_B

    def _shifted(self, time: Tensor) -> Tensor:
        return self.shift * time / (1 + (self.shift - 1) * time)


def _betas(kind: Beta, steps: int, start: float, end: float) -> Tensor:
    """float64 [T]."""
    match kind:
        case "linear":
            return torch.linspace(start, end, steps, dtype=torch.float64)
        case "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        case "cosine":
            grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            alpha2 = ((grid + 0.008) / 1.008 * math.pi / 2).cos() ** 2
            return (1 - alpha2[1:] / alpha2[:-1]).clamp(max=0.999)
        case _:
            raise UserError(f"there is no noise schedule '{kind}'; choose linear, scaled_linear or cosine")


SCHEDULES: dict[str, type[NoiseSchedule]] = {
    "edm": VarianceExploding,
    "vp": VariancePreserving,
    "flow": FlowMatching,
}

"""DMD2: a generator of one or a few steps whose images have the law of a slow diffusion model's.

Yin et al.: Improved Distribution Matching Distillation for Fast Image Synthesis, NeurIPS 2024 (arXiv 2405.14867).

All networks are x0-predictors. x = G(pure noise, y); mu_real is the frozen teacher, mu_fake a copy of it that is
trained online on what G makes, D a discriminator's head on mu_fake's bottleneck.

    generator turn, every r-th step, with g = (mu_fake(x_t) - mu_real(x_t)) / mean |x - mu_real(x_t)|:
        L = 0.5 mean (x - sg(x - g))^2 + lambda_g mean softplus(-D(x + sigma_u n)),  t in the middle 96 %
    guidance turn, every step:
        L = mean w(t) (mu_fake(x_t) - x)^2, all t,
            + lambda_d mean [softplus(D(x + sigma_u n)) + softplus(-D(real + sigma_u' n'))]
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from limbeck.data import Stream
from limbeck.errors import UserError
from limbeck.losses.diffusion import denoising, discrimination, distribution_matching, realism
from limbeck.models.diffusion import (
    BottleneckDiscriminator,
    Denoiser,
    FewStepSampler,
    denoise_guided,
    denoiser_of,
    renoised,
    require_images,
    to_model,
    weights_fixed,
)
from limbeck.teachers import Frozen, Teacher
from limbeck.train import Batch, Losses, Method


class Level(NamedTuple):
    """A noise level for each sample, as a position among the schedule's levels, and the noise to add there."""

    position_B: Tensor
    noise: Tensor


class Draws(NamedTuple):
    """Everything that is random in one step.

    noises: one standard normal tensor [B, C, H, W] for each level that the generator passes, the last the one with
        gradient. label_B: the classes to make. matching, realism, fake, critic_fake, critic_real: where the
        distribution-matching loss, the generator's GAN term, the fake score and both sides of the discriminator look.
    """

    noises: list[Tensor]
    label_B: Tensor | None
    matching: Level
    realism: Level
    fake: Level
    critic_fake: Level
    critic_real: Level


class DMD2(Method):
    """Distribution matching with a fake score on a faster time-scale and a GAN term on its bottleneck.

    Args:
        student: the generator, started from the teacher's weights (`student: {run: <the teacher's recipe>}`); a
            denoiser, or a sampler around one. It is copied.
        teacher: the frozen diffusion model, `Frozen(denoiser or sampler)`.
        levels: falling positions among the teacher's `level_count` noise levels at which the generator works; the first
            is pure noise. (999,) is the one-step model, (999, 749, 499, 249) the four-step one.
        ratio: r, steps of the guidance (mu_fake and D) for one of the generator.
        gan: train with the discriminator; without it no real image is used.
        generator_gan_weight, discriminator_weight: lambda_g, lambda_d.
        teacher_guidance: w in u + w (c - u) of the teacher's prediction; 1 is off. The fake score is never guided.
        matched: the share of the levels, from and to, that the distribution-matching loss draws from.

    Raises:
        UserError: a network is no diffusion model, student and teacher do not share schedule, size and classes, or the
            images do not have theirs.
    """

    streams = {"images": ("weak",)}
    epoch_stream = "images"

    student: Denoiser
    levels_N: Tensor
    times_S: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        *,
        levels: Sequence[int] = (999,),
        ratio: int = 5,
        gan: bool = True,
        generator_gan_weight: float = 3e-3,
        discriminator_weight: float = 1e-2,
        teacher_guidance: float = 1.0,
        matched: tuple[float, float] = (0.02, 0.98),
        level_count: int = 1000,
    ) -> None:
        super().__init__()
        if ratio < 1:
            raise UserError(f"ratio is {ratio}; it is the number of guidance steps for one of the generator, 1 or more")
        if not 0 <= matched[0] < matched[1] <= 1:
            raise UserError(
                f"matched is {list(matched)}; give two rising shares of the noise levels, such as 0.02, 0.98"
            )
        if not isinstance(teacher, Frozen):
            raise UserError(
                f"DMD2 asks its teacher about noisy images: give a live one, not a {type(teacher).__name__}"
            )
        self.teacher, expert = teacher, denoiser_of(teacher.model)
        # Copies, for generator and teacher are often one and the same network to begin with.
        self.student = copy.deepcopy(denoiser_of(student)).requires_grad_(True)
        self.fake = copy.deepcopy(expert).requires_grad_(True)
        _require_kin(self.student, expert)
        self.discriminator = BottleneckDiscriminator(*expert.bottleneck_shape) if gan else None
        self.levels, self.ratio, self.teacher_guidance = list(levels), ratio, teacher_guidance
        self.matched = (int(matched[0] * level_count), min(int(matched[1] * level_count) + 1, level_count))
        self.register_buffer("levels_N", expert.schedule.levels(level_count), persistent=False)
        self.register_buffer("times_S", self.shipped().times_S, persistent=False)
        if gan:
            self.weights = {"realism": generator_gan_weight, "discrimination": discriminator_weight}
        self.seed = 0

    def parts(self) -> dict[str, list[nn.Parameter]]:
        guidance = [self.fake] if self.discriminator is None else [self.fake, self.discriminator]
        return {
            "generator": list(self.student.parameters()),
            "guidance": [weight for module in guidance for weight in module.parameters()],
        }

    def training_step(self, batch: Batch) -> Iterator[tuple[str, Losses]]:
        real = to_model(batch["images"]["weak"])
        draws, generator_turn = self.draw(real), self.clock.step % self.ratio == 0
        with torch.set_grad_enabled(generator_turn):
            x = self.generate(draws)
        if generator_turn:
            yield "generator", self.generator_losses(x, draws)
        yield "guidance", self.guidance_losses(x.detach(), real, batch["images"].get("label"), draws)

    def draw(self, real: Tensor) -> Draws:
        """All random numbers of a step, for as many samples as `real` has."""
        size, count = len(real), len(self.levels_N)

        def level(low: int = 0, high: int = count) -> Level:
            return Level(torch.randint(low, high, (size,), device=real.device), torch.randn_like(real))

        label_B = None
        if self.student.num_classes is not None:
            label_B = torch.randint(self.student.num_classes, (size,), device=real.device)
        noises = [torch.randn_like(real) for _ in range(self._steps())]
        return Draws(noises, label_B, level(*self.matched), level(), level(), level(), level())

    def _steps(self) -> int:
        """How many levels the generator passes in this step, 1 to S; one draw that all processes share."""
        # A function of seed and step, so that no process has to ask another, nor the host the device.
        shared = torch.Generator().manual_seed(self.seed * 1_000_003 + self.clock.step)
        return 1 + int(torch.randint(len(self.levels), (), generator=shared))

    def generate(self, draws: Draws) -> Tensor:
        """x = G at the last of the levels that the step passes: backward simulation, then one call with gradient."""
        times_S = self.times_S[: len(draws.noises)]
        with torch.no_grad():
            x_t = renoised(self.student, self.student.schedule, times_S, draws.noises, draws.label_B)
        return self.student(x_t, times_S[-1].expand(x_t.shape[0]), draws.label_B)

    def generator_losses(self, x: Tensor, draws: Draws) -> Losses:
        """Distribution matching, and realism in the discriminator's eyes; no gradient for the guidance's weights."""
        with torch.no_grad():
            x_t, time_B = self._noisy(x, draws.matching)
            expert = denoiser_of(self.teacher.model)
            real_x0 = denoise_guided(expert, x_t, time_B, draws.label_B, self.teacher_guidance, "unconditional")
            fake_x0 = self.fake(x_t, time_B, draws.label_B)
        losses = {"distribution_matching": distribution_matching(x, real_x0, fake_x0)}
        if self.discriminator is not None:
            with weights_fixed(self.fake, self.discriminator):
                losses["realism"] = realism(self._logits(x, draws.realism, draws.label_B))
        return losses

    def guidance_losses(self, x: Tensor, real: Tensor, real_label_B: Tensor | None, draws: Draws) -> Losses:
        """The fake score's denoising of what the generator made, and the discriminator between that and real images."""
        x_t, time_B = self._noisy(x, draws.fake)
        log_snr_B = self.fake.schedule.log_snr(time_B).to(x.dtype)
        fake_x0 = self.fake(x_t, time_B, draws.label_B)
        weight, sigma_data = self.fake.weighting, self.fake.sigma_data
        losses = {"denoising": denoising(fake_x0, x, log_snr_B, weighting=weight, sigma_data=sigma_data)}
        if self.discriminator is not None:
            real_logits = self._logits(real, draws.critic_real, real_label_B)
            fake_logits = self._logits(x, draws.critic_fake, draws.label_B)
            losses["discrimination"] = discrimination(real_logits, fake_logits)
            self.log(real_seen_real=(real_logits > 0).float().mean(), fake_seen_real=(fake_logits > 0).float().mean())
        return losses

    def _noisy(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        time_B = self.levels_N[level.position_B]
        return self.fake.schedule.add_noise(x, level.noise, time_B), time_B

    def _logits(self, x: Tensor, level: Level, label_B: Tensor | None) -> Tensor:
        assert self.discriminator is not None
        x_t, time_B = self._noisy(x, level)
        return self.discriminator(self.fake.bottleneck(x_t, time_B, label_B))

    def prepare(self, streams: Mapping[str, Stream]) -> None:
        self.seed = streams["images"].seed

    def shipped(self) -> FewStepSampler:
        return FewStepSampler(self.student, self.levels, len(self.levels_N))

    def check(self, streams: Mapping[str, Stream]) -> None:
        super().check(streams)
        samples = streams["images"].samples
        shape = samples.batch(torch.arange(1))["image"].shape[1:]
        require_images(self.student, shape, samples.fields.get("label"))


def _require_kin(student: Denoiser, teacher: Denoiser) -> None:
    """Generator and teacher must speak of the same noise, images and classes."""
    for what, mine, theirs in (
        ("image shape", student.image_shape, teacher.image_shape),
        ("number of classes", student.num_classes, teacher.num_classes),
        ("noise schedule", type(student.schedule).__name__, type(teacher.schedule).__name__),
        ("noise schedule's settings", student.schedule.settings, teacher.schedule.settings),
    ):
        if mine != theirs:
            raise UserError(
                f"the student's {what} is {mine} and the teacher's {theirs}; start the student from the teacher "
                "(student: {run: <the teacher's recipe>})"
            )

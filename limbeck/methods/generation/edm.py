"""Training a diffusion model: the teacher of every system that distils one, and their slow upper bound.

Karras et al.: Elucidating the Design Space of Diffusion-Based Generative Models, NeurIPS 2022 (arXiv 2206.00364).

With x an image in [-1, 1], ln sigma ~ N(-1.2, 1.2^2), n ~ N(0, I) and mu the preconditioned network

    L = mean lambda(sigma) (mu(x + sigma n, sigma, y) - x)^2,   lambda = sigma^-2 + sigma_data^-2

Networks of another parameterisation (eps, v, flow) train at their own schedule's times with their own weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from limbeck.data import Stream
from limbeck.errors import require_share
from limbeck.losses.diffusion import denoising
from limbeck.models.diffusion import Denoiser, OdeSampler, Solver, denoiser_of, require_images, to_model
from limbeck.train import Batch, Fields, Losses, Method


class EDM(Method):
    """Denoising of real images; ships an ODE sampler.

    Args:
        student: a denoiser (`limbeck.models.diffusion.load_denoiser`), or a sampler around one.
        label_dropout: share of the labels that are replaced by the null label, so that guidance has something to guide
            from; 0.1 is usual.
        sampling_steps, solver, guidance: of the sampler that ships; guidance w in u + w (c - u), 1 is off.

    Raises:
        UserError: the student is no diffusion model, or the images' size or labels are not the model's.
    """

    streams = {"images": ("weak",)}
    epoch_stream = "images"

    student: Denoiser

    def __init__(
        self,
        student: nn.Module,
        *,
        label_dropout: float = 0.0,
        sampling_steps: int = 18,
        solver: Solver = "heun",
        guidance: float = 1.0,
    ) -> None:
        super().__init__()
        require_share(label_dropout=label_dropout)
        self.student = denoiser_of(student)
        self.label_dropout, self.guidance = label_dropout, guidance
        self.sampling_steps, self.solver = sampling_steps, solver
        self.shipped()  # settings that the sampler refuses are refused now

    def training_step(self, batch: Batch) -> Losses:
        x0 = to_model(batch["images"]["weak"])
        time_B, noise = self.student.schedule.draw(len(x0), x0.device), torch.randn_like(x0)
        predicted = self.student(
            self.student.schedule.add_noise(x0, noise, time_B), time_B, self._label(batch["images"])
        )
        log_snr_B = self.student.schedule.log_snr(time_B).to(x0.dtype)
        loss = denoising(predicted, x0, log_snr_B, weighting=self.student.weighting, sigma_data=self.student.sigma_data)
        return {"denoising": loss}

    def _label(self, images: Fields) -> Tensor | None:
        label_B = images.get("label")
        if self.student.num_classes is None or label_B is None:
            return None
        dropped_B = torch.rand(label_B.shape, device=label_B.device) < self.label_dropout
        return label_B.masked_fill(dropped_B, self.student.num_classes)

    def shipped(self) -> OdeSampler:
        return OdeSampler(self.student, self.sampling_steps, self.solver, self.guidance)

    def check(self, streams: Mapping[str, Stream]) -> None:
        super().check(streams)
        samples = streams["images"].samples
        shape = samples.batch(torch.arange(1))["image"].shape[1:]
        require_images(self.student, shape, samples.fields.get("label"))

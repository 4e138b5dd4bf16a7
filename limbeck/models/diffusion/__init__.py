"""Diffusion models: parameterisations, noise schedules, denoisers of one protocol, samplers that ship."""

from limbeck.models.diffusion.denoiser import (
    Denoiser,
    DenoisingNet,
    EDMDenoiser,
    GuidanceBase,
    ImageShape,
    denoise_guided,
    denoiser_of,
    guide,
    require_images,
    weights_fixed,
)
from limbeck.models.diffusion.diffusers_nets import DiffusersNet
from limbeck.models.diffusion.discriminator import BottleneckDiscriminator
from limbeck.models.diffusion.load import load_denoiser, load_sampler
from limbeck.models.diffusion.nets import DenoisingMlp, DenoisingUNet
from limbeck.models.diffusion.parameterisation import Prediction, convert, random_normal, spread, to_images, to_model
from limbeck.models.diffusion.samplers import FewStepSampler, OdeSampler, Sampler, Solver, ddim, heun, renoised
from limbeck.models.diffusion.schedules import FlowMatching, NoiseSchedule, VarianceExploding, VariancePreserving

__all__ = [
    "BottleneckDiscriminator",
    "Denoiser",
    "DenoisingMlp",
    "DenoisingNet",
    "DenoisingUNet",
    "DiffusersNet",
    "EDMDenoiser",
    "FewStepSampler",
    "FlowMatching",
    "GuidanceBase",
    "ImageShape",
    "NoiseSchedule",
    "OdeSampler",
    "Prediction",
    "Sampler",
    "Solver",
    "VarianceExploding",
    "VariancePreserving",
    "convert",
    "ddim",
    "denoise_guided",
    "denoiser_of",
    "guide",
    "heun",
    "load_denoiser",
    "load_sampler",
    "random_normal",
    "renoised",
    "require_images",
    "spread",
    "to_images",
    "to_model",
    "weights_fixed",
]

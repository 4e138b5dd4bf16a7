"""Samplers against diffusers' schedulers, and against what can be computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.models.diffusion import (
    Denoiser,
    DenoisingMlp,
    EDMDenoiser,
    FewStepSampler,
    FlowMatching,
    OdeSampler,
    VarianceExploding,
    VariancePreserving,
    convert,
    ddim,
    heun,
    renoised,
)


def normal_posterior(schedule, mean: float = 0.7, deviation: float = 0.3):
    """E[x0 | x_t] where the data are N(mean, deviation^2)."""

    def denoise(x: Tensor, time_B: Tensor) -> Tensor:
        alpha, sigma = (value(time_B).view(-1, 1, 1, 1) for value in (schedule.alpha, schedule.sigma))
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        return (mean + gain * (x.double() - alpha * mean)).to(x.dtype)

    return denoise


def noise(seed: int = 0, count: int = 4) -> Tensor:
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def sampler(**more) -> FewStepSampler:
    torch.manual_seed(0)
    net = DenoisingMlp(num_classes=3, image_size=4, width=16, depth=2)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return FewStepSampler(EDMDenoiser(net), **more)


def test_euler_on_karras_sigmas_is_edm_euler_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    schedule = VarianceExploding()
    denoise, x = normal_posterior(schedule), 80 * noise()
    theirs = diffusers.EDMEulerScheduler(sigma_data=0.5)
    theirs.set_timesteps(12)
    found = ddim(denoise, schedule, x, schedule.levels(12).flip(0))
    for time, sigma in zip(theirs.timesteps, theirs.sigmas, strict=False):
        theirs.scale_model_input(x, time)
        answer = denoise(x, sigma.expand(4))
        x = theirs.step(torch.zeros_like(x), time, x, pred_original_sample=answer).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_heun_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.HeunDiscreteScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    theirs.set_timesteps(10)
    schedule = VariancePreserving()
    times = torch.unique_consecutive(theirs.timesteps).double().round()
    denoise, start = normal_posterior(schedule), noise()
    # Theirs walks x / alpha over sigma / alpha, starting from noise of variance 1 + (sigma / alpha)^2.
    alpha = schedule.alpha(times)
    y = start.double() / alpha[0]
    for time in theirs.timesteps:
        scale = schedule.alpha(time.round().expand(4)).view(-1, 1, 1, 1)
        x_t = scale * y
        x0 = denoise(x_t, time.round().expand(4))
        eps = convert(x0, x_t, scale.flatten(), (1 - scale**2).sqrt().flatten(), "x0", "eps")
        y = theirs.step(eps, time, y).prev_sample
    torch.testing.assert_close(heun(denoise, schedule, start, times).double(), y, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_that_of_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    theirs.set_timesteps(10)
    schedule = VariancePreserving()
    denoise, x = normal_posterior(schedule), noise()
    found = ddim(denoise, schedule, x, theirs.timesteps, eta=eta, generator=torch.Generator("cpu").manual_seed(1))
    generator = torch.Generator("cpu").manual_seed(1)
    for step, time in enumerate(theirs.timesteps):
        eps = convert(
            denoise(x, time.expand(4)), x, schedule.alpha(time.expand(4)), schedule.sigma(time.expand(4)), "x0", "eps"
        )
        fresh = None
        if eta and step < 9:  # ours draws in float64 and none at the end, where theirs has variance 0
            fresh = torch.randn(x.shape, dtype=torch.float64, generator=generator).float()
        elif eta:
            fresh = torch.zeros_like(x)
        x = theirs.step(eps, time, x, eta=eta, variance_noise=fresh).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_flow_euler_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    schedule = FlowMatching()
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=schedule.levels(8).flip(0).tolist())
    denoise, x = normal_posterior(schedule), noise()
    found = ddim(denoise, schedule, x, schedule.levels(8).flip(0))
    for time, sigma in zip(theirs.timesteps, theirs.sigmas, strict=False):
        at = sigma.expand(4).double()
        velocity = convert(denoise(x, at), x, 1 - at, at, "x0", "flow")
        x = theirs.step(velocity, time, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", [VarianceExploding(), VariancePreserving("cosine")])
@pytest.mark.parametrize(("solve", "order"), [(ddim, 1), (heun, 2)])
def test_solvers_converge_to_the_exact_flow_with_their_order(schedule, solve, order):
    """For normal data the flow is a straight map of quantiles: noise z becomes mean + deviation z (up to the prior)."""
    z = noise().double()
    errors = []
    for steps in (40, 80):
        times = schedule.levels(steps).flip(0)
        start = (
            schedule.alpha(times[:1]) * 0.7
            + (schedule.alpha(times[:1]) ** 2 * 0.09 + schedule.sigma(times[:1]) ** 2).sqrt() * z
        )
        made = solve(normal_posterior(schedule), schedule, start, times)
        errors.append((made - (0.7 + 0.3 * z)).abs().max().item())
    assert errors[1] < errors[0] / (1.6 if order == 1 else 2.2) and errors[1] < (0.05 if order == 1 else 0.01)


def test_ancestral_sampling_has_the_law_of_the_data():
    schedule = VariancePreserving()
    start = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    times = schedule.levels(100).flip(0)
    made = ddim(normal_posterior(schedule), schedule, start, times, eta=1.0, generator=torch.Generator().manual_seed(1))
    assert made.mean().item() == pytest.approx(0.7, abs=0.03) and made.std().item() == pytest.approx(0.3, abs=0.03)


def test_heun_refuses_to_start_from_pure_noise():
    flow = Denoiser(DenoisingMlp(image_size=4, width=8, depth=2), FlowMatching(), "flow")
    assert OdeSampler(flow, 3, "euler").sample(2).shape == (2, 1, 4, 4)
    with pytest.raises(UserError, match="set the solver to euler"):
        OdeSampler(flow)


def test_the_one_step_sampler_calls_the_generator_once_on_pure_noise():
    made = sampler()
    z, label = noise(), torch.tensor([0, 1, 2, 0])
    expected = ((made.denoiser(80 * z, torch.full((4,), 80.0), label) + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(made(z, label), expected)
    torch.testing.assert_close(made({"noise": z, "label": label}), expected)


def test_few_steps_noise_x0_anew_level_by_level():
    schedule = VarianceExploding()
    times = schedule.levels(1000)[torch.tensor([999, 749, 499])]
    seen = []

    def generator(x, time_B, label_B):
        seen.append((x, float(time_B[0])))
        return torch.full_like(x, float(len(seen)))

    noises = [noise(seed) for seed in range(3)]
    x = renoised(generator, schedule, times, noises, None)
    torch.testing.assert_close(seen[0][0], 80 * noises[0])
    torch.testing.assert_close(seen[1][0], 1.0 + float(times[1]) * noises[1])
    torch.testing.assert_close(x, 2.0 + float(times[2]) * noises[2])
    assert [time for _, time in seen] == times[:2].tolist()
    assert torch.equal(renoised(generator, schedule, times[:1], noises, None), 80 * noises[0]) and len(seen) == 2


def test_samples_are_pictures_and_a_seed_settles_them():
    made = sampler(levels=[999, 499])
    first, again = (made.sample(7, torch.Generator().manual_seed(3), batch_size=4) for _ in range(2))
    assert first.shape == (7, 1, 4, 4) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, made.sample(7, torch.Generator().manual_seed(4)))


def test_a_class_that_the_model_does_not_know_is_refused():
    with pytest.raises(UserError, match="a label to sample is 7; the model has 3 classes"):
        sampler().sample(2, label_B=torch.tensor([0, 7]))


@pytest.mark.parametrize("levels", [[], [998], [999, 999], [999, 200, 300], [999, -1]])
def test_levels_that_do_not_fall_from_pure_noise_are_refused(levels):
    with pytest.raises(UserError, match="they fall from 999"):
        sampler(levels=levels)


def test_an_ode_sampler_of_one_step_is_one_call_at_the_last_level():
    denoiser = sampler().denoiser
    z, label = noise(), torch.tensor([0, 1, 2, 0])
    expected = ((denoiser(80 * z, torch.full((4,), 80.0), label) + 1) / 2).clamp(0, 1)
    for solver in ("heun", "euler"):
        torch.testing.assert_close(OdeSampler(denoiser, 1, solver)(z, label), expected)
    assert not torch.allclose(OdeSampler(denoiser, 6)(z, label), OdeSampler(denoiser, 6, guidance=3.0)(z, label))


def test_guidance_without_classes_is_refused():
    denoiser = EDMDenoiser(DenoisingMlp(image_size=4, width=8, depth=2))
    with pytest.raises(UserError, match="no classes to be guided to"):
        OdeSampler(denoiser, guidance=2.0)

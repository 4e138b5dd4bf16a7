"""Noise schedules against their formulas and against diffusers."""

from __future__ import annotations

import pytest
import torch

from limbeck.errors import UserError
from limbeck.models.diffusion import FlowMatching, VarianceExploding, VariancePreserving


def test_edm_levels_rise_from_sigma_min_to_sigma_max_as_in_karras():
    levels = VarianceExploding().levels(1000)
    ramp = torch.linspace(0, 1, 1000, dtype=torch.float64)
    karras = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(levels, karras.flip(0))
    assert (levels.diff() > 0).all() and levels.dtype == torch.float64
    assert VarianceExploding().levels(1).item() == pytest.approx(80)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_variance_preserving_schedules_are_those_of_diffusers(kind):
    diffusers = pytest.importorskip("diffusers")
    name = {"cosine": "squaredcos_cap_v2"}.get(kind, kind)
    theirs = diffusers.DDPMScheduler(beta_schedule=name, beta_start=0.00085, beta_end=0.012).alphas_cumprod.double()
    schedule = VariancePreserving(kind, beta_start=0.00085, beta_end=0.012)
    time = torch.arange(1000)
    torch.testing.assert_close(schedule.alpha(time) ** 2, theirs, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(schedule.alpha(time) ** 2 + schedule.sigma(time) ** 2, torch.ones(1000).double())
    assert (schedule.log_snr(time).diff() < 0).all()


def test_flow_matching_levels_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = FlowMatching(shift=3.0)
    torch.testing.assert_close(schedule.levels(1000).flip(0).float(), theirs.sigmas, rtol=1e-5, atol=1e-6)
    time = torch.tensor([0.25])
    assert schedule.alpha(time).item() == 0.75 and schedule.sigma(time).item() == 0.25


@pytest.mark.parametrize("schedule", [VarianceExploding(), VariancePreserving(), FlowMatching()])
def test_noisy_images_hold_alpha_of_the_image_and_sigma_of_the_noise(schedule):
    time_B = schedule.levels(1000)[torch.tensor([100, 700])]
    x0, noise = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    alpha, sigma = (value(time_B).view(2, 1, 1, 1) for value in (schedule.alpha, schedule.sigma))
    torch.testing.assert_close(schedule.add_noise(x0, noise, time_B).double(), alpha * x0 + sigma * noise)
    torch.testing.assert_close(schedule.log_snr(time_B), 2 * (alpha / sigma).log().flatten())


def test_sampling_starts_from_pure_noise_of_the_last_level():
    noise = torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(VarianceExploding().prior(noise), 80 * noise)
    assert VariancePreserving().prior(noise) is noise


def test_training_times_have_the_usual_law():
    torch.manual_seed(0)
    logs = VarianceExploding().draw(20_000, "cpu").log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.05) and logs.std().item() == pytest.approx(1.2, abs=0.05)
    indices = VariancePreserving().draw(20_000, "cpu")
    assert indices.min() < 5 and indices.max() > 994 and (indices == indices.round()).all()
    times = FlowMatching().draw(20_000, "cpu")
    assert times.mean().item() == pytest.approx(0.5, abs=0.02) and ((times > 0) & (times < 1)).all()


def test_settings_build_the_schedule_again():
    for schedule in (VarianceExploding(sigma_max=40), VariancePreserving("cosine", 100), FlowMatching(2.0)):
        again = type(schedule)(**schedule.settings)
        assert torch.equal(again.levels(7), schedule.levels(7))


def test_wrong_settings_are_refused_in_one_sentence():
    for make, words in (
        (lambda: VarianceExploding(sigma_min=3.0, sigma_max=1.0), "sigma_max is the larger one"),
        (lambda: VariancePreserving("sigmoid"), "no noise schedule 'sigmoid'"),
        (lambda: VariancePreserving(beta_start=0.5, beta_end=0.1), "they rise"),
        (lambda: FlowMatching(shift=0.0), "above 0"),
    ):
        with pytest.raises(UserError, match=words):
            make()

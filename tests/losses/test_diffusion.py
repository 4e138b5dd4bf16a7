"""Losses of diffusion models and of score distillation: identities of the papers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.losses.diffusion import (
    denoising,
    discrimination,
    distribution_matching,
    distribution_matching_gradient,
    gradient_as_loss,
    pseudo_huber,
    realism,
    x0_weight,
)

SEEDS = st.integers(0, 2**31)


def images(seed: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(count)]


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_equal_scores_give_no_gradient(seed):
    x, x0, _ = images(seed)
    x.requires_grad_()
    loss = distribution_matching(x, x0, x0)
    loss.backward()
    assert loss.item() == 0 and x.grad.abs().max() == 0


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_the_gradient_of_the_loss_is_g_over_the_number_of_elements(seed):
    x, real, fake = (image.requires_grad_() for image in images(seed))
    distribution_matching(x, real, fake).backward()
    weight = (x - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(x.grad, ((fake - real) / weight / x.numel()).detach())
    assert real.grad is None and fake.grad is None


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(0.01, 100))
def test_the_gradient_does_not_change_when_both_distances_are_scaled(seed, scale):
    x, real, fake = images(seed)
    scaled = distribution_matching_gradient(x, x + scale * (real - x), x + scale * (fake - x))
    torch.testing.assert_close(scaled, distribution_matching_gradient(x, real, fake))


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(0.1, 5.0), st.floats(0.05, 20.0))
def test_descent_moves_samples_of_one_normal_law_towards_the_mean_of_the_other(seed, mean, sigma):
    """mu_real is the posterior mean of N(m, I), mu_fake of N(0, I), the law of x."""
    x, noise, _ = images(seed)
    x_t = x + sigma * noise
    fake = x_t / (1 + sigma**2)
    real = fake + sigma**2 / (1 + sigma**2) * mean
    g = distribution_matching_gradient(x, real, fake)
    assert (g < 0).all(), "minus g points towards m > 0"


def test_the_weight_is_the_distance_to_the_teacher_and_not_between_the_scores():
    x, real, fake = torch.zeros(1, 1), torch.full((1, 1), 2.0), torch.full((1, 1), 3.0)
    assert distribution_matching_gradient(x, real, fake).item() == 0.5


def test_no_distance_to_the_teacher_gives_a_finite_gradient():
    x = torch.zeros(2, 3)
    fake = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    g = distribution_matching_gradient(x, x, fake)
    assert torch.equal(g[0], torch.zeros(3))
    assert torch.isfinite(g).all() and g[1, 0].item() == pytest.approx(1e8)


def test_any_gradient_can_be_a_loss():
    x, g, _ = images(0)
    x.requires_grad_()
    loss = gradient_as_loss(x, g)
    loss.backward()
    torch.testing.assert_close(x.grad, g / x.numel())
    torch.testing.assert_close(loss, g.square().mean() / 2)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(0.01, 1.5))
def test_weighted_errors_in_x0_are_errors_in_what_the_network_says(seed, angle):
    x0, predicted, noise = images(seed)
    alpha, sigma = torch.tensor(angle).cos().double(), torch.tensor(angle).sin().double()
    log_snr_B = (2 * (alpha / sigma).log()).expand(4)
    x_t = alpha * x0 + sigma * noise
    eps = (x_t - alpha * predicted) / sigma
    errors = {
        "x0": predicted - x0,
        "eps": eps - noise,
        "v": (alpha * eps - sigma * predicted) - (alpha * noise - sigma * x0),
        "flow": (eps - predicted) - (noise - x0),
    }
    for weighting, error in errors.items():
        found = denoising(predicted, x0, log_snr_B, weighting=weighting)
        torch.testing.assert_close(found, error.square().mean(), rtol=1e-6, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.002, 80.0), st.floats(0.1, 2.0))
def test_edm_and_min_snr_weights_are_those_of_their_papers(sigma, sigma_data):
    log_snr_B = -2 * torch.tensor([sigma], dtype=torch.float64).log()
    edm = x0_weight(log_snr_B, "edm", sigma_data=sigma_data).item()
    assert edm == pytest.approx((sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2)
    assert x0_weight(log_snr_B, "min_snr", gamma=5).item() == pytest.approx(min(sigma**-2, 5))


def test_weights_stay_finite_without_noise_and_without_image():
    log_snr_B = torch.tensor([torch.inf, -torch.inf])
    for weighting in ("edm", "eps", "x0", "v", "flow", "min_snr"):
        assert torch.isfinite(x0_weight(log_snr_B, weighting)).all()
    with pytest.raises(ValueError, match="weighting is 'snr'"):
        x0_weight(log_snr_B, "snr")


def test_denoising_trains_the_prediction_and_not_the_target():
    x0, predicted, _ = (image.requires_grad_() for image in images(1))
    denoising(predicted, x0, torch.zeros(4), weighting="edm").backward()
    assert x0.grad is None and predicted.grad.abs().sum() > 0


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_gan_terms_are_binary_cross_entropies(seed):
    real, fake = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)) * 4
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = bce(real, torch.ones(5)) + bce(fake, torch.zeros(5))
    torch.testing.assert_close(discrimination(real, fake), expected)
    torch.testing.assert_close(realism(fake), bce(fake, torch.ones(5)))
    assert torch.isfinite(discrimination(-1e4 * torch.ones(2), 1e4 * torch.ones(2)))


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.floats(1e-3, 10))
def test_pseudo_huber_is_of_a_sample_s_norm(seed, c):
    x, y, _ = images(seed)
    norms = (x - y).flatten(1).norm(dim=1)
    torch.testing.assert_close(pseudo_huber(x, y, c=c, reduction="none"), (norms**2 + c**2).sqrt() - c)
    x.requires_grad_()
    pseudo_huber(x, x.detach()).backward()
    assert x.grad.abs().max() == 0


def test_pseudo_huber_s_constant_grows_with_the_root_of_the_dimensions():
    x = torch.zeros(1, 100)
    expected = (4 + 0.0054**2) ** 0.5 - 0.0054
    assert pseudo_huber(x, x + 0.2).item() == pytest.approx(expected, rel=1e-5)

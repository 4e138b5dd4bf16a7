"""Conversions between eps, x0, v and flow."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.models.diffusion import VariancePreserving, convert, to_images, to_model

KINDS = ("eps", "x0", "v", "flow")


def noisy(angle: float, scale: float = 1.0, dtype: torch.dtype = torch.float64):
    """x0, eps and x_t at alpha = cos, sigma = sin of the angle."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    angle_B = torch.full((3,), angle, dtype=torch.float64)
    alpha, sigma = scale * angle_B.cos(), scale * angle_B.sin()
    x_t = (alpha.view(-1, 1, 1, 1) * x0.double() + sigma.view(-1, 1, 1, 1) * eps.double()).to(dtype)
    return x0, eps, x_t, alpha, sigma


def truth(kind: str, x0, eps, alpha, sigma):
    alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[kind]


@pytest.mark.parametrize(("source", "target"), list(product(KINDS, KINDS)))
@settings(max_examples=25, deadline=None)
@given(angle=st.floats(0.01, 1.56), scale=st.sampled_from([1.0, 0.3, 2.0]))
def test_the_true_prediction_of_one_kind_becomes_that_of_another(source, target, angle, scale):
    x0, eps, x_t, alpha, sigma = noisy(angle, scale)
    found = convert(truth(source, x0, eps, alpha, sigma), x_t, alpha, sigma, source, target)
    torch.testing.assert_close(found, truth(target, x0, eps, alpha, sigma), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("source", "target"), list(product(KINDS, KINDS)))
def test_there_and_back_is_the_identity(source, target):
    _, _, x_t, alpha, sigma = noisy(0.7)
    anything = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    there = convert(anything, x_t, alpha, sigma, source, target)
    torch.testing.assert_close(convert(there, x_t, alpha, sigma, target, source), anything)


def test_x0_from_eps_at_the_noisiest_step_is_that_of_float64():
    """In float32 (x - sigma eps) / alpha loses its digits there: alpha is 0.006."""
    schedule = VariancePreserving()
    time_B = torch.full((3,), 999)
    x0 = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    eps = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    alpha, sigma = schedule.alpha(time_B), schedule.sigma(time_B)
    x_t = schedule.add_noise(x0, eps, time_B)
    exact = (x_t.double() - sigma.view(-1, 1, 1, 1) * eps.double()) / alpha.view(-1, 1, 1, 1)
    assert torch.equal(convert(eps, x_t, alpha, sigma, "eps", "x0"), exact.float())


def test_gradient_flows_through_a_conversion():
    _, _, x_t, alpha, sigma = noisy(0.4)
    eps = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    convert(eps, x_t, alpha, sigma, "eps", "x0").sum().backward()
    torch.testing.assert_close(eps.grad, (-sigma / alpha).view(-1, 1, 1, 1).expand_as(eps))


def test_images_go_to_the_model_and_back():
    images = torch.rand(2, 3, 4, 4)
    assert to_model(images).min() < 0
    torch.testing.assert_close(to_images(to_model(images)), images)
    assert to_images(torch.tensor([-3.0, 3.0])).tolist() == [0.0, 1.0]

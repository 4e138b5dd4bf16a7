"""The photometric view."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data import Photometric
from limbeck.errors import UserError

NOTHING = {"jitter_probability": 0.0, "grey": 0.0, "blur": 0.0, "erasing": ()}


def test_with_nothing_left_on_the_picture_stays():
    images = torch.rand(3, 3, 20, 24)
    torch.testing.assert_close(Photometric(**NOTHING)(images), images)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), channels=st.sampled_from([1, 3]))
def test_it_stays_in_range_keeps_the_shape_and_replays_exactly(seed, channels):
    torch.manual_seed(seed)
    images, view = torch.rand(4, channels, 20, 24), Photometric()
    params = view.draw(images)
    once, again = view.apply(images, params), view.apply(images, params)
    assert torch.equal(once, again) and once.shape == images.shape
    assert once.min() >= 0 and once.max() <= 1


def test_a_uniform_picture_shows_that_no_pixel_moves():
    """Where nothing is erased, each pixel's new colour depends on its own colour alone (blur off)."""
    torch.manual_seed(0)
    view = Photometric(jitter_probability=1.0, grey=0.5, blur=0.0, erasing=())
    images = torch.rand(2, 3, 4, 4)
    params = view.draw(images)
    order = torch.randperm(16)
    moved = images.flatten(2)[..., order].view_as(images)
    expected = view.apply(images, params).flatten(2)[..., order].view_as(images)
    torch.testing.assert_close(view.apply(moved, params), expected)


def test_erased_rectangles_have_the_papers_shares_of_the_picture():
    torch.manual_seed(0)
    images = torch.zeros(200, 1, 60, 80)
    params = Photometric(erasing=(1.0, 0.0, 1.0)).draw(images)
    top, left, bottom, right = params["erased"].unbind(-1)
    area = (bottom - top) * (right - left)
    assert (area[:, 0] >= 0.049).all() and (area[:, 0] <= 0.201).all()
    assert not area[:, 1].any()
    assert (area[:, 2] <= 0.201).all() and (top >= 0).all() and (right <= 1 + 1e-5).all()


def test_erased_pixels_are_noise_and_the_others_stay():
    torch.manual_seed(0)
    images, view = torch.full((1, 3, 20, 20), 0.5), Photometric(**{**NOTHING, "erasing": (1.0,)})
    changed = (view(images) != 0.5).any(1).float().mean()
    assert 0.03 < changed < 0.25


def test_each_operation_happens_as_often_as_asked():
    torch.manual_seed(0)
    params = Photometric().draw(torch.zeros(2000, 1, 8, 8))
    shares = {
        "jitter": (params["factors"] != 1).any(1),
        "grey": params["grey"],
        "blur": params["sigma"] > 0,
        "erased": params["erased"][:, 2].any(1),
    }
    for name, share in {"jitter": 0.8, "grey": 0.2, "blur": 0.5, "erased": 0.3}.items():
        assert shares[name].float().mean().item() == pytest.approx(share, abs=0.04)
    assert params["factors"].min() >= 0.6 and params["factors"].max() <= 1.4
    assert params["hue"].abs().max() <= 0.2 * torch.pi + 1e-6


@pytest.mark.parametrize(
    "setting", [{"jitter": (0.4,)}, {"hue": 0.9}, {"blur": 2.0}, {"sigma": (2.0, 1.0)}, {"erasing": (0.1,) * 4}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        Photometric(**setting)

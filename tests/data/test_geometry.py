"""Boxes follow the pixels that they stand on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data import Affine, between, warp_boxes
from limbeck.errors import UserError

EXACT = {"flip": 0.5, "scale": (0.8, 1.25), "translate": 0.1}


def random_boxes(rows: int) -> torch.Tensor:
    corner = torch.rand(rows, 3, 2) * 15 + 12
    return torch.cat([corner, corner + torch.rand(rows, 3, 2) * 8 + 2], -1)


def test_by_default_only_flips_happen_and_they_are_exact():
    torch.manual_seed(0)
    images, view = torch.rand(8, 3, 12, 20), Affine()
    params = view.draw(images)
    flipped = params["matrix"][:, 0, 0] < 0
    expected = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
    torch.testing.assert_close(view.apply(images, params), expected, atol=1e-4, rtol=1e-4)
    assert flipped.any() and not flipped.all()
    boxes = torch.tensor([[2.0, 3, 8, 9]]).expand(8, 1, 4)
    moved = view.apply_boxes(boxes, params, 12, 20)
    assert moved[flipped][0].tolist() == [[12, 3, 18, 9]] and moved[~flipped][0].tolist() == [[2, 3, 8, 9]]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_moved_box_is_around_the_moved_pixels(seed):
    torch.manual_seed(seed)
    view = Affine(flip=0.5, scale=(0.8, 1.25), translate=0.1, rotate=30, shear=10, fill=0.0)
    images = torch.zeros(4, 1, 48, 64)
    images[:, :, 20:30, 24:40] = 1
    params = view.draw(images)
    shown = view.apply(images, params)[:, 0] > 0.5
    x1, y1, x2, y2 = view.apply_boxes(torch.tensor([[24.0, 20, 40, 30]]).expand(4, 1, 4), params, 48, 64)[:, 0].unbind(
        -1
    )
    for b in range(4):
        rows, columns = shown[b].any(1).nonzero(), shown[b].any(0).nonzero()
        ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        box = torch.stack([x1[b], y1[b], x2[b], y2[b]])
        # corners of a turned rectangle cover too little of their pixels to show, so the hull may be a bit larger
        assert (box - torch.stack(ends).float()).abs().max() < 2.5


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_from_weak_to_strong_and_back_returns_the_boxes_and_a_turn_returns_their_hull(seed):
    torch.manual_seed(seed)
    images, boxes = torch.zeros(3, 1, 200, 200), random_boxes(3) + 60
    weak, strong = (Affine(**EXACT).draw(images)["matrix"] for _ in range(2))
    there = warp_boxes(boxes, between(weak, strong), 200, 200)
    torch.testing.assert_close(warp_boxes(there, between(strong, weak), 200, 200), boxes, atol=1e-3, rtol=1e-4)
    turned = Affine(rotate=30).draw(images)["matrix"]
    hull = warp_boxes(warp_boxes(boxes, between(weak, turned), 200, 200), between(turned, weak), 200, 200)
    area = [(b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (hull, boxes)]
    assert (area[0] >= area[1] * (1 - 1e-4)).all()


def test_a_box_that_leaves_the_picture_has_no_area():
    away = torch.tensor([[1.0, 0, 100], [0, 1, 0], [0, 0, 1]])[None]
    moved = warp_boxes(torch.tensor([[[2.0, 2, 8, 8]]]), away, 20, 20)
    assert moved[0, 0, 0] == moved[0, 0, 2]


def test_what_comes_in_from_outside_has_the_fill_colour():
    view = Affine(flip=0.0, scale=(0.5, 0.5), fill=0.25)
    shown = view(torch.ones(1, 1, 16, 16))
    torch.testing.assert_close(shown[0, 0, 0], torch.full((16,), 0.25))
    assert shown[0, 0, 8, 8] == pytest.approx(1.0)


@pytest.mark.parametrize("setting", [{"flip": 2.0}, {"scale": (2.0, 1.0)}, {"shear": 90.0}, {"translate": -0.1}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        Affine(**setting)

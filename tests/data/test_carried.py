"""Masks and boxes go where the pixels go."""

from __future__ import annotations

import pytest
import torch

from limbeck import Samples, Stream, UserError
from limbeck.data import Identity, On, Strong, Weak, make_view


class Dim:
    """Half the brightness: a view that leaves every pixel in its place."""

    keeps_place = True

    def draw(self, images):
        return {}

    def apply(self, images, params):
        return images / 2

    def __call__(self, images):
        return self.apply(images, {})


def samples(count: int = 6) -> Samples:
    """Pictures whose mask says which pixels are lit, with a box around the one lit rectangle."""
    image = torch.zeros(count, 1, 16, 20, dtype=torch.uint8)
    boxes = torch.zeros(count, 2, 4)
    for row in range(count):
        x, y = 5 + row % 3, 4 + row % 2
        image[row, 0, y : y + 4, x : x + 6] = 255
        boxes[row, 0] = torch.tensor([x, y, x + 6, y + 4])
    labels = torch.tensor([[2, -1]]).repeat(count, 1)
    return Samples({"image": image, "mask": (image[:, 0] > 0).to(torch.uint8), "boxes": boxes, "box_labels": labels})


def rendered(views) -> dict:
    stream = Stream(samples(), 6, views)
    stream.open("labelled", seed=0)
    torch.manual_seed(3)
    return stream.render(stream.next())


def test_a_mask_covers_the_same_pixels_after_the_view():
    batch = rendered({"weak": Weak(padding=2)})
    assert not torch.equal(batch["weak"], batch["image"]), "the view moved something"
    assert torch.equal(batch["weak_mask"].bool(), batch["weak"][:, 0] > 0)


def test_a_box_encloses_the_same_pixels_after_the_view():
    batch = rendered({"weak": Weak(padding=2)})
    for lit, box in zip(batch["weak"][:, 0] > 0, batch["weak_boxes"][:, 0], strict=True):
        rows, columns = lit.nonzero().unbind(1)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_padding_boxes_stay_padding():
    assert (rendered({"weak": Weak(padding=2)})["weak_box_labels"] == torch.tensor([2, -1])).all()


def test_a_box_that_is_shifted_out_of_the_picture_loses_its_label():
    view = Weak(padding=8, flip=False)
    boxes = view.apply_boxes(
        torch.tensor([[[0.0, 0, 3, 3]]]), {"shift": torch.tensor([[0, 5]]), "flip": torch.zeros(1) > 0}, 16, 20
    )
    assert boxes[0, 0, 2] - boxes[0, 0, 0] == 0
    stream = Stream(samples(), 6, {"weak": _Away()})
    stream.open("labelled", seed=0)
    assert (stream.render(stream.next())["weak_box_labels"] == -1).all()


class _Away(Weak):
    def apply_boxes(self, boxes, params, height, width):
        return torch.zeros_like(boxes)


def test_a_view_on_another_shares_its_geometry():
    batch = rendered({"weak": Weak(padding=2), "strong": On("weak", Dim())})
    torch.testing.assert_close(batch["strong"], batch["weak"] / 2)
    assert torch.equal(batch["strong_mask"], batch["weak_mask"])
    assert torch.equal(batch["strong_boxes"], batch["weak_boxes"])


def test_geometry_on_top_of_geometry_moves_masks_twice():
    batch = rendered({"weak": Weak(padding=2), "again": make_view("weak", of="weak", padding=3)})
    assert torch.equal(batch["again_mask"].bool(), batch["again"][:, 0] > 0)


def test_a_view_that_cannot_carry_masks_is_refused_at_once():
    with pytest.raises(UserError, match="strong.*cannot move the samples' mask"):
        Stream(samples(), 2, {"strong": Strong()})


def test_a_view_on_a_missing_one_is_refused_at_once():
    with pytest.raises(UserError, match="lies on the view 'weak'"):
        Stream(samples(), 2, {"strong": On("weak", Identity())})

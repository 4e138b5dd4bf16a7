"""Facts about pictures on canvases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.data import MultiCrop, Samples, on_canvas, shown_share
from limbeck.errors import UserError


def pictures(n: int = 30, seed: int = 0) -> Samples:
    """Pictures 2x6x5 whose pixels are all above 0."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(1, 256, (n, 2, 6, 5), generator=generator, dtype=torch.uint8)
    return Samples({"image": image, "label": torch.arange(n) % 3})


def test_the_picture_lies_in_its_box_and_nothing_beside_it() -> None:
    plain, placed = pictures(), on_canvas(pictures(), 16, seed=0)
    canvas, boxes = placed.fields["image"], placed.fields["hidden_box"] * 16
    assert canvas.dtype == torch.uint8 and canvas.shape == (30, 2, 16, 16)
    for image, full, (left, top, right, bottom) in zip(
        plain.fields["image"], canvas, boxes.int().tolist(), strict=True
    ):
        assert torch.equal(full[:, top:bottom, left:right], image)
        assert full.sum() == image.sum()


def test_places_differ_and_reach_every_border() -> None:
    boxes = on_canvas(pictures(3000), 10, seed=0).fields["hidden_box"] * 10
    assert boxes[:, 0].unique().tolist() == [0, 1, 2, 3, 4, 5] and boxes[:, 1].unique().tolist() == [0, 1, 2, 3, 4]
    assert boxes[:, 2].max() == 10 and boxes[:, 3].max() == 10


def test_a_place_depends_on_the_seed_and_the_samples_number_alone() -> None:
    some = torch.tensor([3, 17, 4])
    whole, part = on_canvas(pictures(), 16, seed=5), on_canvas(pictures().select(some), 16, seed=5)
    assert torch.equal(whole.fields["image"][some], part.fields["image"])
    assert not torch.equal(whole.fields["image"], on_canvas(pictures(), 16, seed=6).fields["image"])


def test_the_box_bounds_what_is_not_empty() -> None:
    image = torch.zeros(2, 1, 4, 4)
    image[0, 0, 1, 2] = 0.5
    boxes = on_canvas(Samples({"image": image}), 4, seed=0).fields["hidden_box"]
    assert boxes.tolist() == [[0.5, 0.25, 0.75, 0.5], [0, 0, 0, 0]]


def test_shown_share_is_0_for_crops_that_show_nothing_and_1_for_whole_objects() -> None:
    box = torch.tensor([0.25, 0.25, 0.75, 0.5])
    crops = torch.tensor([[0, 0, 1, 1], [0, 0, 0.5, 1], [0.25, 0.375, 0.5, 1], [0.75, 0, 1, 1], [0, 0.6, 1, 1.0]])
    torch.testing.assert_close(shown_share(crops, box), torch.tensor([1, 0.5, 0.25, 0, 0]))


def test_a_crop_that_shows_nothing_of_the_box_is_empty() -> None:
    torch.manual_seed(0)
    placed = on_canvas(pictures(200), 32, seed=0)
    view = MultiCrop(4, 8, (0.05, 0.2), flip=False)
    params = view.draw(placed.fields["image"].float())
    crop = view.apply(placed.fields["image"].float(), params)
    shown: Tensor = shown_share(params["box"], placed.fields["hidden_box"][:, None])
    # bilinear sampling looks half a pixel beyond the crop's edge
    near = params["box"] + torch.tensor([-1, -1, 1, 1]) / 32
    empty = shown_share(near, placed.fields["hidden_box"][:, None]) == 0
    assert 0.2 < empty.float().mean() < 0.9 and (shown[empty] == 0).all()
    assert not crop.flatten(2).amax(2)[empty].any()


def test_a_canvas_smaller_than_the_pictures_is_refused() -> None:
    with pytest.raises(UserError, match="canvas is 5 and the images are 6x5"):
        on_canvas(pictures(), 5, seed=0)

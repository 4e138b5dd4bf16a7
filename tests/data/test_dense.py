"""Pictures with masks: mixing by one mask, the view that carries masks, and what is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from limbeck.data import (
    CropFlip,
    Samples,
    Stream,
    box_mix,
    class_mask,
    classes_in,
    load_segmentation,
    make_view,
    paste,
    random_boxes,
)
from limbeck.errors import UserError

DATA = Path(os.environ.get("LIMBECK_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_camvid = pytest.mark.skipif(not (DATA / "camvid").is_dir(), reason="LIMBECK_DATA holds no camvid")

B, H, W = 6, 12, 16


def picture_of(mask: Tensor) -> Tensor:
    """A picture whose first channel says the class at each pixel, so that torn pixels show."""
    return (mask.float() / 255)[:, None].expand(-1, 3, -1, -1)


# ---------------------------------------------------------------- mixing


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), area=st.sampled_from([0.25, 0.5, 0.8]), sides=st.sampled_from(["uniform", "log"]))
def test_a_box_is_one_rectangle_of_about_its_area(seed, area, sides):
    torch.manual_seed(seed)
    inside = random_boxes(8, (40, 60), area=(area, area), sides=sides)
    for one in inside:
        rows, columns = one.any(1).nonzero().flatten(), one.any(0).nonzero().flatten()
        assert one.sum() == len(rows) * len(columns)
        assert rows[-1] - rows[0] + 1 == len(rows) and columns[-1] - columns[0] + 1 == len(columns)
        assert abs(one.float().mean() - area) < 0.03


def test_overlapping_boxes_toggle():
    torch.manual_seed(0)
    inside = random_boxes(200, (20, 20), area=(0.5, 0.5), count=2)
    # two boxes of half the picture: covered by one of them exactly
    assert 0.2 < inside.float().mean() < 0.6 and (inside.float().mean((1, 2)) < 0.95).all()


@pytest.mark.parametrize("area", [(0.0, 0.5), (0.6, 0.5), (0.5, 1.5)])
def test_a_box_without_area_is_refused(area):
    with pytest.raises(UserError, match="area"):
        random_boxes(2, (8, 8), area=area)


def test_cutmix_takes_picture_and_mask_of_each_pixel_from_the_same_sample():
    mask = torch.arange(B)[:, None, None].expand(B, H, W).contiguous()
    mix = box_mix(B, (H, W))
    mixed = mix.pixels(mask)
    torch.testing.assert_close(mix.pixels(picture_of(mask)), picture_of(mixed))
    own = mixed == mask
    assert torch.equal(own, mix.mask) and torch.equal(mixed[~own], ((mask + 1) % B)[~own])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_classmix_draws_half_of_the_classes_of_each_sample_rounded_up(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(2 + seed % 5, (B, H, W), generator=generator)
    mask[0, :3] = 255
    drawn = class_mask(mask)
    for one, chosen in zip(mask, drawn, strict=True):
        present = one.unique()
        taken = one[chosen].unique()
        assert len(taken) == -(-len(present) // 2)
        assert torch.equal(chosen, torch.isin(one, taken))


def test_classmix_of_the_batch_draws_from_the_classes_of_all_samples():
    mask = torch.tensor([0, 1, 2, 3])[:, None, None].expand(4, H, W)
    torch.manual_seed(0)
    whole = torch.stack([class_mask(mask, of="batch")[:, 0, 0] for _ in range(200)]).float().mean(0)
    assert class_mask(mask).all()  # of its one class a sample gives that one
    assert ((whole > 0.35) & (whole < 0.65)).all()  # of the batch's four classes two are drawn


def test_paste_moves_pictures_masks_and_weights_alike():
    front, back = torch.randint(5, (B, H, W)), torch.randint(5, (B, H, W))
    where = classes_in(front, [1, 3])
    pasted = paste(where, front, back)
    torch.testing.assert_close(paste(where, picture_of(front), picture_of(back)), picture_of(pasted))
    assert torch.equal(pasted[~where], back[~where]) and set(pasted[where].tolist()) <= {1, 3}


# ---------------------------------------------------------------- the view


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_masks_go_where_the_pixels_go_and_the_outside_is_ignored(seed):
    torch.manual_seed(seed)
    mask = torch.randint(0, 4, (B, 2, 3), dtype=torch.uint8).repeat_interleave(16, 1).repeat_interleave(16, 2)
    view = CropFlip(scale=(0.7, 2.0), fill=1.0)
    images = picture_of(mask)
    params = view.draw(images)
    moved, seen = view.apply_mask(mask, params), view.apply(images, params)[:, 0]
    assert moved.dtype == torch.uint8 and set(moved.unique().tolist()) <= {0, 1, 2, 3, 255}
    # the bilinear picture agrees wherever all pixels near have one class (or are all outside: white)
    classes = moved.float()[:, None]
    highest, lowest = (sign * torch.nn.functional.max_pool2d(sign * classes, 7, 1) for sign in (1, -1))
    flat, inner = (highest == lowest)[:, 0], (slice(None), slice(3, -3), slice(3, -3))
    assert flat.any() and ((seen * 255 - moved)[inner].abs() < 1e-3)[flat].all()


def test_scale_one_without_flip_is_the_identity():
    view = CropFlip(scale=(1.0, 1.0), flip=False)
    images, mask = torch.rand(B, 3, H, W), torch.randint(0, 9, (B, H, W))
    params = view.draw(images)
    torch.testing.assert_close(view.apply(images, params), images, atol=1e-5, rtol=0)
    assert torch.equal(view.apply_mask(mask, params), mask)


def test_a_smaller_picture_lies_whole_within_the_window():
    view = CropFlip(scale=(0.5, 0.5))
    mask = torch.ones(B, H, W, dtype=torch.long)
    params = view.draw(mask[:, None].float())
    moved = view.apply_mask(mask, params)
    assert ((moved == 1).sum((1, 2)) == H * W // 4).float().mean() > 0.4  # exact but where half pixels round
    assert (moved == 255).any((1, 2)).all()


def test_a_window_of_another_size_and_boxes_that_follow():
    view = CropFlip(scale=(1.0, 1.0), size=(8, 10))
    assert view(torch.rand(B, 3, H, W)).shape == (B, 3, 8, 10)
    whole = CropFlip(scale=(0.7, 1.6))
    mask = torch.zeros(B, 48, 64, dtype=torch.long)
    mask[:, 12:30, 20:44] = 1
    boxes = torch.tensor([20.0, 12.0, 44.0, 30.0]).expand(B, 1, 4)
    params = whole.draw(mask[:, None].float())
    moved = whole.apply_boxes(boxes, params, 48, 64)[:, 0]
    for box, one in zip(moved, whole.apply_mask(mask, params), strict=True):
        rows, columns = (one == 1).any(1).nonzero().flatten(), (one == 1).any(0).nonzero().flatten()
        seen = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
        assert (box - seen).abs().max() <= 1.01


def test_a_stream_carries_masks_and_hidden_masks_with_the_view():
    mask = torch.randint(0, 4, (B, H, W), dtype=torch.uint8)
    images = (picture_of(mask) * 255).round().to(torch.uint8)
    samples = Samples({"image": images, "mask": mask, "hidden_mask": mask}, ["a", "b", "c", "d"])
    stream = Stream(samples, B, {"weak": make_view("crop_flip", scale=[1.0, 1.0])})
    stream.open("labelled", seed=0)
    batch = stream.render(stream.next())
    torch.testing.assert_close(batch["weak"][:, 0] * 255, batch["weak_mask"].float(), atol=0.01, rtol=0)
    assert torch.equal(batch["weak_mask"], batch["weak_hidden_mask"])
    assert stream.moved_fields == ["weak_mask", "weak_hidden_mask"]


@pytest.mark.parametrize("settings", [{"scale": (0.0, 1.0)}, {"scale": (2.0, 1.0)}, {"fill": 2.0}])
def test_a_view_that_cannot_be_is_refused(settings):
    with pytest.raises(UserError, match="scale"):
        CropFlip(**settings)


# ---------------------------------------------------------------- loading


def fields(n: int = 16, classes: int = 3) -> dict:
    torch.manual_seed(0)
    mask = torch.randint(0, classes, (n, H, W), dtype=torch.uint8)
    names = [f"{'day' if k % 2 else 'dusk'}_{k}" for k in range(n)]
    return {"image": torch.randint(0, 256, (n, 3, H, W), dtype=torch.uint8), "mask": mask, "name": names}


def test_labelled_and_unlabelled_samples_share_no_index_and_masks_are_hidden_only_on_request():
    data = load_segmentation({"train": fields(), "test": fields(4)}, labels=3, seed=1)
    assert data.unlabelled is not None and len(data.train) == 3 and len(data.unlabelled) == 13
    assert not set(data.train.index.tolist()) & set(data.unlabelled.index.tolist())
    assert "mask" not in data.unlabelled.fields and "hidden_mask" not in data.unlabelled.fields
    kept = load_segmentation({"train": fields(), "test": fields(4)}, labelled_fraction=0.25, hidden_masks=True, seed=1)
    assert kept.unlabelled is not None and len(kept.train) == 4
    truth = fields()["mask"][kept.unlabelled.index]
    assert torch.equal(kept.unlabelled.fields["hidden_mask"], truth)


def test_labels_can_stay_among_the_unlabelled_and_validation_comes_from_the_train_split():
    data = load_segmentation(
        {"train": fields(), "test": fields(4)}, labels=3, keep_labelled_in_unlabelled=True, validation_fraction=0.25
    )
    assert data.validation is not None and data.unlabelled is not None
    assert (len(data.validation), len(data.unlabelled)) == (4, 12)


def test_the_ignored_value_becomes_255_and_classes_are_counted_without_it():
    given = fields(classes=4)
    data = load_segmentation({"train": given, "test": fields(4)}, ignore_index=3)
    assert data.num_classes == 3
    assert torch.equal(data.train.fields["mask"] == 255, given["mask"] == 3)


def test_names_divide_a_set_into_two_domains():
    data = load_segmentation(
        {"train": fields(), "test": fields(4)}, labelled_names="day", unlabelled_names="dusk", test_names="dusk"
    )
    assert data.unlabelled is not None
    assert all(name.startswith("day") for name in data.train.fields["name"])
    assert all(name.startswith("dusk") for name in data.unlabelled.fields["name"] + data.test.fields["name"])
    day_only = {**fields(2), "name": ["day_a", "day_b"]}
    held_out = load_segmentation(
        {"train": fields(), "test": day_only}, labelled_names="day", unlabelled_names="dusk", test_names="dusk"
    )
    assert held_out.unlabelled is not None and (len(held_out.test), len(held_out.unlabelled)) == (2, 6)
    assert not set(held_out.test.index.tolist()) & set(held_out.unlabelled.index.tolist())


def test_a_value_that_is_no_class_is_named_with_its_row():
    bad = fields()
    bad["mask"][5, 0, 0] = 9
    with pytest.raises(UserError, match=r"row 5 of train holds the value 9, expected 0\.\.2 .*ignore_index=9"):
        load_segmentation({"train": bad, "test": fields(4)}, classes=3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": 3, "labelled_fraction": 0.5}, "either labels or labelled_fraction"),
        ({"labels": 16}, "16 labelled samples"),
        ({"labelled_fraction": 1.5}, "labelled_fraction is 1.5"),
        ({"labelled_names": "night"}, "matches no name"),
    ],
)
def test_settings_that_contradict_the_data_are_one_sentence(change, said):
    with pytest.raises(UserError, match=said):
        load_segmentation({"train": fields(), "test": fields(4)}, **change)


def test_masks_of_another_size_and_missing_masks_are_refused():
    small = {**fields(), "mask": fields()["mask"][:, ::2]}
    with pytest.raises(UserError, match=r"masks of train are \[6, 16\] and its pictures \[12, 16\]"):
        load_segmentation({"train": small, "test": fields(4)})
    with pytest.raises(UserError, match="no field 'mask'"):
        load_segmentation({"train": fields(), "test": {"image": fields(4)["image"]}})


def test_a_folder_of_pictures_and_masks_is_paired_by_name(tmp_path):
    given = fields(6)
    for split, rows in (("train", range(4)), ("val", range(4, 6))):
        for part in ("images", "masks"):
            (tmp_path / split / part).mkdir(parents=True)
        for row in rows:
            picture = given["image"][row].permute(1, 2, 0).numpy()
            Image.fromarray(picture).save(tmp_path / split / "images" / f"{row}.png")
            Image.fromarray(given["mask"][row].numpy()).save(tmp_path / split / "masks" / f"{row}.png")
    data = load_segmentation(tmp_path, progress=False)
    assert data.name == tmp_path.name and data.train.fields["name"] == ["0", "1", "2", "3"]
    assert torch.equal(data.train.fields["mask"], given["mask"][:4])
    assert torch.equal(data.test.fields["image"], given["image"][4:])
    smaller = load_segmentation(tmp_path, image_size=(6, 8), progress=False)
    assert smaller.train.fields["mask"].shape == (4, 6, 8)
    (tmp_path / "train" / "masks" / "2.png").unlink()
    with pytest.raises(UserError, match="no mask for .*2.png"):
        load_segmentation(tmp_path, progress=False)


@needs_camvid
def test_camvid_has_eleven_classes_and_its_void_is_ignored():
    data = load_segmentation("camvid", image_size=(30, 40), classes=11, ignore_index=11, labels=46, progress=False)
    assert data.unlabelled is not None
    assert (len(data.train), len(data.unlabelled), len(data.test)) == (46, 321, 101)
    values = np.unique(data.test.fields["mask"].numpy()).tolist()
    assert set(values) <= {*range(11), 255} and 255 in values

"""Pictures with boxes, from every layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.data import Samples, Stream, corrupt, data_folder, load_detection, make_view, pad_boxes
from limbeck.errors import UserError


def write_picture(path: Path, width: int = 40, height: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 128, np.uint8)).save(path)


def coco(folder: Path, boxes=((4, 2, 20, 10),), split: str = "train", **entry) -> Path:
    """One COCO split: picture 7 with these boxes (x, y, w, h) of category 3, and picture 9 with none."""
    for name in ("a.png", "b.png"):
        write_picture(folder / split / name)
    content = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}],
        "categories": [{"id": 3, "name": "cell"}, {"id": 1, "name": "dot"}],
        "annotations": [
            {"id": i, "image_id": 7, "category_id": 3, "bbox": list(b), **entry} for i, b in enumerate(boxes)
        ],
    }
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def voc(folder: Path, objects: str = "") -> Path:
    write_picture(folder / "JPEGImages" / "one.png")
    write_picture(folder / "JPEGImages" / "two.png")
    (folder / "Annotations").mkdir()
    cell = (
        "<object><name>{}</name><difficult>{}</difficult><bndbox>"
        "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
    )
    written = objects or cell.format("dog", 0, 1, 1, 40, 20) + cell.format("cat", 1, 2, 2, 4, 4)
    (folder / "Annotations" / "one.xml").write_text(f"<annotation><filename>one.png</filename>{written}</annotation>")
    (folder / "Annotations" / "two.xml").write_text("<annotation><filename>two.png</filename></annotation>")
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("one\n")
    (lists / "val.txt").write_text("two\n")
    return folder


def test_coco_boxes_are_scaled_with_their_pictures_and_empty_pictures_stay(tmp_path):
    coco(coco(tmp_path), split="val")
    data = load_detection(tmp_path, image_size=(10, 10), progress=False)
    assert data.classes == ["dot", "cell"] and data.train.fields["image"].shape == (2, 3, 10, 10)
    assert data.train.fields["boxes"][0, 0].tolist() == [1, 1, 6, 6]  # 40x20 to 10x10
    assert data.train.fields["box_labels"].tolist() == [[1], [-1]]
    assert len(data.test) == 2  # the validation split


def test_crowds_are_left_out(tmp_path):
    coco(coco(tmp_path, iscrowd=1), split="val")
    assert (load_detection(tmp_path, progress=False).train.fields["box_labels"] == -1).all()


def test_voc_counts_pixels_from_one_and_includes_the_last(tmp_path):
    data = load_detection(voc(tmp_path), progress=False)
    assert data.train.fields["boxes"].tolist() == [[[0, 0, 40, 20]]]
    assert data.classes == ["dog"] and data.test.fields["box_labels"].tolist() == [[-1]]


def test_difficult_objects_are_kept_where_they_are_asked_for(tmp_path):
    data = load_detection(voc(tmp_path), keep_difficult=True, progress=False)
    assert data.classes == ["cat", "dog"] and data.train.fields["box_labels"].tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((30, 2, 20, 10), r"box \(30, 2, 50, 12\) in row 0 of train does not lie within the picture of 40x20"),
        ((4, 2, 0, 10), "in row 0 of train has no area"),
        ((4, 2, -3, 10), "has no area"),
        ((60, 2, 5, 5), "does not lie within"),
    ],
)
def test_a_bad_box_is_refused_with_its_row_or_mended(tmp_path, box, words):
    folder = coco(coco(tmp_path, boxes=[(4, 2, 20, 10), box]), split="val")
    with pytest.raises(UserError, match=words):
        load_detection(folder, progress=False)
    mended = load_detection(folder, bad_boxes="mend", progress=False).train
    real = mended.fields["boxes"][0][mended.fields["box_labels"][0] >= 0]
    assert real[0].tolist() == [4, 2, 24, 12] and len(real) == (2 if box[0] == 30 else 1)
    assert (real[:, 2] <= 40).all() and (real[:, 2] > real[:, 0]).all()


def test_a_rounding_error_of_a_pixel_is_clipped_without_a_word(tmp_path):
    folder = coco(coco(tmp_path, boxes=[(-0.5, 2, 41, 10)]), split="val")
    assert load_detection(folder, progress=False).train.fields["boxes"][0, 0].tolist() == [0, 2, 40, 12]


@pytest.mark.parametrize("text", ["{", "{}", '{"categories": [], "images": [], "annotations": [{"image_id": 1}]}'])
def test_a_json_of_another_form_is_named(tmp_path, text):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(UserError, match="train.json is no COCO annotation file"):
        load_detection(tmp_path, progress=False)


def test_a_broken_xml_and_a_missing_picture_are_named(tmp_path):
    folder = voc(tmp_path)
    (folder / "Annotations" / "one.xml").write_text("<annotation>")
    with pytest.raises(UserError, match="one.xml is no VOC annotation"):
        load_detection(folder, progress=False)
    (folder / "Annotations" / "one.xml").write_text("<annotation/>")
    (folder / "JPEGImages" / "one.png").unlink()
    with pytest.raises(UserError, match="is not in .*JPEGImages"):
        load_detection(folder, progress=False)


def in_memory(count: int = 10) -> dict[str, Samples]:
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
    boxes = [torch.tensor([[2.0, 2, 9, 9]])] * count
    fields = {"image": images, **pad_boxes(boxes, [torch.tensor([1])] * count)}
    return {"train": Samples(fields, ["a", "b"]), "test": Samples(fields, ["a", "b"])}


def test_samples_from_memory_are_checked_too():
    given = in_memory()
    outside = {"boxes": given["train"].fields["boxes"] + torch.tensor([0.0, 0, 30, 0])}
    with pytest.raises(UserError, match="row 0 of train does not lie"):
        load_detection({**given, "train": given["train"].with_fields(outside)})
    with pytest.raises(UserError, match="no field 'boxes'"):
        load_detection({**given, "train": given["train"].without("boxes")})
    with pytest.raises(UserError, match="box label 5"):
        load_detection({**given, "train": given["train"].with_fields({"box_labels": torch.full((10, 1), 5)})})


def test_the_target_domain_is_the_same_for_every_seed_and_has_no_boxes():
    first, second = (load_detection(in_memory(), target_fraction=0.3, seed=seed) for seed in (0, 1))
    assert torch.equal(first.unlabelled.index, second.unlabelled.index)
    assert first.unlabelled.index.tolist() == [7, 8, 9] and len(first.train) == 7
    kept = load_detection(in_memory(), target_fraction=0.3, hidden_boxes=True).unlabelled
    assert kept.fields["boxes"].shape == (3, 1, 4)
    assert "boxes" not in first.unlabelled.fields and first.unlabelled.classes == ["a", "b"]


def test_few_labels_are_drawn_by_the_seed():
    drawn = [load_detection(in_memory(), labelled_fraction=0.5, seed=seed).train.index.tolist() for seed in range(5)]
    assert all(len(rows) == 5 for rows in drawn) and len({tuple(rows) for rows in drawn}) > 1
    with pytest.raises(UserError, match="give one of them"):
        load_detection(in_memory(), labelled_fraction=0.5, target_fraction=0.5)
    with pytest.raises(UserError, match="labelled_fraction is 2"):
        load_detection(in_memory(), labelled_fraction=2.0)


@pytest.mark.parametrize("kind", ["fog", "dark", "noise"])
def test_a_corruption_depends_on_the_sample_alone_and_grows_with_severity(kind):
    images, index = in_memory()["train"].fields["image"], torch.arange(10)
    changed = corrupt(images, index, kind)
    assert changed.dtype == torch.uint8 and not torch.equal(changed, images)
    shuffled = torch.randperm(10)
    assert torch.equal(corrupt(images[shuffled], index[shuffled], kind), changed[shuffled])
    assert torch.equal(corrupt(images, index, kind, 0.0), images) or kind == "dark"
    distance = [(corrupt(images, index, kind, s).float() - images.float()).abs().mean() for s in (0.3, 1.0)]
    assert distance[0] < distance[1]


def test_only_the_named_splits_are_corrupted():
    given = in_memory()
    data = load_detection(given, target_fraction=0.3, corruption="fog")
    assert torch.equal(data.train.fields["image"], given["train"].fields["image"][:7])
    assert not torch.equal(data.test.fields["image"], given["test"].fields["image"])
    assert not torch.equal(data.unlabelled.fields["image"], given["train"].fields["image"][7:])
    with pytest.raises(UserError, match="no corruption 'rain'"):
        corrupt(given["train"].fields["image"], torch.arange(10), "rain")


def test_a_stream_gives_boxes_beside_each_view():
    data = load_detection(in_memory())
    stream = Stream(
        data.train, 4, {"weak": make_view("affine", flip=1.0), "strong": make_view("photometric", of="weak")}
    )
    stream.open("labelled", seed=0)
    batch = stream.render(stream.next())
    assert batch["weak_boxes"].tolist() == [[[7, 2, 14, 9]]] * 4
    assert torch.equal(batch["strong_boxes"], batch["weak_boxes"])
    assert batch["weak_box_labels"].tolist() == [[1]] * 4


@pytest.mark.skipif(not (data_folder() / "bccd").is_dir(), reason="needs the data set bccd in LIMBECK_DATA")
def test_blood_cells_have_their_names_and_their_boxes_lie_on_them():
    data = load_detection("bccd", image_size=(120, 160), limit={"train": 4, "test": 4}, progress=False)
    assert data.classes == ["WBC", "RBC", "Platelets"]
    boxes, labels = data.test.fields["boxes"], data.test.fields["box_labels"]
    image = data.test.fields["image"].float()
    for row in range(4):  # a white cell's kernel is darker in red than the picture
        for x1, y1, x2, y2 in boxes[row][labels[row] == 0].int().tolist():
            assert image[row, 0, y1:y2, x1:x2].mean() < image[row, 0].mean()

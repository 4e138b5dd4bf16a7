"""The task segmentation: recipes run from pictures with masks to a report, and refuse what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from limbeck.errors import UserError
from limbeck.models import MiniDeepLab, load_segmenter
from limbeck.recipes.run import run
from limbeck.recipes.tasks import find_task


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 pictures of a bright square on a dark ground, and 6 for the test, as folders of files."""
    folder = tmp_path_factory.mktemp("squares")
    torch.manual_seed(0)
    for split, count in (("train", 24), ("test", 6)):
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True)
        for number in range(count):
            mask = torch.zeros(16, 24, dtype=torch.uint8)
            top, left = torch.randint(8, (2,)).tolist()
            mask[top : top + 8, left : left + 8] = 1
            picture = (mask[..., None] * 150 + torch.randint(0, 60, (16, 24, 3))).to(torch.uint8)
            mask[0] = 7
            Image.fromarray(picture.numpy()).save(folder / split / "images" / f"{number}.png")
            Image.fromarray(mask.numpy()).save(folder / split / "masks" / f"{number}.png")
    return folder


def recipe(pictures: Path, **changes) -> dict:
    view = {"weak": {"name": "crop_flip", "scale": [1.0, 1.2]}}
    return {
        "method": {"name": "fst", "ahead_steps": 1, "follow_epochs": 0},
        "data": {
            "name_or_path": str(pictures),
            "classes": ["ground", "square"],
            "ignore_index": 7,
            "labels": 6,
            "hidden_masks": True,
            "validation_fraction": 0.2,
        },
        "student": {"name": "mini_deeplab", "config": {"channels": [4, 8, 8]}},
        "streams": {
            "labelled": {"batch_size": 4, "cycle": True, "views": view},
            "unlabelled": {"batch_size": 4, "views": view},
        },
        "trainer": {"steps": 30, "optimizer": {"name": "sgd", "lr": 0.05}, "accelerator": "cpu"},
        "seed": 0,
        **changes,
    }


def test_a_recipe_runs_to_metrics_a_report_with_masks_and_a_folder_that_loads(pictures, tmp_path):
    result = run(recipe(pictures), workspace=tmp_path / "run")
    assert result.metrics["miou"] > 0.6 and result.metrics["pixel_accuracy"] > 0.8
    assert {"iou.ground", "iou.square", "parameters", "latency_ms", "flops"} <= result.metrics.keys()
    assert "pseudo_accuracy" in result.logged and result.data.validation is not None
    report = (tmp_path / "run" / "report.html").read_text()
    assert "true masks" in report and "Mean IoU" in report
    shipped = load_segmenter(tmp_path / "run" / "student").eval()
    picture = torch.rand(2, 3, 16, 24)
    torch.testing.assert_close(shipped(picture), result.student.eval()(picture))


def test_the_reference_runs_on_all_labels(pictures, tmp_path):
    content = recipe(pictures, method={"name": "supervised-segmentation"})
    content["streams"].pop("unlabelled")
    for key in ("labels", "hidden_masks", "validation_fraction"):
        content["data"].pop(key)
    assert run(content, workspace=tmp_path, report=False).metrics["miou"] > 0.5


def test_without_unlabelled_samples_the_settings_that_make_them_are_named(pictures, tmp_path):
    content = recipe(pictures)
    content["data"].pop("labels")
    with pytest.raises(UserError, match="data.labels, data.labelled_fraction or data.unlabelled_names"):
        run(content, workspace=tmp_path)


def test_a_new_network_knows_the_classes_and_channels_of_the_data(pictures):
    task = find_task("segmentation")
    data = task.prepare_data({"name_or_path": str(pictures), "classes": 2, "ignore_index": 7, "progress": False}, 0)
    assert task.shape(data, "student") == {"num_classes": 2, "in_channels": 3}
    assert task.example(data).shape == (1, 3, 16, 24)
    torch.manual_seed(0)
    assert len(task.exhibits(MiniDeepLab(2, channels=(4, 4, 4)), data)) == 1

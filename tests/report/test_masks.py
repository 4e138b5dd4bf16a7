"""The figure of masks."""

from __future__ import annotations

import io

import pytest
import torch

from limbeck.errors import UserError
from limbeck.report.masks import class_colours, masks_figure

N, H, W = 2, 6, 8


def test_each_sample_has_its_picture_truth_and_prediction_and_ignored_pixels_are_white():
    truth = torch.zeros(N, H, W, dtype=torch.uint8)
    truth[:, :2], truth[:, 2:4] = 255, 1
    figure = masks_figure(torch.rand(N, 3, H, W), truth, torch.ones(N, H, W).long(), ["$sky$", "road", "car"])
    axes = [axis for axis in figure.axes if axis.images]
    assert len(axes) == 3 * N
    painted = axes[1].images[0].get_array()
    rows = [painted[row, 0].tolist() for row in (0, 5, 3)]
    assert rows == [[1.0, 1.0, 1.0], list(class_colours(3)[0]), list(class_colours(3)[1])]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["$sky$", "road"]  # only classes that occur
    figure.savefig(io.BytesIO(), format="png")  # a class name is no formula


def test_grey_pictures_are_shown_too():
    masks_figure(torch.randint(0, 256, (1, 1, H, W), dtype=torch.uint8), *(2 * [torch.zeros(1, H, W).long()]), ["a"])


@pytest.mark.parametrize("classes", [11, 19, 40])
def test_colours_of_classes_differ(classes):
    assert len(set(class_colours(classes))) == classes


def test_masks_of_another_size_are_refused():
    with pytest.raises(UserError, match="masks"):
        masks_figure(torch.rand(1, 3, H, W), torch.zeros(1, H, W), torch.zeros(1, 2, 2), ["a"])

"""The figure of boxes on pictures."""

from __future__ import annotations

import io

import pytest
import torch

from limbeck.errors import UserError
from limbeck.models.detection import Detections, Targets
from limbeck.report.boxes import boxes_figure

TRUTH = Targets(torch.tensor([[[2.0, 2, 10, 9], [0, 0, 0, 0]]]), torch.tensor([[1, -1]]))
FOUND = Detections(
    torch.tensor([[[1.0, 2, 9, 9], [3.0, 3, 5, 5]]]), torch.tensor([[0.87, 0.1]]), torch.tensor([[0, 1]])
)


def test_it_shows_true_boxes_and_confident_ones_with_class_and_score():
    figure = boxes_figure(torch.zeros(1, 3, 16, 20, dtype=torch.uint8), TRUTH, FOUND, ["cell", "$dot_$"])
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["$dot_$"]
    assert [text.get_text() for text in right.texts] == ["cell 87"]  # the other's score is below the limit
    (box,) = left.patches
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (2, 2, 8, 7)
    figure.savefig(file := io.BytesIO(), format="png")
    assert len(file.getvalue()) > 1000


def test_grey_pictures_and_pictures_without_boxes_are_drawn_too():
    nothing = Detections(FOUND.boxes, FOUND.scores, torch.full((1, 2), -1))
    figure = boxes_figure(torch.rand(1, 1, 16, 20), Targets(TRUTH.boxes, torch.full((1, 2), -1)), nothing, ["a", "b"])
    assert not any(axes.patches for axes in figure.axes)


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="2 pictures, boxes of 1"):
        boxes_figure(torch.rand(2, 3, 8, 8), TRUTH, FOUND, ["a", "b"])

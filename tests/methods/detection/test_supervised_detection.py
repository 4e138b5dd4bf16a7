"""Supervised training of a detector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.methods.detection.supervised_detection import SupervisedDetection
from limbeck.models.detection import Targets, load_detector

SMALL = {"channels": [8, 8, 8], "width": 8, "hidden": 16, "bins": 4}


def test_a_step_is_the_detectors_own_losses_on_the_moved_boxes():
    torch.manual_seed(0)
    model = load_detector("compact", num_classes=3, config=SMALL)
    boxes, labels = torch.tensor([[[5.0, 5, 25, 30]], [[0, 0, 0, 0]]]), torch.tensor([[1], [-1]])
    pictures = torch.rand(2, 3, 40, 48)
    fields = {
        "weak": pictures,
        "weak_boxes": boxes,
        "weak_box_labels": labels,
        "boxes": boxes * 0,
        "box_labels": labels,
    }
    torch.manual_seed(1)
    losses = SupervisedDetection(model).training_step({"labelled": fields})
    torch.manual_seed(1)
    expected = model.losses(pictures, Targets(boxes, labels))
    assert losses.keys() == expected.keys() and all(torch.equal(losses[name], expected[name]) for name in losses)


def test_what_is_no_detector_is_refused():
    with pytest.raises(UserError, match="Linear is no detector"):
        SupervisedDetection(nn.Linear(2, 2))

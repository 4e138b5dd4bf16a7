"""Facts about the data of classification recipes."""

from __future__ import annotations

import torch

from limbeck.recipes.tasks.classification import TASK


def test_a_canvas_takes_the_pictures_of_all_splits_and_the_networks_are_built_for_it():
    plain, placed = (
        TASK.prepare_data({"name_or_path": "digits", "labels_per_class": 5, **more}, seed=3)
        for more in ({}, {"canvas": 20})
    )
    assert TASK.shape(placed, "student")["image_size"] == 20
    for name in ("train", "test", "validation", "unlabelled"):
        before, after = getattr(plain, name), getattr(placed, name)
        assert after.fields["image"].shape[1:] == (1, 20, 20) and after.fields["hidden_box"].shape == (len(before), 4)
        assert torch.equal(after.index, before.index)
        assert torch.equal(after.fields["image"].flatten(1).sum(1), before.fields["image"].flatten(1).sum(1))
    assert "label" not in placed.unlabelled.fields

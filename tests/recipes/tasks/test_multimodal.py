"""The multimodal task: from a recipe to a student that takes one modality, its report and its files."""

from __future__ import annotations

import pytest
import torch

from limbeck.data import data_folder
from limbeck.errors import UserError
from limbeck.models import load_model
from limbeck.recipes import export, run

needs_data = pytest.mark.skipif(
    not ((data_folder() / "fsdd").is_dir() and (data_folder() / "mnist").is_dir()),
    reason="needs LIMBECK_DATA with mnist and fsdd",
)
ONE_EPOCH = {
    "data.size.train": 60,
    "data.modalities.image.labels_per_class": 6,
    "data.modalities.spectrogram.labels_per_class": 6,
    **{f"stages.{stage}.trainer.epochs": 1 for stage in ("cotrain", "specialise", "distill")},
}


@needs_data
def test_a_recipe_trains_three_networks_and_ships_one_that_takes_sound(tmp_path):
    result = run("mst-distill", ONE_EPOCH, workspace=tmp_path / "run")
    assert {"accuracy", "routing.largest", "teachers.fused", "teachers.other_stages_1"} <= set(result.metrics)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "image over spectrogram" in page and "Which specialised teacher" in page
    sound = result.data.test.fields["spectrogram"][:3]
    student = load_model(tmp_path / "run" / "student").eval()
    torch.testing.assert_close(student(sound), result.student(sound))
    torch.testing.assert_close(result.student({"spectrogram": sound}), result.student(sound))
    paths = export(tmp_path / "run", ("torch_export",))
    exported = torch.export.load(paths["torch_export"]).module()
    torch.testing.assert_close(exported(sound), result.student(sound), rtol=1e-4, atol=1e-5)


@needs_data
def test_a_network_of_a_modality_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no modality 'depth'; they have image, spectrogram"):
        run("mst-distill", {**ONE_EPOCH, "other.modality": "depth"}, workspace=tmp_path)

"""Generators from recipes: data that no seed splits anew, what is measured and shown, errors at the door."""

from __future__ import annotations

import pytest
import torch

import limbeck
from limbeck.errors import UserError
from limbeck.models.diffusion import FewStepSampler, load_sampler
from limbeck.recipes.tasks.generation import TASK

NET = {"name": "mlp", "config": {"width": 32, "depth": 2}}
DATA = {"name_or_path": "digits", "limit": {"train": 200, "test": 60}}


def teacher(**more) -> dict:
    return {
        "method": "edm",
        "data": DATA,
        "student": NET,
        "streams": {"images": {"batch_size": 32}},
        "trainer": {"steps": 5, "optimizer": {"name": "adam", "lr": 1e-3}},
        **more,
    }


def recipe(**more) -> dict:
    return teacher(student={"run": teacher()}, teacher={"run": teacher()}, **{"method": "dmd2", **more})


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> limbeck.Result:
    return limbeck.run(recipe(), workspace=tmp_path_factory.mktemp("dmd2") / "run")


def test_a_generator_is_measured_and_shown(result):
    assert {"frechet", "energy", "coverage", "agreement", "precision", "recall"} <= result.metrics.keys()
    assert result.metrics["parameters"] > 0 and result.metrics["latency_ms"] > 0
    assert isinstance(result.student, FewStepSampler)
    page = (result.workspace / "report.html").read_text()
    assert "Generated" in page and "Real" in page and ">teacher</" in page


def test_the_student_folder_holds_the_generator(result):
    again = load_sampler(result.workspace / "student")
    noise, label = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 9])
    torch.testing.assert_close(again(noise, label), result.student(noise, label))


def test_a_generator_can_be_exported(result):
    paths = limbeck.models.export_model(
        result.student, result.workspace / "export", TASK.example(result.data, rows=3), formats=("torch_export",)
    )
    program = torch.export.load(paths["torch_export"]).module()
    inputs = {"noise": torch.randn(5, 1, 8, 8), "label": torch.arange(5)}
    torch.testing.assert_close(program(inputs), result.student(inputs), rtol=1e-4, atol=1e-5)


def test_seeds_share_one_split():
    first, second = (TASK.prepare_data(DATA, seed) for seed in (0, 7))
    assert torch.equal(first.test.index, second.test.index)


def test_digits_are_scaled_to_the_size_that_is_asked_for():
    data = TASK.prepare_data({**DATA, "image_size": 14}, 0)
    image = data.train.fields["image"]
    assert image.shape[1:] == (1, 14, 14) and image.dtype == torch.uint8 and image.max() > 200
    assert TASK.shape(data, "student") == {"in_channels": 1, "image_size": 14, "num_classes": 10}


def test_a_learning_rate_of_zero_leaves_the_teacher_in_one_step(tmp_path):
    still = recipe(trainer={"steps": 1, "optimizer": {"name": "adamw", "lr": 0.0, "weight_decay": 0.01}})
    made = limbeck.run(still, workspace=tmp_path, report=False)
    expert = made.method.teacher.model.denoiser.cpu()
    for mine, theirs in zip(made.student.denoiser.parameters(), expert.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_images_that_a_unet_cannot_halve_are_refused_with_the_mend(tmp_path):
    net = {"name": "unet", "config": {"channels": [8, 8, 8, 8, 8]}}
    with pytest.raises(UserError, match="8 pixels, which cannot be halved 4 times"):
        limbeck.run(teacher(student=net), workspace=tmp_path)


def test_flow_matching_needs_the_euler_solver_and_says_so(tmp_path):
    net = {**NET, "prediction": "flow"}
    with pytest.raises(UserError, match="set the solver to euler"):
        limbeck.run(teacher(student=net), workspace=tmp_path)
    made = limbeck.run(
        teacher(student=net, method={"name": "edm", "solver": "euler", "sampling_steps": 2}), workspace=tmp_path / "b"
    )
    assert made.metrics["frechet"] > 0


def test_a_teacher_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no weights"):
        limbeck.run({**recipe(), "teacher": NET}, workspace=tmp_path)

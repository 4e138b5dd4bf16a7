"""Running from Python objects: the same path as recipes, and a workspace that knows its own."""

from __future__ import annotations

import pytest
import torch

import limbeck
from limbeck import Optimizer, StreamSettings, Trainer, UserError
from limbeck.models import load_model


@pytest.fixture(scope="module")
def data() -> limbeck.Data:
    return limbeck.load_data("digits", limit={"train": 200, "test": 100})


def network(seed: int, classes: int = 10) -> torch.nn.Module:
    torch.manual_seed(seed)
    return load_model("small_cnn", num_classes=classes, in_channels=1, config={"channels": [4, 8]})


def run(data, tmp_path, teacher_seed: int = 1, **more) -> limbeck.Result:
    return limbeck.distill(
        "kd",
        data=data,
        student=network(0),
        teacher=network(teacher_seed),
        trainer=Trainer(epochs=2, optimizer=Optimizer("adam", lr=0.01)),
        workspace=tmp_path / "out",
        **more,
    )


def test_objects_of_ones_own_give_a_student_metrics_and_a_page(data, tmp_path):
    result = run(data, tmp_path)
    assert result.student(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert 0 <= result.metrics["accuracy"] <= 1 and result.metrics["parameters"] > 0
    page = (tmp_path / "out/report.html").read_text()
    assert ">teacher</" in page, "the teacher stands beside its student"


def test_the_student_folder_holds_the_very_student(data, tmp_path):
    result = run(data, tmp_path)
    image = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(load_model(tmp_path / "out/student").eval()(image), result.student(image))


def test_another_teacher_is_not_silently_answered_by_the_old_result(data, tmp_path):
    run(data, tmp_path)
    with pytest.raises(UserError, match="teacher"):
        run(data, tmp_path, teacher_seed=2)


def test_the_teacher_is_as_it_was(data, tmp_path):
    teacher = network(5)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    limbeck.distill(
        "kd", data=data, student=network(0), teacher=teacher, trainer=Trainer(steps=3), workspace=tmp_path, report=False
    )
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_an_argument_that_the_method_does_not_have_is_refused(data, tmp_path):
    with pytest.raises(UserError, match="temprature"):
        run(data, tmp_path, temprature=3)


def test_a_teacher_of_other_classes_is_refused_before_the_first_step(data, tmp_path):
    with pytest.raises(UserError, match="7 classes"):
        limbeck.distill(
            "kd", data=data, student=network(0), teacher=network(1, 7), trainer=Trainer(steps=1), workspace=tmp_path
        )


def test_a_stream_without_samples_is_named(data, tmp_path):
    with pytest.raises(UserError, match="unlabelled"):
        limbeck.distill(
            "fixmatch",
            data=data,
            student=network(0),
            trainer=Trainer(steps=1),
            streams={"labelled": StreamSettings(8), "unlabelled": StreamSettings(8)},
            workspace=tmp_path,
        )

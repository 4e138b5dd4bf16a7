"""Systems of several stages from a recipe: sections from the signature, resume, numbers and pictures of their own."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import limbeck
from limbeck import Data, Stage, StreamSettings, Trainer, UserError, Workspace
from limbeck.methods.classification.kd import KD
from limbeck.methods.classification.supervised import Supervised
from limbeck.recipes import recipe as recipes
from limbeck.teachers import Frozen
from limbeck.train import Bars, Pictures


def two_stages(
    ws: Workspace,
    data: Data,
    student: nn.Module,
    teacher: nn.Module,
    *,
    first: Stage,
    second: Stage,
    alpha: float = 0.9,
) -> nn.Module:
    """A teacher on the labels, then its student."""
    trained = ws.fit("first", Supervised(teacher), first.on(labelled=data.train), first.trainer)
    ws.measure("size", lambda: {"teacher": sum(p.numel() for p in teacher.parameters())})
    ws.show("pixels", Pictures(data.train.fields["image"][:4]))
    ws.show("sizes", Bars({"teacher": ws.measured["size.teacher"]}))
    method = KD(student, Frozen(trained.student), alpha=alpha)
    return ws.fit("second", method, second.on(labelled=data.train), second.trainer).student


NAME = f"{__name__}:two_stages"


@pytest.fixture
def recipe(monkeypatch) -> dict:
    """The recipe of the system above, which counts as one of ours."""
    monkeypatch.setattr(recipes, "method_class", lambda name, allow_imports=False: two_stages)
    net = {"name": "small_cnn", "config": {"channels": [4, 4]}}
    stage = {"trainer": {"epochs": 1}, "streams": {"labelled": {"batch_size": 32}}}
    stages = {"first": stage, "second": copy.deepcopy(stage)}
    return {
        "method": {"name": NAME},
        "data": {"name_or_path": "digits", "limit": {"train": 96, "test": 60}},
        "student": net,
        "teacher": net,
        "stages": stages,
    }


def test_a_recipe_runs_both_stages_and_keeps_what_they_measured(recipe, tmp_path):
    result = limbeck.run(recipe, workspace=tmp_path)
    assert list(result.fits) == ["first", "second"] and result.method is None
    assert result.metrics["size.teacher"] > 0 and result.metrics["steps"] == 6
    assert {"first.ce", "second.kd"} <= result.logged.keys()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figcaption>pixels") == 1 and page.count("<figcaption>sizes") == 1


def test_a_run_that_lost_its_second_stage_ends_with_the_same_student(recipe, tmp_path):
    whole = limbeck.run(recipe, workspace=tmp_path / "a", report=False).student.state_dict()
    limbeck.run(recipe, workspace=tmp_path / "b", report=False)
    for name in ("done.json", "method.safetensors"):
        (tmp_path / "b/stages/second" / name).unlink()
    (tmp_path / "b/result.json").unlink()
    again = limbeck.run(recipe, workspace=tmp_path / "b", report=False).student.state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_misspelt_key_of_a_stage_is_named(recipe, tmp_path):
    recipe["stages"]["second"]["trainer"]["epoch"] = 3
    with pytest.raises(UserError, match=r"stages.second.trainer.epoch.*did you mean 'epochs'"):
        limbeck.run(recipe, workspace=tmp_path)


def test_a_misspelt_key_of_a_stream_is_named(recipe, tmp_path):
    recipe["stages"]["second"]["streams"]["labelled"]["batchsize"] = 3
    with pytest.raises(UserError, match=r"stages.second.streams.labelled.batchsize"):
        limbeck.run(recipe, workspace=tmp_path)


def test_a_stream_that_the_stage_does_not_have_is_named(recipe, tmp_path):
    recipe["stages"]["second"]["streams"]["unlabelled"] = {"batch_size": 3}
    with pytest.raises(UserError, match="no stream 'unlabelled'; it has labelled"):
        limbeck.run(recipe, workspace=tmp_path)


def test_a_missing_network_is_named(recipe, tmp_path):
    del recipe["teacher"]
    with pytest.raises(UserError, match="needs teacher; add"):
        limbeck.run(recipe, workspace=tmp_path)


def test_the_same_system_runs_from_python_objects(tmp_path):
    data = limbeck.load_data("digits", limit={"train": 96, "test": 60})
    torch.manual_seed(0)
    nets = [limbeck.load_model("small_cnn", num_classes=10, in_channels=1, config={"channels": [4]}) for _ in range(2)]
    stage = Stage(Trainer(epochs=1), {"labelled": StreamSettings(32)})
    result = limbeck.distill(
        two_stages, data=data, student=nets[0], teacher=nets[1], workspace=tmp_path, first=stage, second=stage
    )
    assert result.metrics["accuracy"] >= 0 and (tmp_path / "report.html").exists()


def test_a_network_that_a_recipe_trains_is_trained_once_for_all_runs(tmp_path):
    net = {"name": "small_cnn", "config": {"channels": [4]}}
    data = {"name_or_path": "digits", "limit": {"train": 96, "test": 60}}
    teacher = {"method": "supervised", "data": data, "student": net, "trainer": {"epochs": 1}}
    recipe = {"method": {"name": "kd"}, "data": data, "student": net, "teacher": {"run": teacher}}
    recipe["trainer"] = {"epochs": 1}
    first = limbeck.run(recipe, workspace=tmp_path / "a", shared=tmp_path / "nets", report=False)
    (made,) = (tmp_path / "nets").iterdir()
    stamp = (made / "result.json").stat().st_mtime_ns
    limbeck.run({**recipe, "seed": 1}, workspace=tmp_path / "b", shared=tmp_path / "nets", report=False)
    assert [made] == list((tmp_path / "nets").iterdir()) and (made / "result.json").stat().st_mtime_ns == stamp
    assert json.loads((tmp_path / "a/result.json").read_text())["accuracy"] == first.metrics["accuracy"]


def test_a_trained_network_has_no_other_keys(tmp_path):
    recipe = {"method": {"name": "kd"}, "data": {"name_or_path": "digits"}, "student": {"name": "small_cnn"}}
    with pytest.raises(UserError, match="teacher has both 'run' and 'weights'"):
        limbeck.run({**recipe, "teacher": {"run": "supervised", "weights": "x"}}, workspace=tmp_path)


def test_the_seed_is_the_recipes_own(recipe, tmp_path):
    recipe["stages"]["first"]["trainer"]["seed"] = 3
    with pytest.raises(UserError, match="unknown key 'stages.first.trainer.seed'"):
        limbeck.run(recipe, workspace=tmp_path)


def test_a_missing_stage_is_named(recipe, tmp_path):
    recipe["stages"]["second"] = None
    with pytest.raises(UserError, match=r"needs stages.second; add"):
        limbeck.run(recipe, workspace=tmp_path)

"""Recipes: read, overridden, merged for the arms of a claim, and every shipped one checked against its signatures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from limbeck import catalog
from limbeck.errors import UserError
from limbeck.recipes import recipe as recipes
from limbeck.recipes.compare import prove

SHIPPED = sorted(path.stem for path in recipes.FOLDER.glob("*.yaml"))
BASE = {"method": {"name": "kd", "alpha": 0.5}, "teacher": {"name": "t"}, "trainer": {"epochs": 3, "clip_norm": 1.0}}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_key_of_a_shipped_recipe_is_an_argument_of_the_signature(name):
    content = recipes.read(name)
    parsed = recipes.parse(content)
    assert catalog.load(content["method"]["name"]) is parsed.system
    stages = vars(parsed.settings.stages).values() if parsed.interface.stages else [parsed.settings]
    assert all(stage.trainer.epochs or stage.trainer.steps for stage in stages)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_arm_of_a_shipped_claim_parses_with_the_recipes_data_and_student(name):
    content = recipes.read(name)
    claim = content.pop("claim", None)
    for arm, change in (claim or {"arms": {}})["arms"].items():
        merged = recipes.fit_to_method(recipes.merge(content, change or {}))
        recipes.parse(merged)
        student = (change or {}).get("student", content["student"])  # an arm may name another one, as unfused's does
        assert merged["data"] == content["data"] and merged["student"] == student, arm


def test_every_system_that_is_no_reference_states_a_claim_over_at_least_five_seeds():
    for system in catalog.systems():
        if not system.reference:
            claim = recipes.read(system.slug)["claim"]
            assert claim["seeds"] >= 5 and claim["expect"]


def test_a_dotted_setting_reaches_into_sections_and_reads_yaml():
    changed = recipes.override(BASE, {"trainer.epochs": "7", "data.limit": "{train: 5}", "method.alpha": 0.1})
    assert changed["trainer"] == {"epochs": 7, "clip_norm": 1.0}
    assert changed["data"]["limit"] == {"train": 5}
    assert BASE["method"]["alpha"] == 0.5, "the recipe itself stays as it is"


def test_a_setting_below_a_short_form_turns_it_into_a_section():
    content = {**BASE, "streams": {"labelled": {"views": {"weak": "identity"}}}}
    changed = recipes.override(content, {"streams.labelled.views.weak.padding": "2"})
    assert changed["streams"]["labelled"]["views"]["weak"] == {"name": "identity", "padding": 2}


def test_another_method_replaces_the_whole_section_and_the_same_one_merges():
    assert recipes.merge(BASE, {"method": "supervised"})["method"] == {"name": "supervised"}
    assert recipes.merge(BASE, {"method": {"temperature": 2}})["method"] == {
        "name": "kd",
        "alpha": 0.5,
        "temperature": 2,
    }


def test_an_arm_drops_the_teacher_and_the_streams_that_its_method_does_not_use():
    content = {"method": {"name": "supervised"}, "teacher": {}, "streams": {"labelled": {}, "unlabelled": {}}}
    assert recipes.fit_to_method(content) == {"method": {"name": "supervised"}, "streams": {"labelled": {}}}


def test_folders_in_texts_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("LIMBECK_MODELS", "elsewhere")
    assert recipes.expand({"weights": ["${LIMBECK_MODELS}/net"]}) == {"weights": ["elsewhere/net"]}


@pytest.mark.parametrize(
    ("text", "named"),
    [("- kd\n", "mapping"), ("seed: 1\n", "method"), ("method: kd\nmodel: x\n", "'model'"), ("a: [1\n", "line")],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, named):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=named):
        recipes.parse(recipes.read(str(tmp_path / "r.yaml")))


def test_prove_measures_every_arm_over_the_seeds_and_says_what_does_not_hold(tmp_path, monkeypatch):
    content = {
        "method": {"name": "ps-kd", "alpha_final": 0.5},
        "data": {"name_or_path": "digits", "limit": {"train": 120, "test": 100}},
        "student": {"name": "small_cnn", "config": {"channels": [4, 4]}},
        "streams": {"labelled": {"batch_size": 32}},
        "trainer": {"epochs": 2, "optimizer": {"name": "adam", "lr": 0.01}},
        "claim": {
            "arms": {"plain": {"method": "supervised"}, "ps-kd": {}},
            "expect": ["ps-kd.accuracy > plain.accuracy + 2", "ps-kd.accuracy < plain.accuracy + 2"],
        },
    }
    (tmp_path / "ps-kd.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    said: list[str] = []
    prove("ps-kd", seeds=2, workspace=tmp_path / "runs", results=tmp_path / "results", say=said.append)
    result = json.loads((tmp_path / "results/ps-kd.json").read_text())
    assert [claim["holds"] for claim in result["claims"]] == [False, True]
    assert result["seeds"] == [0, 1] and set(result["arms"]) == {"plain", "ps-kd"} and len(said) == 4
    assert str(tmp_path) not in json.dumps(result)
    # A second call loads the finished runs: not one file of a stage is written again.
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("method.safetensors")}
    prove("ps-kd", seeds=2, workspace=tmp_path / "runs", results=tmp_path / "results")
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps} and len(stamps) == 4


def test_committed_results_are_of_the_claims_in_the_recipes():
    folder = Path(catalog.__file__).parent.parent / "results"
    for file in folder.glob("*.json"):
        result = json.loads(file.read_text())
        claim = recipes.read(file.stem)["claim"]
        assert [each["expectation"] for each in result["claims"]] == claim["expect"], file.name
        assert set(result["arms"]) == set(claim["arms"]) and len(result["seeds"]) >= claim["seeds"]
        recipe = {key: value for key, value in recipes.read(file.stem).items() if key != "claim"}
        assert result["config"]["recipe"] == recipe, f"{file.name} was measured with another recipe: prove it again"

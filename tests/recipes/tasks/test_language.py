"""A whole run of the language task: what is measured, shown and left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck.data import LanguageData, load_language
from limbeck.errors import UserError
from limbeck.models import load_language_model, save_model
from limbeck.recipes import Result, run
from limbeck.recipes.tasks.language import TASK, _prompts
from limbeck.teachers import Frozen

TEXT = "the quick brown fox jumps over the lazy dog. " * 20
GPT = {"n_layer": 1, "n_embd": 16, "n_head": 2}


def recipe(folder: Path, **sections: object) -> dict[str, object]:
    (folder / "input.txt").write_text(TEXT)
    return {
        "method": {"name": "token-kd", "divergence": "reverse"},
        "data": {"name_or_path": str(folder / "input.txt"), "max_length": 17, "validation_fraction": 0.1,
                 "test_fraction": 0.1},
        "teacher": {"run": {
            "method": "language-modelling",
            "data": {"name_or_path": str(folder / "input.txt"), "max_length": 17},
            "student": {"name": "hf-config:gpt2", "config": GPT},
            "trainer": {"steps": 2, "accelerator": "cpu"},
            "streams": {"labelled": {"batch_size": 4, "views": {}}},
        }},
        "student": {"name": "hf-config:gpt2", "config": {**GPT, "n_embd": 8}},
        "streams": {"labelled": {"batch_size": 4, "views": {}}},
        "trainer": {"steps": 2, "accelerator": "cpu"},
        **sections,
    }  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("language")
    return run(recipe(folder), workspace=folder / "run")


def test_a_run_measures_held_out_text_and_the_distance_to_the_teacher(result):
    assert {"nll", "perplexity", "bits_per_character", "entropy", "teacher_kl", "parameters", "flops"} <= set(
        result.metrics
    )
    assert result.metrics["teacher_kl"] > 0
    assert set(result.fit.validation[-1]) >= {"nll", "teacher_kl"}


def test_the_report_shows_what_both_models_write(result):
    page = (result.workspace / "report.html").read_text()
    assert "What the models write" in page and "KL from the teacher" in page


def test_the_student_lies_beside_its_tokenizer_and_works_without_limbeck(result):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(result.workspace / "student")
    model = AutoModelForCausalLM.from_pretrained(result.workspace / "student").eval()
    ids = torch.tensor([tokenizer("the fox")["input_ids"]])
    assert ids.max() < len(tokenizer) == result.data.vocab_size
    torch.testing.assert_close(model(input_ids=ids).logits, result.student({"input_ids": ids}))


def test_prompts_of_pairs_are_gone_on_from():
    pairs = {"prompt": ["1+1?", "2+2?"], "response": ["2", "4"]}
    data = load_language({"train": pairs, "test": pairs}, max_length=16)
    model = load_language_model("hf-config:gpt2", **TASK.shape(data, "student"), config=GPT)
    assert len(TASK.exhibits(model, data)) == 1


def test_prompts_are_shown_as_models_read_them_when_they_were_shortened():
    pairs = {"prompt": ["a long way to go", "12"], "response": ["2", "4"]}
    data = load_language({"train": pairs, "test": pairs}, max_length=8, truncate="prompt")
    shown = _prompts(data)
    assert data.decode(shown["input_ids"]) == ["a lon\n", "12\n"]
    assert shown["attention_mask"].tolist() == [[1] * 6, [0] * 3 + [1] * 3]  # padding on the left: models go on behind


def test_networks_that_lack_words_of_the_data_are_refused():
    data = load_language({"train": TEXT}, max_length=9)
    assert isinstance(data, LanguageData)
    small = load_language_model("hf-config:gpt2", vocab_size=9, max_length=9, config=GPT)
    with pytest.raises(UserError, match=f"the teacher knows 9 tokens and the data's tokenizer gives {data.vocab_size}"):
        TASK.attach(data, {"teacher": Frozen(small)})


def test_a_saved_student_of_another_tokenizer_is_refused_before_training(tmp_path):
    save_model(load_language_model("hf-config:gpt2", vocab_size=9, max_length=17, config=GPT), tmp_path / "small")
    changed = recipe(tmp_path, student={"name": str(tmp_path / "small")})
    with pytest.raises(UserError, match="the student knows 9 tokens"):
        run(changed, workspace=tmp_path / "run")

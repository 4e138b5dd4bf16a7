"""A recipe's teacher behind HTTP: asked while training, or once by `limbeck label`, and never twice."""

from __future__ import annotations

import pytest
import yaml

from limbeck.cli import main
from limbeck.recipes import label, run
from limbeck.teachers import Store
from tests.teachers.http_server import ModelServer


@pytest.fixture
def served(tmp_path):
    with ModelServer() as server:
        server.tokenizer.save_pretrained(tmp_path / "tokenizer")
        words = [word for word in server.tokenizer.get_vocab() if len(word) == 1][:8]
        text = "".join(words[i * i % len(words)] for i in range(400))
        (tmp_path / "text.txt").write_text(text)
        content = {
            "method": {"name": "token-kd", "divergence": "forward"},
            "data": {"name_or_path": str(tmp_path / "text.txt"), "tokenizer": str(tmp_path / "tokenizer")}
            | {"max_length": 12, "limit": 8},
            "teacher": {"served": {"url": server.url, "model": "tiny", "dialect": "vllm", "timeout": 20, "top_k": 4}},
            "student": {
                "name": "hf-config:llama",
                "config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
                | {"num_attention_heads": 2, "num_key_value_heads": 2},
            },
            "streams": {"labelled": {"batch_size": 4, "views": {}}},
            "trainer": {"steps": 4},
        }
        file = tmp_path / "served.yaml"
        file.write_text(yaml.safe_dump(content))
        yield server, file, tmp_path


def test_a_served_teacher_is_asked_once_for_each_row(served):
    server, file, folder = served
    run(file, workspace=folder / "first", report=False)
    asked = server.attempts.total()
    assert 0 < asked <= 2 * 8
    settings = {"teacher.store": str(folder / "first" / "networks" / "teacher-answers"), "seed": 1}
    run(file, settings, workspace=folder / "second", report=False)
    assert server.attempts.total() == asked


def test_a_served_teacher_fills_a_store_that_is_trained_from_without_it(served, capsys):
    server, file, folder = served
    store = folder / "store"
    assert main(["label", str(file), "--store", str(store), "--top-k", "3", "--dtype", "float16", "--verify"]) == 0
    assert "8 rows" in capsys.readouterr().out
    asked = server.attempts.total()
    assert label(file, {"teacher.store": str(store)}, store=folder / "again", top_k=3, dtype="float16") is not None
    assert server.attempts.total() == asked  # the answers are kept beside the recipe's store
    stored = {"teacher": {"store": str(store)}}
    from_store = run(file, stored, workspace=folder / "stored", report=False)
    assert server.attempts.total() == asked
    assert from_store.metrics["steps"] == 4
    Store(store).verify()


def test_an_endpoint_that_is_not_there_is_one_sentence(served, capsys):
    server, file, folder = served
    settings = ["--teacher.served.url", "http://127.0.0.1:9/v1", "--teacher.served.attempts", "1"]
    assert main(["run", str(file), "--workspace", str(folder / "none"), *settings]) == 2
    assert "gave no answer in 1 attempts" in capsys.readouterr().err


def test_an_unknown_setting_of_an_endpoint_is_named(served, capsys):
    _, file, folder = served
    assert main(["run", str(file), "--workspace", str(folder / "w"), "--teacher.served.modle", "x"]) == 2
    assert "did you mean model" in capsys.readouterr().err

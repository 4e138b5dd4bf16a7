"""Language modelling: the loss of the next token, response masks, and that it learns what there is to learn."""

from __future__ import annotations

import pytest
import torch

from limbeck.data import Stream, load_language
from limbeck.evaluate import language_metrics
from limbeck.methods.language.language_modelling import LanguageModelling
from limbeck.models import load_language_model
from limbeck.train import Optimizer, Trainer, fit

CONFIG = {"n_layer": 1, "n_embd": 32, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def gpt(data) -> torch.nn.Module:
    torch.manual_seed(0)
    return load_language_model("hf-config:gpt2", vocab_size=data.vocab_size, max_length=data.max_length, config=CONFIG)


def test_the_loss_is_the_one_of_transformers_with_the_same_labels():
    pairs = {"prompt": ["1+1?", "capital of France?"], "response": ["2", "Paris"]}
    data = load_language({"train": pairs, "test": pairs}, max_length=32)
    method = LanguageModelling(gpt(data))
    batch = data.train.batch(torch.arange(2))
    answer = method.student.model(input_ids=batch["tokens"]["input_ids"], labels=batch["labels"])
    torch.testing.assert_close(method.training_step({"labelled": batch})["ce"], answer.loss)


def test_a_model_learns_a_text_that_repeats():
    data = load_language({"train": "abcdefgh" * 60}, max_length=17)
    model = gpt(data)
    trainer = Trainer(accelerator="cpu", steps=60, optimizer=Optimizer("adamw", lr=1e-2))
    fit(LanguageModelling(model), {"labelled": Stream(data.train, 8)}, trainer)
    assert language_metrics(model, data.test)["perplexity"] < 1.2


def test_smoothing_pulls_towards_the_even_distribution():
    data = load_language({"train": "abcdefgh" * 60}, max_length=17)
    model, batch = gpt(data), {"labelled": data.train.batch(torch.arange(4))}

    def loss(smoothing: float) -> float:
        return float(LanguageModelling(model, label_smoothing=smoothing).training_step(batch)["ce"].detach())

    model.eval()
    assert loss(0.5) == pytest.approx((loss(0.0) + loss(1.0)) / 2, rel=1e-5)

"""Perplexity and its kin, by hand and against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.data import Samples, load_language
from limbeck.errors import UserError
from limbeck.evaluate import LanguageEvaluator, language_metrics
from limbeck.losses import kl_divergence

V = 4


class Bigram(nn.Module):
    """Logits of the next token from a table."""

    def __init__(self, table_VV: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table_VV)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.dropout(self.table[tokens["input_ids"]])


def bigram(seed: int, v: int = V) -> Bigram:
    return Bigram(torch.randn(v, v, generator=torch.Generator().manual_seed(seed)))


def rows(labels_NL: Tensor) -> Samples:
    ids = labels_NL.clamp(min=0)
    return Samples({"tokens": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "labels": labels_NL})


def test_perplexity_by_hand():
    """P(1|0) = 1/2, P(2|1) = 1/4 and P(3|2) = 1/8: the mean of -log2 is 2, the perplexity 4."""
    table = torch.zeros(V, V)
    table[0] = torch.log(torch.tensor([1 / 6, 1 / 2, 1 / 6, 1 / 6]))
    table[2] = torch.log(torch.tensor([7 / 24, 7 / 24, 7 / 24, 1 / 8]))
    samples = rows(torch.tensor([[0, 1, 2, 3]])).with_fields({"characters": torch.tensor([6])})
    found = language_metrics(Bigram(table), samples)
    assert found["perplexity"] == pytest.approx(4, rel=1e-5)
    assert found["nll"] == pytest.approx(math.log(4), rel=1e-5)
    assert found["bits_per_character"] == pytest.approx(1, rel=1e-5)  # 6 bits for 6 characters


def test_an_even_model_has_the_vocabulary_as_perplexity_and_its_log_as_entropy():
    found = language_metrics(Bigram(torch.zeros(V, V)), rows(torch.randint(0, V, (3, 5))))
    assert found["perplexity"] == pytest.approx(V, rel=1e-5)
    assert found["entropy"] == pytest.approx(math.log(V), rel=1e-5)


def test_every_scored_token_counts_once_whatever_the_batches():
    labels = torch.randint(0, V, (7, 6), generator=torch.Generator().manual_seed(0))
    labels[:, :2] = -100
    labels[3, 3:] = -100
    model, teacher = bigram(1), bigram(2)
    one, two = (LanguageEvaluator(teacher, batch_size=size)(model, rows(labels)) for size in (2, 7))
    assert one == pytest.approx(two, rel=1e-6)
    pairs = [(int(row[i].clamp(min=0)), int(row[i + 1])) for row in labels for i in range(5) if row[i + 1] != -100]
    table, other = model.table.detach(), teacher.table.detach()
    nll = sum(-float(table[a].log_softmax(-1)[b]) for a, b in pairs) / len(pairs)
    kl = sum(float(kl_divergence(table[a], other[a], scale_by_t2=False, reduction="mean")) for a, _ in pairs)
    assert one["nll"] == pytest.approx(nll, rel=1e-4)
    assert one["teacher_kl"] == pytest.approx(kl / len(pairs), rel=1e-4)
    assert one["accuracy"] == pytest.approx(sum(int(table[a].argmax()) == b for a, b in pairs) / len(pairs), rel=1e-5)


def test_a_models_distance_to_itself_is_zero_and_its_mode_comes_back():
    model = bigram(3).train()
    found = language_metrics(model, rows(torch.randint(0, V, (2, 5))), teacher=bigram(3))
    assert found["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert found["teacher_nll"] == pytest.approx(found["nll"], rel=1e-5)
    assert model.training and model.dropout.training


def test_bits_per_character_agree_over_tokenizers_where_the_model_knows_nothing():
    """An even model over characters spends log2 V bits on each."""
    data = load_language({"train": "abcd" * 50, "test": "dcba" * 20}, max_length=8)
    found = language_metrics(Bigram(torch.zeros(data.vocab_size, data.vocab_size)), data.test)
    assert found["bits_per_character"] == pytest.approx(math.log2(data.vocab_size), rel=1e-5)


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        (Samples({"text": ["a"]}), "no field 'tokens'"),
        (rows(torch.full((2, 4), -100)), "no scored tokens"),
        (rows(torch.zeros(2, 4, dtype=torch.long)).select([]), "no rows"),
    ],
)
def test_what_cannot_be_scored_is_named(samples, sentence):
    with pytest.raises(UserError, match=sentence):
        language_metrics(bigram(0), samples)


# ---------------------------------------------------------------- answers


def answered(labels_NL: list[list[int]], label: list[int]) -> Samples:
    """Rows whose labels are -100 before the answer; the table's row of the token before it gives the answer."""
    labels = torch.tensor(labels_NL)
    return rows(labels).with_fields({"label": torch.tensor(label)})


def test_the_answer_is_the_first_token_of_the_response():
    """Token 0 stands before every answer, where the model says 1 with 0.7; what follows the answer does not count."""
    table = torch.full((V, V), -30.0)
    table[0] = torch.tensor([0.1, 0.7, 0.1, 0.1]).log()
    table[1:, 0] = 0.0  # sure of 0 behind any answer
    samples = answered([[-100, 1, 3], [-100, 1, 2], [-100, 2, 3], [-100, 1, 3]], [0, 0, 1, 0])
    found = language_metrics(Bigram(table), samples, batch_size=3)
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["ece"] == pytest.approx(0.05, abs=1e-5)
    assert found["trust"] == pytest.approx(0.7, abs=1e-5)


def test_an_answer_outside_of_the_class_words_is_wrong():
    table = torch.zeros(V, V)
    table[0, 3] = 9.0  # no class is called 3
    found = language_metrics(Bigram(table), answered([[-100, 1], [-100, 2]], [0, 1]))
    assert found["accuracy"] == 0 and found["ece"] > 0.9


def test_texts_without_classes_have_no_answers():
    assert not {"ece", "trust"} & language_metrics(bigram(0), rows(torch.randint(0, V, (3, 5)))).keys()

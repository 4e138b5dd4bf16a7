"""Metrics of pair scores against scipy and scikit-learn, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from limbeck.data import load_pairs
from limbeck.errors import UserError
from limbeck.evaluate import PairEvaluator, pair_metrics, predict_pairs
from limbeck.models import cross_encoder, load_encoder

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def test_spearman_is_scipys_with_ties_and_survives_a_monotone_map() -> None:
    scores = torch.tensor([0.1, 0.5, 0.5, 0.9, -0.2])
    labels = torch.tensor([0.0, 0.4, 0.6, 0.6, 0.2])
    expected = spearmanr(scores.numpy(), labels.numpy()).statistic
    assert pair_metrics(scores, {"score": labels})["spearman"] == pytest.approx(expected)
    assert pair_metrics(scores.exp(), {"score": labels})["spearman"] == pytest.approx(expected)
    assert pair_metrics(scores, {"score": scores})["spearman"] == pytest.approx(1)


def test_constant_scores_say_nothing() -> None:
    assert pair_metrics(torch.ones(3), {"score": torch.tensor([0.0, 0.5, 1.0])}) == {"spearman": 0, "pearson": 0}


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    scores, labels = torch.tensor([0.9, 0.4, 0.6, 0.1]), torch.tensor([1, 1, 0, 0])
    right = sum(float(s > t) for s in scores[:2] for t in scores[2:]) / 4
    assert pair_metrics(scores, {"label": labels}) == {"auc": pytest.approx(right)}


@pytest.mark.parametrize(
    ("scores", "fields", "message"),
    [
        ([0.1, float("nan")], {"score": torch.tensor([0.0, 1.0])}, "the score of pair 1 is not finite"),
        ([0.1, 0.2], {"label": torch.tensor([1, 1])}, "classes 0 and 1, got"),
        ([0.1, 0.2], {"text_a": ["a", "b"]}, "measured by a field 'score' or 'label'"),
    ],
)
def test_bad_input_is_refused(scores, fields, message) -> None:
    with pytest.raises(UserError, match=message):
        pair_metrics(torch.tensor(scores), fields)


def test_the_evaluator_measures_both_forms_and_refuses_other_models() -> None:
    words = {"sentence1": ["a b", "c d", "e f"], "sentence2": ["a b", "c x", "y z"]}
    words["score"] = torch.tensor([1.0, 0.5, 0])  # type: ignore[assignment]
    data = load_pairs({"train": words, "test": words}, vocab_size=40)
    bi = load_encoder("hf-config:bert", config=TINY, pooling="mean", vocab_size=40)
    for model in (bi, cross_encoder(bi)):  # type: ignore[arg-type]
        metrics = PairEvaluator(batch_size=2)(model, data.test)
        assert metrics == pair_metrics(predict_pairs(model, data.test), data.test.fields)
        assert -1 <= metrics["spearman"] <= 1
    with pytest.raises(UserError, match="got Linear"):
        predict_pairs(nn.Linear(2, 2), data.test)
    with pytest.raises(UserError, match="no field 'tokens_a'"):
        predict_pairs(bi, data.test.without("tokens_a"))

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck.data import Samples
from limbeck.errors import UserError
from limbeck.evaluate import (
    ClassificationEvaluator,
    classification_metrics,
    predict,
    reliability,
)


@st.composite
def predictions(draw):
    samples, classes = draw(st.integers(1, 60)), draw(st.integers(2, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e4]))
    logits = torch.randn(samples, classes, generator=generator) * scale
    if draw(st.booleans()):
        logits = logits.round()  # many samples of equal confidence
    return logits, torch.randint(0, classes, (samples,), generator=generator)


@settings(max_examples=25, deadline=None)
@given(predictions())
def test_metrics_lie_in_their_ranges_and_reliability_gives_the_same_ece(case):
    logits, labels = case
    metrics = classification_metrics(logits, labels)
    for name in ("accuracy", "ece", "adaptive_ece", "aurc"):
        assert -1e-6 <= metrics[name] <= 1 + 1e-6, name
    assert 0 <= metrics["brier"] <= 2 + 1e-5
    assert metrics["nll"] >= 0
    diagram = reliability(logits, labels)
    assert diagram.ece == pytest.approx(metrics["ece"], abs=1e-5)
    assert sum(diagram.fraction) == pytest.approx(1, abs=1e-5)
    accuracy = sum(f * a for f, a in zip(diagram.fraction, diagram.accuracy, strict=True))
    assert accuracy == pytest.approx(metrics["accuracy"], abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(predictions(), st.integers(0, 1000))
def test_the_order_of_samples_does_not_matter(case, seed):
    logits, labels = case
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    expected = classification_metrics(logits, labels)
    assert classification_metrics(logits[order], labels[order]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(predictions(), st.floats(-50, 50))
def test_adding_a_constant_to_the_logits_changes_nothing(case, shift):
    logits, labels = case[0].double(), case[1]
    logits = logits.float().round()  # so that the sum is exact in float32
    shifted = logits + round(shift)
    expected = classification_metrics(logits, labels)
    assert classification_metrics(shifted, labels) == expected


def test_logits_within_zero_and_one_are_not_taken_for_probabilities():
    logits, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0])
    assert classification_metrics(logits, labels)["ece"] == pytest.approx(1 - 1 / (1 + math.exp(-1)), abs=1e-6)


def test_a_certain_and_right_model_is_perfect():
    labels = torch.arange(10)
    metrics = classification_metrics(F.one_hot(labels, 10) * 1000.0, labels)
    assert metrics["accuracy"] == 1
    assert [metrics[name] for name in ("nll", "ece", "adaptive_ece", "aurc", "brier")] == pytest.approx(
        [0] * 5, abs=1e-6
    )


def test_a_certain_and_wrong_model_is_as_bad_as_can_be():
    labels = torch.arange(10)
    metrics = classification_metrics(F.one_hot((labels + 1) % 10, 10) * 1000.0, labels)
    assert metrics["accuracy"] == 0
    assert [metrics[name] for name in ("ece", "adaptive_ece", "aurc")] == pytest.approx([1] * 3, abs=1e-6)
    assert metrics["brier"] == pytest.approx(2) and metrics["nll"] == pytest.approx(1000)


def test_aurc_follows_its_definition_on_four_samples():
    # Confidence falls from row to row; rows 1 and 3 are wrong: risks 0, 1/2, 1/3, 2/4.
    logits = torch.tensor([[4.0, 0], [3.0, 0], [2.0, 0], [1.0, 0]])
    metrics = classification_metrics(logits, torch.tensor([0, 1, 0, 1]))
    assert metrics["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_aurc_ranks_samples_whose_probability_rounds_to_one():
    logits = torch.tensor([[200.0, 0], [100.0, 0]])
    right_first = classification_metrics(logits, torch.tensor([0, 1]))["aurc"]
    wrong_first = classification_metrics(logits, torch.tensor([1, 0]))["aurc"]
    assert (right_first, wrong_first) == (pytest.approx(0.25), pytest.approx(0.75))


def test_adaptive_ece_fills_every_bin_equally():
    # 30 samples in 15 bins of two: each pair holds one right and one wrong prediction, its gap is |0.5 - p|.
    odds = torch.arange(30) // 2 * 0.1 + 0.5 + torch.arange(30) * 1e-4
    logits = torch.stack([odds, torch.zeros(30)], 1)
    metrics = classification_metrics(logits, torch.arange(30) % 2)
    assert metrics["adaptive_ece"] == pytest.approx(float((odds.sigmoid() - 0.5).mean()), abs=1e-5)


def test_a_class_ruled_out_by_minus_infinity_is_fine():
    metrics = classification_metrics(torch.tensor([[0.0, -torch.inf], [1.0, 0.0]]), torch.tensor([0, 0]))
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_measured_in_float32(dtype):
    logits = torch.randn(500, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.arange(500) % 10
    assert classification_metrics(logits, labels) == classification_metrics(logits.float(), labels)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.tensor([[0.0, torch.nan]]), torch.tensor([0]), "logits of sample 0 are not finite"),
        (
            torch.tensor([[0.0, 1.0], [0.0, torch.inf]]),
            torch.tensor([0, 0]),
            "logits of sample 1 are not finite",
        ),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "label of sample 1 is 3, but the model has 3 classes"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "label of sample 0 is -1"),
        (torch.zeros(2, 3), torch.tensor([0]), r"got \[2, 3\] and \[1\]"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "N > 0"),
    ],
)
def test_input_that_cannot_be_measured_is_one_sentence(logits, labels, message):
    with pytest.raises(UserError, match=message):
        classification_metrics(logits, labels)


class Recorder(nn.Module):
    """Logits that reveal what came in: the mean, and whether the model was in training mode."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout(0.5)
        self.sizes = []

    def forward(self, image):
        self.sizes.append(len(image))
        mean = self.drop(image).mean((1, 2, 3)) * self.scale
        return torch.stack([mean, torch.full_like(mean, float(self.training))], 1)


@pytest.fixture
def samples():
    image = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 2, 2) * 25
    return Samples({"image": image.contiguous(), "label": torch.arange(10) % 2}, classes=["a", "b"])


def test_predict_feeds_float_images_in_order_in_eval_mode(samples):
    model = Recorder().train()
    logits, labels = predict(model, samples, batch_size=4)
    assert logits[:, 0].tolist() == pytest.approx([25 * i / 255 for i in range(10)])
    assert not logits[:, 1].any() and not logits.requires_grad
    assert model.sizes == [4, 4, 2]
    assert labels.tolist() == [0, 1] * 5


def test_predict_gives_every_module_its_own_mode_back(samples):
    model = Recorder().train()
    model.drop.eval()
    predict(model, samples)
    assert model.training and not model.drop.training


def test_predict_gives_the_mode_back_when_the_model_fails(samples):
    model = nn.Linear(7, 2).train()
    with pytest.raises(RuntimeError):
        predict(model, samples)
    assert model.training


def test_predict_hands_tokens_over_as_a_dict():
    class Text(nn.Module):
        def forward(self, tokens):
            return F.one_hot((tokens["input_ids"] * tokens["attention_mask"]).sum(1), 4).float()

    tokens = {"input_ids": torch.tensor([[1, 2], [1, 3]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    texts = Samples({"text": tokens, "label": torch.tensor([3, 1])}, classes=list("abcd"))
    assert ClassificationEvaluator(field="text")(Text(), texts)["accuracy"] == 1


def test_predict_names_a_missing_field_and_an_empty_split(samples):
    with pytest.raises(UserError, match="no field 'audio' to evaluate on, they have image, label, index"):
        predict(Recorder(), samples, field="audio")
    with pytest.raises(UserError, match="no samples"):
        predict(Recorder(), samples.select([]))

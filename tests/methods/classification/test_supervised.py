"""Supervised: cross-entropy, with the label smoothing that counts the true class.

A linear student on the rows of an identity matrix makes every logit a weight: logits_BC = weight_CB transposed.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck.errors import UserError
from limbeck.methods.classification.supervised import Supervised

B, C = 6, 4


def step(smoothing: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, its gradient into the logits [B, C], softmax [B, C], labels [B])."""
    torch.manual_seed(seed)
    student, labels = nn.Linear(B, C, bias=False), torch.randint(C, (B,))
    loss = Supervised(student, label_smoothing=smoothing).training_step(
        {"labelled": {"weak": torch.eye(B), "label": labels}}
    )["ce"]
    loss.backward()
    return loss.detach(), student.weight.grad.T, student.weight.detach().T.softmax(-1), labels


@settings(max_examples=25, deadline=None)
@given(smoothing=st.floats(0, 1), seed=st.integers(0, 1000))
def test_loss_and_gradient_are_those_of_the_smoothed_target(smoothing, seed):
    loss, gradient, softmax, labels = step(smoothing, seed)
    target = (1 - smoothing) * torch.eye(C)[labels] + smoothing / C
    torch.testing.assert_close(loss, -(target * softmax.log()).sum(-1).mean())
    torch.testing.assert_close(gradient, (softmax - target) / B, atol=1e-6, rtol=1e-4)


def test_without_smoothing_only_the_probability_of_the_label_counts():
    loss, _, softmax, labels = step(0.0, seed=3)
    torch.testing.assert_close(loss, -softmax[torch.arange(B), labels].log().mean())


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_smoothing_outside_of_0_to_1_is_refused_at_the_door(smoothing):
    with pytest.raises(UserError, match="label_smoothing is .*from 0 to 1"):
        Supervised(nn.Linear(2, 2), label_smoothing=smoothing)

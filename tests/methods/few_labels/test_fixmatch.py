"""FixMatch: who counts, by what it is divided, and where no gradient goes.

A linear student on the rows of an identity matrix makes every logit a weight (logits = weight transposed): rows 0..2
are the labelled views, 3..7 the weak and 8..12 the strong ones.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.methods.few_labels.fixmatch import FixMatch

B, U, C = 3, 5, 4
ROWS = B + 2 * U


def batch() -> dict[str, dict[str, Tensor]]:
    labelled, weak, strong = torch.eye(ROWS).split([B, U, U])
    return {"labelled": {"weak": labelled, "label": torch.arange(B)}, "unlabelled": {"weak": weak, "strong": strong}}


def student(seed: int, sharpness: float = 3.0) -> nn.Linear:
    torch.manual_seed(seed)
    net = nn.Linear(ROWS, C, bias=False)
    net.weight.data = torch.randn(C, ROWS) * sharpness
    return net


def looped(net: nn.Linear, threshold: float, target: str, probabilities_UC: Tensor | None = None) -> Tensor:
    """The unlabelled loss, sample by sample."""
    _, weak_UC, strong_UC = net.weight.detach().T.split([B, U, U])
    p_UC = weak_UC.softmax(-1) if probabilities_UC is None else probabilities_UC
    loss = torch.zeros(())
    for p_C, strong_C in zip(p_UC, strong_UC, strict=True):
        if p_C.max() >= threshold:
            goal = torch.eye(C)[p_C.argmax()] if target == "hard" else p_C
            loss += -(goal * strong_C.log_softmax(-1)).sum()
    return loss / U


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), threshold=st.floats(0, 1), target=st.sampled_from(["hard", "soft"]))
def test_losses_are_those_of_the_sample_by_sample_algorithm(seed, threshold, target):
    net = student(seed)
    losses = FixMatch(net, threshold=threshold, target=target).training_step(batch())
    torch.testing.assert_close(losses["unlabelled"].detach(), looped(net, threshold, target))
    torch.testing.assert_close(losses["ce"], F.cross_entropy(net.weight.T[:B], torch.arange(B)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), target=st.sampled_from(["hard", "soft"]))
def test_weak_views_get_no_gradient_and_strong_views_only_where_confident(seed, target):
    net = student(seed)
    FixMatch(net, threshold=0.8, target=target).training_step(batch())["unlabelled"].backward()
    labelled, weak, strong = net.weight.grad.T.split([B, U, U])
    confident = net.weight.detach().T[B : B + U].softmax(-1).amax(-1) >= 0.8
    assert not labelled.any() and not weak.any()
    assert torch.equal(strong.abs().sum(-1) > 0, confident)


def test_without_a_confident_sample_the_unlabelled_loss_and_its_gradient_are_zero():
    net = student(0, sharpness=0.1)
    loss = FixMatch(net).training_step(batch())["unlabelled"]
    loss.backward()
    assert loss == 0 and not net.weight.grad.any()


def test_a_sample_exactly_at_the_threshold_counts():
    net = student(0)
    confidence = net.weight.detach().T[B : B + U].softmax(-1).amax(-1)
    method = FixMatch(net, threshold=confidence.min().item())
    method.training_step(batch())
    assert method.logged["utilisation"] == 1


def test_the_unlabelled_weight_is_the_factor_of_that_term_only():
    assert FixMatch(student(0), unlabelled_weight=3.0).weights == {"unlabelled": 3.0}


def test_labels_of_unlabelled_samples_are_never_read():
    with_labels = batch()
    with_labels["unlabelled"]["label"] = torch.full((U,), 99)
    plain, other = FixMatch(student(0)).training_step(batch()), FixMatch(student(0)).training_step(with_labels)
    assert plain == other


def test_labelled_weak_and_strong_samples_share_the_statistics_of_one_forward():
    net = nn.Sequential(nn.BatchNorm1d(ROWS, momentum=1.0, affine=False), nn.Linear(ROWS, C))
    FixMatch(net).training_step(batch())
    assert net[0].num_batches_tracked == 1
    torch.testing.assert_close(net[0].running_mean, torch.full((ROWS,), 1 / ROWS))


def test_alignment_comes_before_threshold_and_target():
    net = student(1)
    p_UC = net.weight.detach().T[B : B + U].softmax(-1)
    aligned_UC = p_UC / p_UC.mean(0)
    aligned_UC /= aligned_UC.sum(-1, keepdim=True)
    threshold = 0.7
    assert not torch.equal(aligned_UC.amax(-1) >= threshold, p_UC.amax(-1) >= threshold)
    loss = FixMatch(net, threshold=threshold, target="soft", align=True).training_step(batch())["unlabelled"]
    torch.testing.assert_close(loss.detach(), looped(net, threshold, "soft", aligned_UC))


def test_what_ships_is_the_moving_average_of_the_weights():
    net = student(0)
    start = net.weight.detach().clone()
    method = FixMatch(net, ema_decay=0.9)
    net.weight.data += 1
    method.after_step()
    shipped = method.shipped()
    torch.testing.assert_close(shipped.weight, 0.9 * start + 0.1 * net.weight.detach())
    assert not shipped.weight.requires_grad
    assert method.parts()["student"] == [net.weight]


@pytest.mark.parametrize("threshold", [-0.1, 95.0])
def test_a_threshold_that_is_no_probability_is_refused_at_the_door(threshold):
    with pytest.raises(UserError, match="threshold"):
        FixMatch(student(0), threshold=threshold)

"""The shift, the reductions, and divergences token by token, against loops and hand-computed cases."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.losses import (
    entropy,
    jensen_shannon,
    kl_divergence,
    reduce_tokens,
    reverse_kl,
    shift,
    skew_kl,
    skew_reverse_kl,
    token_cross_entropy,
    token_divergence,
    token_entropy,
    token_soft_cross_entropy,
    total_variation,
)

B, L, V = 3, 6, 5
DIVERGENCES = {
    "forward": kl_divergence,
    "reverse": reverse_kl,
    "js": partial(jensen_shannon, beta=0.3),
    "skew": partial(skew_kl, skew=0.1),
    "skew_reverse": partial(skew_reverse_kl, skew=0.1),
    "total_variation": total_variation,
}


def case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's logits, and labels with -100 at random places (never at all of them)."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(B, L, V, generator=generator) for _ in range(2))
    labels = torch.randint(0, V, (B, L), generator=generator)
    labels[torch.rand(B, L, generator=generator) < 0.4] = -100
    labels[0, 0] = 1
    return student, teacher, labels


def test_place_i_is_scored_by_token_i_plus_one():
    logits, labels = torch.arange(24.0).view(2, 4, 3), torch.arange(8).view(2, 4)
    shifted, targets = shift(logits, labels)
    assert torch.equal(shifted, logits[:, :3]) and torch.equal(targets, labels[:, 1:])
    assert shifted.data_ptr() == logits.data_ptr()  # nothing of the size of the vocabulary is copied


def test_cross_entropy_after_the_shift_is_what_transformers_computes():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=L, n_embd=8, n_layer=1, n_head=2)).eval()
    _, _, labels = case(0)
    ids = labels.clamp(min=0)
    answer = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(token_cross_entropy(*shift(answer.logits, labels), reduction="token_mean"), answer.loss)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_reductions_are_those_of_the_loop(seed):
    items, _, labels = case(seed)
    items = items[..., 0]
    rows = [[float(x) for x, y in zip(row, truth, strict=True) if y != -100]
            for row, truth in zip(items, labels, strict=True)]  # fmt: skip
    tokens = [x for row in rows for x in row]
    means = [sum(row) / len(row) for row in rows if row]
    found = {
        r: float(reduce_tokens(items, labels, reduction=r)) for r in ("token_mean", "sequence_mean", "sequence_sum")
    }
    assert found["token_mean"] == pytest.approx(sum(tokens) / len(tokens), abs=1e-5)
    assert found["sequence_mean"] == pytest.approx(sum(means) / len(means), abs=1e-5)
    assert found["sequence_sum"] == pytest.approx(sum(tokens) / B, abs=1e-5)
    assert torch.equal(reduce_tokens(items, labels, reduction="none"), items.masked_fill(labels == -100, 0))


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_where_no_token_is_scored_the_loss_is_zero_with_zero_gradient(reduction):
    logits = torch.randn(2, 3, V, requires_grad=True)
    loss = token_cross_entropy(logits, torch.full((2, 3), -100), reduction=reduction)
    loss.backward()
    assert float(loss.detach()) == 0 and float(logits.grad.abs().sum()) == 0


def test_an_unknown_reduction_is_an_error_that_names_those_there_are():
    with pytest.raises(ValueError, match="token_mean, sequence_mean, sequence_sum"):
        reduce_tokens(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.long), reduction="mean")  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(DIVERGENCES)), temperature=st.floats(0.5, 4))
def test_a_token_divergence_is_the_mean_over_the_scored_rows(seed, name, temperature):
    student, teacher, labels = case(seed)
    kept = labels != -100
    rows = DIVERGENCES[name](student[kept], teacher[kept], temperature=temperature, scale_by_t2=True, reduction="mean")
    whole = token_divergence(
        DIVERGENCES[name], student, teacher, labels, temperature=temperature, scale_by_t2=True, reduction="token_mean"
    )
    torch.testing.assert_close(whole, rows, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_soft_cross_entropy_is_forward_kl_plus_the_targets_entropy(seed):
    student, teacher, labels = case(seed)
    soft = token_soft_cross_entropy(student, teacher.softmax(-1), labels, reduction="token_mean")
    kl = token_divergence(kl_divergence, student, teacher, labels, reduction="token_mean")
    torch.testing.assert_close(soft, kl + token_entropy(teacher, labels, reduction="token_mean"), rtol=1e-4, atol=1e-5)


def test_one_hot_targets_make_the_soft_cross_entropy_the_hard_one():
    student, _, labels = case(1)
    target = F.one_hot(labels.clamp(min=0), V).float()
    torch.testing.assert_close(
        token_soft_cross_entropy(student, target, labels, reduction="token_mean"),
        token_cross_entropy(student, labels, reduction="token_mean"),
    )


def test_entropy_of_even_logits_is_the_log_of_the_vocabulary():
    labels = torch.zeros(2, 3, dtype=torch.long)
    assert float(token_entropy(torch.zeros(2, 3, V), labels, reduction="token_mean")) == pytest.approx(math.log(V))
    torch.testing.assert_close(entropy(torch.zeros(1, V), reduction="mean"), torch.tensor(math.log(V)))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_words_that_both_rule_out_leave_values_and_gradients_finite(name):
    student, teacher, labels = case(2)
    student[..., 0] = teacher[..., 0] = -torch.inf
    student.requires_grad_()
    loss = token_divergence(DIVERGENCES[name], student, teacher, labels, reduction="token_mean")
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_total_variation_is_half_the_distance_and_one_for_disjoint_words():
    student, teacher = torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([[0.0, 50.0, 0.0]])
    assert float(total_variation(student, teacher, scale_by_t2=False, reduction="mean")) == pytest.approx(1.0)
    half = total_variation(torch.log(torch.tensor([[0.5, 0.3, 0.2]])), torch.log(torch.tensor([[0.2, 0.3, 0.5]])),
                           scale_by_t2=False, reduction="mean")  # fmt: skip
    assert float(half) == pytest.approx(0.3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_gradient_of_total_variation_is_the_one_that_its_docstring_gives(seed):
    student, teacher, _ = case(seed)
    student = student.double().requires_grad_()
    total_variation(student, teacher.double(), scale_by_t2=False, reduction="sum").backward()
    q, p = student.detach().softmax(-1), teacher.double().softmax(-1)
    sign = (q - p).sign()
    torch.testing.assert_close(student.grad, 0.5 * q * (sign - (q * sign).sum(-1, keepdim=True)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    student, teacher, labels = case(3)
    found = token_divergence(kl_divergence, student.to(dtype), teacher.to(dtype), labels, reduction="token_mean")
    exact = token_divergence(
        kl_divergence, student.to(dtype).float(), teacher.to(dtype).float(), labels, reduction="token_mean"
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)

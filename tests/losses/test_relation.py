"""Facts about losses on relations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.losses import (
    attention_relation,
    attention_transfer,
    channel_wise,
    gram,
    rkd_angle,
    rkd_distance,
    similarity_matrix,
    similarity_preserving,
    split_heads,
)

several = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
OnSamples = Callable[[Tensor, Tensor], Tensor]
on_samples = pytest.mark.parametrize("loss", [similarity_preserving, rkd_distance, rkd_angle])

MAPS: dict[str, OnSamples] = {
    "attention_transfer": partial(attention_transfer, reduction="sum"),
    "channel_wise": partial(channel_wise, temperature=4.0, scale_by_t2=True, reduction="sum"),
}
HEADS: dict[str, OnSamples] = {"attention_relation": partial(attention_relation, reduction="sum")}
SAMPLES: dict[str, OnSamples] = {
    "similarity_preserving": similarity_preserving,
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
}
EVERY = [(loss, (3, 4)) for loss in SAMPLES.values()] + [(loss, (2, 3, 2, 2)) for loss in (MAPS | HEADS).values()]
every_loss = pytest.mark.parametrize(("loss", "shape"), EVERY, ids=list(SAMPLES | MAPS | HEADS))


def features(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(seed: int, size: int) -> Tensor:
    return torch.linalg.qr(features(seed, size, size)).Q


@every_loss
@several
@given(seed=seeds)
def test_zero_at_equality_and_positive_otherwise(loss: OnSamples, shape: tuple[int, ...], seed: int) -> None:
    a, b = features(seed, *shape), features(seed + 1, *shape)
    assert loss(a, a).abs().item() < 1e-6
    assert loss(a, b).item() > 0


@every_loss
def test_gradients_agree_with_finite_differences(loss: OnSamples, shape: tuple[int, ...]) -> None:
    a = features(0, *shape, dtype=torch.float64).requires_grad_()
    b = features(1, *shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(loss, (a, b))


@every_loss
def test_float16_and_autocast_are_computed_in_float32(loss: OnSamples, shape: tuple[int, ...]) -> None:
    a, b = features(0, *shape).half(), features(1, *shape).half()
    expected = loss(a.float(), b.float())
    assert torch.equal(loss(a, b), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(a, b), expected)


@every_loss
def test_extreme_and_zero_features_have_finite_values_and_gradients(loss: OnSamples, shape: tuple[int, ...]) -> None:
    for student in (features(0, *shape) * 1e4, torch.zeros(shape), torch.ones(shape)):
        student = student.requires_grad_()
        value = loss(student, features(1, *shape) * 1e4)
        value.backward()
        assert value.isfinite() and student.grad.isfinite().all()


@on_samples
@several
@given(seed=seeds)
def test_unchanged_by_a_permutation_of_the_batch_and_symmetric(loss: OnSamples, seed: int) -> None:
    a, b = features(seed, 6, 4), features(seed + 1, 6, 5)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(loss(a, b), loss(a[order], b[order]), atol=1e-6)
    assert torch.allclose(loss(a, b), loss(b, a), atol=1e-6)


@on_samples
@several
@given(seed=seeds, scale=st.floats(0.1, 10))
def test_zero_between_a_set_and_its_rotated_and_scaled_copy(loss: OnSamples, seed: int, scale: float) -> None:
    a = features(seed, 6, 4)
    assert loss(scale * a @ rotation(seed, 4), a).item() < 1e-8


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_rkd_is_unchanged_by_a_shift_and_similarity_preserving_is_not(loss: OnSamples) -> None:
    a, b = features(0, 6, 4), features(1, 6, 4)
    assert torch.allclose(loss(a + 3.0, b), loss(a, b), atol=1e-6)
    assert not torch.allclose(similarity_preserving(a + 3.0, b), similarity_preserving(a, b), atol=1e-3)


def test_rkd_distance_equals_a_loop_over_pairs() -> None:
    a, b = features(0, 5, 4), features(1, 5, 3)

    def distances(x: Tensor) -> Tensor:
        pairs = torch.tensor([[(x[i] - x[j]).norm() for j in range(5)] for i in range(5)])
        return pairs / pairs[pairs > 0].mean()

    assert torch.allclose(rkd_distance(a, b), F.smooth_l1_loss(distances(a), distances(b)), atol=1e-6)


def test_rkd_angle_equals_a_loop_over_triplets() -> None:
    a, b = features(0, 4, 4), features(1, 4, 3)

    def angle(x: Tensor, i: int, j: int, k: int) -> Tensor:
        return F.cosine_similarity(x[i] - x[j], x[k] - x[j], dim=0)

    triplets = [(i, j, k) for i in range(4) for j in range(4) for k in range(4)]
    each = [F.smooth_l1_loss(angle(a, *ids), angle(b, *ids)) for ids in triplets]
    assert torch.allclose(rkd_angle(a, b), torch.stack(each).mean(), atol=1e-6)


def test_similarity_preserving_equals_its_equation() -> None:
    a, b = features(0, 5, 2, 3, 3), features(1, 5, 4, 2, 2)
    g_a, g_b = (F.normalize(x.flatten(1) @ x.flatten(1).T) for x in (a, b))
    assert torch.allclose(similarity_preserving(a, b), (g_a - g_b).square().sum() / 25, atol=1e-6)


@on_samples
def test_samples_that_differ_in_number_are_refused(loss: OnSamples) -> None:
    with pytest.raises(ValueError, match="3 samples but the target 4"):
        loss(torch.ones(3, 2), torch.ones(4, 2))


def test_gram_is_symmetric_with_squared_lengths_on_the_diagonal() -> None:
    x = features(0, 2, 5, 3)
    assert torch.allclose(gram(x), gram(x).mT)
    assert torch.allclose(gram(x).diagonal(dim1=1, dim2=2), x.square().sum(-1), atol=1e-6)


@several
@given(seed=seeds)
def test_similarity_matrices_equal_their_definitions(seed: int) -> None:
    x, y = features(seed, 4, 3), features(seed + 1, 5, 3)
    assert torch.allclose(similarity_matrix(x, y, metric="dot"), x @ y.T)
    cosine = F.cosine_similarity(x[:, None], y[None], dim=-1)
    assert torch.allclose(similarity_matrix(x, y, metric="cosine"), cosine, atol=1e-5)
    distance = (x[:, None] - y[None]).norm(dim=-1)
    assert torch.allclose(similarity_matrix(x, y, metric="euclidean"), distance, atol=1e-5)


def test_euclidean_distance_to_itself_is_exactly_zero_with_finite_gradient() -> None:
    x = (features(0, 40, 8) * 100).requires_grad_()
    distance = similarity_matrix(x, metric="euclidean")
    distance.sum().backward()
    assert torch.equal(distance.diagonal(), torch.zeros(40)) and x.grad.isfinite().all()


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="'manhattan'"):
        similarity_matrix(torch.ones(2, 2), metric="manhattan")  # type: ignore[arg-type]


def test_attention_transfer_equals_the_official_code() -> None:
    a, b = features(0, 3, 4, 5, 5), features(1, 3, 7, 5, 5)
    at_a, at_b = (F.normalize(x.pow(2).mean(1).flatten(1)) for x in (a, b))
    assert torch.allclose(attention_transfer(a, b, reduction="elementmean"), (at_a - at_b).pow(2).mean(), atol=1e-7)


def test_attention_transfer_is_unchanged_by_scale_and_sign() -> None:
    a, b = features(0, 3, 4, 5, 5), features(1, 3, 7, 5, 5)
    value = attention_transfer(a, b, power=1.0, reduction="none")
    assert torch.allclose(value, attention_transfer(-3 * a, 0.5 * b, power=1.0, reduction="none"), atol=1e-6)


def test_attention_transfer_refuses_maps_of_different_sizes() -> None:
    with pytest.raises(ValueError, match="resize_features"):
        attention_transfer(torch.ones(1, 2, 4, 4), torch.ones(1, 2, 2, 2), reduction="mean")


def test_channel_wise_softmax_runs_over_positions_and_not_over_channels() -> None:
    a, b = features(0, 2, 3, 4, 4), features(1, 2, 3, 4, 4)
    loss = partial(channel_wise, temperature=4.0, scale_by_t2=True, reduction="mean")
    p, log_q = (b.flatten(2) / 4).softmax(-1), (a.flatten(2) / 4).log_softmax(-1)
    expected = 16 * (p * (p.log() - log_q)).sum() / (2 * 3)
    assert torch.allclose(loss(a, b), expected, atol=1e-6)
    assert torch.allclose(loss(a + features(2, 2, 3, 1, 1), b), expected, atol=1e-5)
    assert not torch.allclose(loss(a + features(2, 2, 1, 4, 4), b), expected, atol=1e-3)


def test_attention_relation_equals_a_loop_over_samples_heads_and_real_tokens() -> None:
    a, b = features(0, 2, 3, 4, 5), features(1, 2, 3, 4, 8)
    lengths = [4, 2]
    tokens = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rows = []
    for sample, length in enumerate(lengths):
        for head in range(3):
            x, y = a[sample, head, :length], b[sample, head, :length]
            log_q, log_p = (x @ x.T / 5**0.5).log_softmax(-1), (y @ y.T / 8**0.5).log_softmax(-1)
            rows.append((log_p.exp() * (log_p - log_q)).sum(-1))
    value = attention_relation(a, b, tokens_BT=tokens, reduction="mean")
    assert torch.allclose(value, torch.cat(rows).mean(), atol=1e-6)


def test_attention_relation_does_not_see_padding() -> None:
    a, b = features(0, 2, 3, 4, 5), features(1, 2, 3, 4, 5)
    tokens = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])
    loss = partial(attention_relation, tokens_BT=tokens, reduction="mean")
    changed = torch.where(tokens.bool()[:, None, :, None], a, a + 100)
    student = changed.requires_grad_()
    value = loss(student, b)
    value.backward()
    assert torch.allclose(value, loss(a, b)) and student.grad.isfinite().all()
    assert student.grad[0, :, 3].abs().sum() == 0 and student.grad[1].abs().sum() == 0


def test_attention_relation_with_keys_compares_the_attention_itself() -> None:
    q, k, q_t, k_t = (features(i, 2, 3, 4, 5) for i in range(4))
    p = (q_t @ k_t.mT / 5**0.5).softmax(-1)
    log_q = (q @ k.mT / 5**0.5).log_softmax(-1)
    value = attention_relation(q, q_t, student_keys_BATD=k, target_keys_BATE=k_t, reduction="none")
    assert torch.allclose(value, (p * (p.log() - log_q)).sum(-1), atol=1e-5)


def test_attention_relation_is_unchanged_by_a_rotation() -> None:
    a, b = features(0, 2, 3, 4, 5), features(1, 2, 3, 4, 5)
    loss = partial(attention_relation, reduction="none")
    assert torch.allclose(loss(a @ rotation(2, 5), b), loss(a, b), atol=1e-5)


def test_attention_relation_refuses_heads_that_differ_and_keys_of_one_side() -> None:
    with pytest.raises(ValueError, match="split_heads"):
        attention_relation(torch.ones(1, 2, 3, 4), torch.ones(1, 4, 3, 4), reduction="mean")
    with pytest.raises(ValueError, match="one model only"):
        one = torch.ones(1, 2, 3, 4)
        attention_relation(one, one, student_keys_BATD=one, reduction="mean")


def test_split_heads_puts_consecutive_channels_into_one_head() -> None:
    x = torch.arange(12.0).reshape(1, 2, 6)
    assert split_heads(x, 3).tolist() == [[[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]]
    with pytest.raises(ValueError, match="cannot be split into 4 heads"):
        split_heads(x, 4)

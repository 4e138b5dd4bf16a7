"""Facts about the InfoNCE family, each against a plain loop."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.losses import info_nce, nt_xent, supervised_contrastive

several = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


def vectors(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def looped_nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Mean over the 2B anchors, written as in the paper."""
    out = F.normalize(torch.cat([first, second]))
    count = len(first)
    losses = []
    for i in range(2 * count):
        partner = (i + count) % (2 * count)
        others = sum((out[i] @ out[k] / temperature).exp() for k in range(2 * count) if k != i)
        losses.append(-((out[i] @ out[partner] / temperature).exp() / others).log())
    return torch.stack(losses).mean()


def looped_supervised(
    queries: Tensor, keys: Tensor, y: list[int], z: list[int], own: int | None, t: float
) -> list[float]:
    losses = []
    for i, query in enumerate(queries):
        others = [j for j in range(len(keys)) if own is None or j != i + own]
        total = sum(math.exp(float(query @ keys[j]) / t) for j in others)
        positives = [math.log(math.exp(float(query @ keys[j]) / t) / total) for j in others if z[j] == y[i]]
        losses.append(-sum(positives) / len(positives) if positives else 0.0)
    return losses


@several
@given(seed=seeds, temperature=st.floats(0.05, 2))
def test_info_nce_equals_cross_entropy_with_the_diagonal_as_class(seed: int, temperature: float) -> None:
    query, key = vectors(seed, 5, 4), vectors(seed + 1, 5, 4)
    similarity = F.normalize(query) @ F.normalize(key).T / temperature
    value = info_nce(query, key, temperature=temperature, normalize=True, reduction="mean")
    assert torch.allclose(value, F.cross_entropy(similarity, torch.arange(5)), atol=1e-5)


def test_info_nce_with_a_queue_equals_moco_with_class_zero() -> None:
    query, key, queue = vectors(0, 5, 4), vectors(1, 5, 4), vectors(2, 9, 4)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / 0.07
    only_own = torch.cat([torch.eye(5), torch.ones(5, 9)], 1).bool()
    value = info_nce(
        query, key, temperature=0.07, normalize=False, queue_QD=queue, candidates_BM=only_own, reduction="none"
    )
    expected = F.cross_entropy(logits, torch.zeros(5, dtype=torch.long), reduction="none")
    assert torch.allclose(value, expected, rtol=1e-4, atol=1e-4)


def test_info_nce_of_one_process_with_gathered_keys_is_its_part_of_the_whole() -> None:
    query, key = vectors(0, 6, 4), vectors(1, 6, 4)
    loss = partial(info_nce, temperature=0.1, normalize=True, reduction="none")
    whole = loss(query, key)
    parts = torch.cat([loss(query[:3], key, offset=0), loss(query[3:], key, offset=3)])
    assert torch.allclose(whole, parts, atol=1e-6)


def test_info_nce_kinds_of_target_agree_where_they_mean_the_same() -> None:
    query, key = vectors(0, 4, 3), vectors(1, 6, 3)
    loss = partial(info_nce, query, key, temperature=0.2, normalize=True, reduction="none")
    own = torch.eye(4, 6, dtype=torch.bool)
    assert torch.allclose(loss(), loss(positives_BM=own), atol=1e-6)
    assert torch.allclose(loss(), loss(soft_targets_BM=own.float()), atol=1e-6)


def test_info_nce_with_soft_targets_is_at_least_their_entropy_and_reaches_it() -> None:
    query, key = vectors(0, 4, 3), vectors(1, 6, 3)
    same = (F.normalize(query) @ F.normalize(key).T / 0.5).softmax(1)
    loss = partial(info_nce, query, key, temperature=0.5, normalize=True, reduction="none")
    entropy = -(same * same.log()).sum(1)
    assert torch.allclose(loss(soft_targets_BM=same), entropy, atol=1e-5)
    other = vectors(2, 4, 6).softmax(1)
    assert (loss(soft_targets_BM=other) > -(other * other.log()).sum(1)).all()


def test_a_query_without_a_positive_has_no_part_in_the_mean() -> None:
    query, key = vectors(0, 3, 4), vectors(1, 3, 4)
    positives = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]])
    loss = partial(info_nce, query, key, temperature=0.2, normalize=True, positives_BM=positives)
    each = loss(reduction="none")
    assert each[1] == 0 and torch.allclose(loss(reduction="mean"), each.sum() / 2)


def test_columns_that_are_no_candidates_get_no_gradient() -> None:
    query, key = vectors(0, 3, 4), vectors(1, 5, 4).requires_grad_()
    candidates = torch.tensor([[1, 1, 1, 0, 1]] * 3)
    info_nce(query, key, temperature=0.2, normalize=True, candidates_BM=candidates, reduction="mean").backward()
    assert key.grad[3].abs().sum() == 0 and key.grad[4].abs().sum() > 0


def test_no_gradient_reaches_the_queue() -> None:
    query, queue = vectors(0, 3, 4).requires_grad_(), vectors(2, 5, 4).requires_grad_()
    info_nce(query, query, temperature=0.2, normalize=True, queue_QD=queue, reduction="mean").backward()
    assert queue.grad is None and query.grad.abs().sum() > 0


@several
@given(seed=seeds, count=st.integers(1, 6))
def test_nt_xent_equals_the_loop_of_the_paper(seed: int, count: int) -> None:
    first, second = vectors(seed, count, 4), vectors(seed + 1, count, 4)
    loss = partial(nt_xent, first, second, temperature=0.5, normalize=True, reduction="mean")
    expected = looped_nt_xent(first, second, 0.5)
    assert torch.allclose(loss(halves="mean"), expected, atol=1e-5)
    assert torch.allclose(loss(halves="sum"), 2 * expected, atol=1e-5)


def test_nt_xent_of_a_single_sample_is_zero() -> None:
    value = nt_xent(
        vectors(0, 1, 4), vectors(1, 1, 4), temperature=0.3, normalize=True, halves="mean", reduction="mean"
    )
    assert value.item() == 0


def test_nt_xent_is_symmetric_in_the_views_and_unchanged_by_scale() -> None:
    first, second = vectors(0, 5, 4), vectors(1, 5, 4)
    loss = partial(nt_xent, temperature=0.3, normalize=True, halves="mean", reduction="none")
    assert torch.allclose(loss(first, second), loss(second, first), atol=1e-6)
    assert torch.allclose(loss(first, second), loss(7 * first, 0.1 * second), atol=1e-5)


def test_nt_xent_of_one_process_with_gathered_keys_is_its_part_of_the_whole() -> None:
    first, second = vectors(0, 6, 4), vectors(1, 6, 4)
    loss = partial(nt_xent, temperature=0.3, normalize=True, halves="sum", reduction="none")
    keys = {"first_keys_KD": first, "second_keys_KD": second}
    parts = [loss(first[i : i + 2], second[i : i + 2], offset=i, **keys) for i in (0, 2, 4)]
    assert torch.allclose(loss(first, second), torch.cat(parts), atol=1e-6)


@several
@given(seed=seeds, own=st.sampled_from([None, 0, 2]))
def test_supervised_contrastive_equals_the_loop(seed: int, own: int | None) -> None:
    keys = F.normalize(vectors(seed, 7, 4))
    start = own or 0
    queries = keys[start : start + 4] if own is not None else F.normalize(vectors(seed + 1, 4, 4))
    z = torch.randint(3, (7,), generator=torch.Generator().manual_seed(seed))
    y = z[start : start + 4]
    loss = partial(supervised_contrastive, queries, keys, y, z, own_offset=own, temperature=0.3, normalize=False)
    expected = torch.tensor(looped_supervised(queries, keys, y.tolist(), z.tolist(), own, 0.3))
    assert torch.allclose(loss(reduction="none"), expected, atol=1e-4)
    with_positive = (expected > 0).sum().clamp(min=1)
    assert torch.allclose(loss(reduction="mean"), expected.sum() / with_positive, atol=1e-4)


def test_supervised_contrastive_with_each_class_once_is_zero_without_nan() -> None:
    x = vectors(0, 4, 3).requires_grad_()
    labels = torch.arange(4)
    value = supervised_contrastive(
        x, x, labels, labels, own_offset=0, temperature=0.1, normalize=True, reduction="mean"
    )
    value.backward()
    assert value.item() == 0 and torch.equal(x.grad, torch.zeros_like(x))


def test_supervised_contrastive_of_two_views_with_distinct_labels_is_nt_xent() -> None:
    first, second = vectors(0, 5, 4), vectors(1, 5, 4)
    both, labels = torch.cat([first, second]), torch.arange(5).repeat(2)
    supervised = supervised_contrastive(
        both, both, labels, labels, own_offset=0, temperature=0.3, normalize=True, reduction="mean"
    )
    paired = nt_xent(first, second, temperature=0.3, normalize=True, halves="mean", reduction="mean")
    assert torch.allclose(supervised, paired, atol=1e-5)


LABELS = torch.tensor([0, 1, 0, 1])
EVERY = {
    "info_nce": partial(info_nce, normalize=True, reduction="mean"),
    "nt_xent": partial(nt_xent, normalize=True, halves="mean", reduction="mean"),
    "supervised": lambda q, k, temperature: supervised_contrastive(
        q, k, LABELS, LABELS, own_offset=None, temperature=temperature, normalize=True, reduction="mean"
    ),
}
every_loss = pytest.mark.parametrize("name", EVERY)


@every_loss
def test_gradients_agree_with_finite_differences(name: str) -> None:
    query, key = (vectors(i, 4, 3, dtype=torch.float64).requires_grad_() for i in range(2))
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, t: EVERY[name](q, k, temperature=t), (query, key, temperature))


@every_loss
def test_float16_and_autocast_are_computed_in_float32(name: str) -> None:
    query, key = vectors(0, 4, 8).half(), vectors(1, 4, 8).half()
    expected = EVERY[name](query.float(), key.float(), temperature=0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = EVERY[name](query, key, temperature=0.07)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


@every_loss
def test_tiny_temperatures_and_zero_vectors_have_finite_values_and_gradients(name: str) -> None:
    query = torch.cat([vectors(0, 3, 8) * 1e4, torch.zeros(1, 8)]).requires_grad_()
    value = EVERY[name](query, vectors(1, 4, 8), temperature=1e-4)
    value.backward()
    assert value.isfinite() and query.grad.isfinite().all()


@every_loss
def test_a_temperature_of_zero_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        EVERY[name](vectors(0, 4, 3), vectors(1, 4, 3), temperature=0.0)


def test_an_offset_without_room_and_two_kinds_of_target_are_refused() -> None:
    query, key = vectors(0, 3, 4), vectors(1, 4, 4)
    loss = partial(info_nce, query, key, temperature=0.1, normalize=True, reduction="mean")
    with pytest.raises(ValueError, match="3 queries at offset 2 do not fit 4 keys"):
        loss(offset=2)
    with pytest.raises(ValueError, match="one kind of target"):
        loss(positives_BM=torch.ones(3, 4), soft_targets_BM=torch.ones(3, 4))

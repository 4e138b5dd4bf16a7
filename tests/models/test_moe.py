"""Routers: ties, gathering by index, shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import UserError
from limbeck.models.moe import DenseGateNet, GateNet, TopKRouter, pick, shares, top_k


def test_of_equal_scores_the_smaller_number_comes_first():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert top_k(scores, 2).index_BK.tolist() == [[1, 2], [0, 1]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 4), dense=st.booleans())
def test_picking_by_index_equals_a_loop_over_samples(seed, k, dense):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 5, 3, *([2, 2] if dense else []), generator=generator)
    choice = top_k(torch.randn(5, 4, generator=generator), k)
    looped = torch.stack([torch.stack([values[choice.index_BK[b, r], b] for b in range(5)]) for r in range(k)])
    assert torch.equal(pick(values, choice.index_BK), looped)
    assert (choice.weight_BK.diff(dim=1) <= 0).all()


def test_shares_count_the_picks():
    index = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 1]])
    assert shares(index, 5).tolist() == [3 / 8, 3 / 8, 1 / 8, 1 / 8, 0]


def test_the_gate_is_linear_and_has_the_papers_sizes():
    torch.manual_seed(0)
    gate, x, y = GateNet(10, 4), torch.randn(3, 10), torch.randn(3, 10)
    assert (gate.inner.out_features, gate.out.out_features) == (20, 4)
    torch.testing.assert_close(gate(x + y) + gate(torch.zeros(3, 10)), gate(x) + gate(y))
    assert DenseGateNet(10, 4)(torch.randn(3, 10, 7, 6)).shape == (3, 4)


def test_router_weights_sum_to_one_and_only_allowed_experts_are_picked():
    torch.manual_seed(0)
    router = TopKRouter(6, 5, k=2)
    logits, choice = router(torch.randn(40, 6), torch.tensor([True, False, True, True, False]))
    torch.testing.assert_close(choice.weight_BK.sum(1), torch.ones(40))
    assert set(choice.index_BK.unique().tolist()) <= {0, 2, 3} and torch.isneginf(logits[:, [1, 4]]).all()
    _, plain = TopKRouter(6, 5, k=2, renormalise=False)(torch.randn(40, 6))
    assert (plain.weight_BK.sum(1) < 1).all()


def test_jitter_acts_in_training_only():
    torch.manual_seed(0)
    router, x = TopKRouter(6, 5, jitter=0.1), torch.randn(4, 6)
    assert not torch.equal(router(x)[0], router(x)[0])
    router.eval()
    assert torch.equal(router(x)[0], router(x)[0])


def test_k_must_fit_the_experts():
    for make in (lambda: top_k(torch.zeros(2, 3), 4), lambda: TopKRouter(6, 3, k=0)):
        with pytest.raises(UserError, match="k is"):
            make()

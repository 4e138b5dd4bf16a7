"""The K likeliest classes: what is kept, what is left, and what they are filled up to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.models import TopK


@given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 10**6), st.floats(0.1, 30))
@settings(max_examples=25, deadline=None)
def test_kept_and_left_mass_are_those_of_the_softmax(classes, k, seed, scale):
    k = min(k, classes)
    logits = scale * torch.randn(4, 3, classes, generator=torch.Generator().manual_seed(seed))
    top, p = TopK.of(logits, k), logits.softmax(-1)
    best, ids = p.topk(k)
    torch.testing.assert_close(top.log_probs.exp(), best, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(top.rest, 1 - best.sum(-1), atol=1e-5, rtol=1e-3)
    assert torch.equal(top.ids, logits.topk(k).indices)
    spread = top.dense("spread")
    torch.testing.assert_close(spread.exp().sum(-1), torch.ones(4, 3), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(spread.gather(-1, top.ids), top.log_probs)
    ignored = top.dense("ignore").exp()
    torch.testing.assert_close(ignored.sum(-1), torch.ones(4, 3), atol=1e-5, rtol=1e-5)
    assert int((ignored > 0).sum(-1).max()) <= k


def test_all_classes_kept_give_the_distribution_back():
    logits = torch.randn(5, 7)
    torch.testing.assert_close(TopK.of(logits, 7).dense(), logits.log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_spread_gives_every_other_class_the_same_share():
    dense = TopK.of(torch.tensor([[3.0, 1.0, 0.0, -1.0]]), 1).dense().exp()[0]
    torch.testing.assert_close(dense[1:], dense[1].expand(3))


def test_cutting_moves_mass_to_the_rest():
    logits = torch.randn(5, 9)
    cut, direct = TopK.of(logits, 6).cut(2), TopK.of(logits, 2)
    assert torch.equal(cut.ids, direct.ids)
    torch.testing.assert_close(cut.rest, direct.rest, atol=1e-6, rtol=1e-5)


def test_a_k_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="1..4"):
        TopK.of(torch.randn(2, 4), 5)
    with pytest.raises(ValueError, match="2 were kept"):
        TopK.of(torch.randn(2, 4), 2).cut(3)

"""Facts about bands of confidence."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.labels import HARD, IMPORTANT, UNINFORMATIVE, confidence_bands, keep_median

several = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
limits = st.floats(0, 1)


def scores(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_bands_are_closed_where_the_paper_closes_them() -> None:
    bands = confidence_bands(torch.tensor([0.0, 0.04, 0.05, 0.14, 0.15, 0.95, 0.96]), 0.05, 0.15, 0.95)
    assert bands.tolist() == [UNINFORMATIVE] * 2 + [HARD] * 2 + [IMPORTANT] * 2 + [UNINFORMATIVE]


@several
@given(seed=seeds)
def test_limits_of_0_0_1_keep_every_label(seed: int) -> None:
    values = torch.cat([scores(seed, 40), torch.tensor([0.0, 1.0])])
    assert (confidence_bands(values, 0.0, 0.0, 1.0) == IMPORTANT).all()


@several
@given(seed=seeds)
def test_a_middle_above_1_makes_every_item_hard(seed: int) -> None:
    values = torch.cat([scores(seed, 40), torch.tensor([0.0, 1.0])])
    assert (confidence_bands(values, 0.0, 1.01, 1.0) == HARD).all()


@several
@given(seed=seeds, low=limits, middle=limits, top=limits, higher=limits)
def test_raising_the_middle_only_turns_important_items_hard(seed, low, middle, top, higher) -> None:
    values = scores(seed, 60)
    before = confidence_bands(values, low, middle, top)
    after = confidence_bands(values, low, max(middle, higher), top)
    changed = before != after
    assert (before[changed] == IMPORTANT).all() and (after[changed] == HARD).all()


@several
@given(seed=seeds, low=limits, middle=limits, top=limits, other=limits)
def test_raising_low_or_lowering_top_only_drops(seed, low, middle, top, other) -> None:
    values = scores(seed, 60)
    before = confidence_bands(values, low, middle, top)
    for after in (
        confidence_bands(values, max(low, other), middle, top),
        confidence_bands(values, low, middle, min(top, other)),
    ):
        assert (after[before != after] == UNINFORMATIVE).all()


def test_a_sample_that_would_lose_everything_keeps_its_median_and_the_others_stay() -> None:
    values = torch.tensor([[0.01, 0.03, 0.02], [0.99, 0.97, 0.98], [0.01, 0.5, 0.99]])
    bands = keep_median(confidence_bands(values, 0.05, 0.15, 0.95), values, 0.15)
    assert bands.tolist() == [
        [UNINFORMATIVE, UNINFORMATIVE, HARD],
        [UNINFORMATIVE, UNINFORMATIVE, IMPORTANT],
        [UNINFORMATIVE, IMPORTANT, UNINFORMATIVE],
    ]


@several
@given(seed=seeds, low=limits, middle=limits, top=limits, versions=st.integers(1, 6))
def test_every_sample_keeps_at_least_one(seed, low, middle, top, versions) -> None:
    values = scores(seed, 20, versions)
    bands = keep_median(confidence_bands(values, low, middle, top), values, middle)
    assert (bands != UNINFORMATIVE).any(1).all()

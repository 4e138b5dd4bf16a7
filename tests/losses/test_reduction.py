"""Facts about the one definition of reductions, weights and masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses.reduction import Reduction, reduce

ITEMS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
MASK = torch.tensor([[True, True, False], [False, False, True]])


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("sum", 9.0), ("mean", 3.0), ("batchmean", 4.5), ("elementmean", 0.3)],
)
def test_each_reduction_divides_by_what_the_table_says(reduction: Reduction, expected: float) -> None:
    assert reduce(ITEMS, reduction=reduction, mask=MASK, elements=10).item() == pytest.approx(expected)


def test_none_keeps_the_shape_and_zeroes_what_is_masked() -> None:
    assert reduce(ITEMS, reduction="none", mask=MASK).tolist() == [[1, 2, 0], [0, 0, 6]]


def test_weights_are_not_part_of_the_divisor() -> None:
    assert reduce(ITEMS, reduction="mean", weight=torch.full((2, 3), 2.0)).item() == 7.0


def test_one_weight_or_mask_a_sample_covers_all_of_its_positions() -> None:
    assert reduce(ITEMS, reduction="none", weight=torch.tensor([1.0, 10.0])).tolist() == [[1, 2, 3], [40, 50, 60]]
    assert reduce(ITEMS, reduction="mean", mask=torch.tensor([True, False])).item() == 2.0


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "elementmean"])
def test_nothing_kept_gives_zero_with_zero_gradient(reduction: Reduction) -> None:
    items = ITEMS.clone().requires_grad_()
    value = reduce(items, reduction=reduction, mask=torch.zeros(2, 3), elements=4)
    value.backward()
    assert value.item() == 0 and torch.equal(items.grad, torch.zeros(2, 3))


def test_a_masked_infinity_does_not_reach_the_value() -> None:
    items = torch.tensor([1.0, torch.inf, torch.nan])
    assert reduce(items, reduction="mean", mask=torch.tensor([1, 0, 0])).item() == 1.0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_mean_of_kept_items_equals_boolean_indexing(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    items = torch.rand(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) > 0.4
    expected = items[mask].mean() if mask.any() else torch.zeros(())
    assert torch.allclose(reduce(items, reduction="mean", mask=mask), expected)


def test_a_weight_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(3,\) but the items have shape \(2, 3\)"):
        reduce(ITEMS, reduction="mean", weight=torch.ones(3))


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of none, mean"):
        reduce(ITEMS, reduction="avg")  # type: ignore[arg-type]


def test_elementmean_is_refused_where_items_have_no_elements() -> None:
    with pytest.raises(ValueError, match='use "mean"'):
        reduce(ITEMS, reduction="elementmean")

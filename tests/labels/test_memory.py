"""Facts about predictions remembered by sample."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.labels import PredictionTable, one_hot

LABELS = torch.tensor([2, 0, 1, 1, 2, 0])


def probabilities(seed: int, *shape: int) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).softmax(-1)


def test_every_row_starts_as_the_one_hot_label() -> None:
    table = PredictionTable(LABELS, 3)
    index = torch.tensor([5, 0, 3])
    assert torch.equal(table.read(index), one_hot(LABELS[index], 3))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 6))
def test_after_a_shuffled_epoch_every_row_is_the_prediction_of_its_sample(seed: int, batch: int) -> None:
    table, p = PredictionTable(LABELS, 3), probabilities(seed, 6, 3)
    for index in torch.randperm(6, generator=torch.Generator().manual_seed(seed)).split(batch):
        table.write(index, p[index])
    assert torch.equal(table.read(torch.arange(6)), p)


def test_rows_that_are_not_written_stay() -> None:
    table = PredictionTable(LABELS, 3)
    table.write(torch.tensor([1]), probabilities(0, 1, 3))
    others = torch.tensor([0, 2, 3, 4, 5])
    assert torch.equal(table.read(others), one_hot(LABELS[others], 3))


def test_what_was_read_does_not_change_with_later_writes() -> None:
    table, index = PredictionTable(LABELS, 3), torch.tensor([0, 1])
    before = table.read(index)
    table.write(index, probabilities(0, 2, 3))
    assert torch.equal(before, one_hot(LABELS[index], 3))


def test_no_gradient_reaches_the_table() -> None:
    table, z = PredictionTable(LABELS, 3), torch.randn(2, 3, requires_grad=True)
    table.write(torch.tensor([0, 1]), z.softmax(-1))
    assert not table.table.requires_grad and not table.read(torch.tensor([0])).requires_grad


def test_half_precision_rows_are_normalised_when_read() -> None:
    table, p = PredictionTable(LABELS, 3, dtype=torch.float16), probabilities(0, 6, 3)
    table.write(torch.arange(6), p)
    rows = table.read(torch.arange(6))
    assert table.table.dtype == torch.float16 and rows.dtype == torch.float32
    assert torch.allclose(rows.sum(1), torch.ones(6), atol=1e-6) and torch.allclose(rows, p, atol=1e-3)


def test_the_table_is_in_the_checkpoint() -> None:
    table, other = PredictionTable(LABELS, 3), PredictionTable(LABELS, 3)
    table.write(torch.arange(6), probabilities(0, 6, 3))
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.read(torch.arange(6)), table.read(torch.arange(6)))


def test_bad_labels_shapes_and_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels lie in 0..2: expected 0..1"):
        PredictionTable(LABELS, 2)
    with pytest.raises(ValueError, match=r"expected int64 \[N\]"):
        PredictionTable(LABELS.float(), 3)
    with pytest.raises(ValueError, match="choose torch.float32 or torch.float16"):
        PredictionTable(LABELS, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected \(2, 3\)"):
        PredictionTable(LABELS, 3).write(torch.tensor([0, 1]), torch.ones(1, 3))

"""A pool of teachers: every sample gets its own, in one gather."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.teachers import Frozen
from limbeck.teachers.routed import Routed


def pool(classes: tuple[int, ...] = (3, 3, 3)) -> Routed:
    torch.manual_seed(0)
    return Routed([Frozen(nn.Linear(4, c)) for c in classes], ["a", "b", "c"][: len(classes)])


def test_each_sample_gets_the_teachers_it_was_routed_to():
    fields, index = {"x": torch.randn(5, 4)}, torch.tensor([[0, 1], [2, 0], [1, 1], [2, 1], [0, 2]])
    found = pool().picked(fields, "x", index)
    alone = [teacher.logits(fields, "x") for teacher in pool().teachers]
    for b in range(5):
        for r in range(2):
            assert torch.equal(found[r, b], alone[index[b, r]][b])


def test_called_as_a_teacher_it_reads_the_route():
    fields = {"x": torch.randn(4, 4), "route": torch.tensor([2, 0, 1, 1])}
    logits = pool().logits(fields, "x")
    assert torch.equal(logits, pool().picked(fields, "x", fields["route"][:, None])[0])
    with pytest.raises(UserError, match="reads the field 'route'"):
        pool().logits({"x": torch.randn(4, 4)}, "x")


def test_a_pool_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="3, 4 classes"):
        pool((3, 4))
    with pytest.raises(UserError, match="at least one"):
        Routed([])
    with pytest.raises(UserError, match="1 teachers need 1 names, got 2"):
        Routed([Frozen(nn.Linear(2, 2))], ["a", "b"])


def test_teachers_of_a_pool_get_no_gradient():
    assert not pool().stacked({"x": torch.randn(4, 4)}, "x").requires_grad
    assert pool().class_count == 3 and len(pool()) == 3

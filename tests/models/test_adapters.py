"""Adapters infer their shapes and say when they cannot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import UserError
from limbeck.models import Adapter, adapter_for


@settings(max_examples=25, deadline=None)
@given(ours=st.integers(1, 9), theirs=st.integers(1, 9), rank=st.sampled_from([2, 3, 4]), mlp=st.booleans())
def test_an_adapter_gives_the_teachers_shape(ours, theirs, rank, mlp):
    middle = {2: (), 3: (5,), 4: (3, 4)}[rank]
    student = torch.randn(2, ours, *middle) if rank == 4 else torch.randn(2, *middle, ours)
    teacher = torch.randn(2, theirs, *middle) if rank == 4 else torch.randn(2, *middle, theirs)
    kind = "mlp" if mlp else "conv1x1" if rank == 4 else "linear"
    assert adapter_for(student, teacher, kind)(student).shape == teacher.shape


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_an_mlp_on_a_map_equals_the_mlp_on_its_positions(norm):
    adapter = Adapter("mlp", 6, 4, hidden=[8, 5], norm=norm)
    feature = torch.randn(3, 6, 2, 5)
    rows = feature.permute(0, 2, 3, 1).reshape(-1, 6)
    expected = adapter(rows).view(3, 2, 5, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(adapter(feature), expected)


@pytest.mark.parametrize(("resize", "kind"), [("bilinear", "conv1x1"), ("average", "conv1x1"), ("average", "mlp")])
def test_resize_is_explicit(resize, kind):
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    with pytest.raises(UserError, match="8x8 and the teacher's 4x4; pass resize="):
        adapter_for(student, teacher, kind)
    assert adapter_for(student, teacher, kind, resize=resize)(student).shape == teacher.shape


def test_average_resize_keeps_the_mean():
    adapter = adapter_for(torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4), "conv1x1", resize="average")
    torch.nn.init.dirac_(adapter.project.weight)
    torch.nn.init.zeros_(adapter.project.bias)
    feature = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(adapter(feature).mean((2, 3)), feature.mean((2, 3)))


def test_bias_may_be_left_out():
    for kind, shape in (("linear", (2, 3)), ("mlp", (2, 3)), ("conv1x1", (2, 3, 1, 1))):
        adapter = adapter_for(torch.zeros(shape), torch.zeros(shape), kind, bias=False)
        assert adapter(torch.zeros(shape)).abs().sum() == 0


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "words"),
    [
        ((2, 3), (2, 3, 4, 4), "linear", "must both be"),
        ((2, 3), (2, 4), "conv1x1", "use 'linear'"),
        ((2, 3, 4, 4), (2, 3, 4, 4), "linear", "use 'conv1x1'"),
        ((2, 5, 3), (2, 7, 3), "linear", "5 tokens and the teacher 7"),
        ((2, 3), (2, 3), "conv", "'linear', 'conv1x1' or 'mlp'"),
    ],
)
def test_shapes_that_do_not_fit_get_one_sentence(student, teacher, kind, words):
    with pytest.raises(UserError, match=words):
        adapter_for(torch.zeros(student), torch.zeros(teacher), kind)


def test_mlp_choices_are_checked():
    with pytest.raises(UserError, match="belong to an adapter of kind 'mlp'"):
        Adapter("linear", 2, 2, norm="batch")
    with pytest.raises(UserError, match="needs its hidden widths"):
        Adapter("mlp", 2, 2)
    with pytest.raises(UserError, match="'none', 'batch' or 'layer'"):
        Adapter("mlp", 2, 2, hidden=[3], norm="group")

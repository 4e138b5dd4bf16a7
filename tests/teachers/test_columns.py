"""Values come back from a store's columns as exactly as their dtype allows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import UserError
from limbeck.models import TopK
from limbeck.teachers.columns import Kept, decode, decode_top, encode, encode_top, refuse_bad, to_tensor


def back(columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Through NumPy, as through a file."""
    kept = {name: Kept.of(value) for name, value in columns.items()}
    return {name: to_tensor(each.items.copy(), each.dtype) for name, each in kept.items()}


values = st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(0, 10**6), st.floats(1e-3, 1e3)).map(
    lambda s: s[3] * torch.randn(s[0], s[1], generator=torch.Generator().manual_seed(s[2]))
)


@given(values)
@settings(max_examples=25, deadline=None)
def test_float32_comes_back_bit_for_bit(x):
    assert torch.equal(decode("x", back(encode("x", x, "float32"))), x)


@given(values, st.sampled_from([("float16", 2.0**-10), ("bfloat16", 2.0**-7)]))
@settings(max_examples=25, deadline=None)
def test_halves_come_back_to_their_precision(x, kind):
    dtype, precision = kind
    error = (decode("x", back(encode("x", x, dtype))) - x).abs()
    assert bool((error <= precision * x.abs() + 1e-7).all())


@given(values)
@settings(max_examples=25, deadline=None)
def test_int8_is_off_by_half_a_level_at_most(x):
    columns = encode("x", x, "int8")
    error = (decode("x", back(columns)) - x).abs()
    assert bool((error <= 0.5001 * columns["x.step"][:, None] + 1e-6 * x.abs().amax()).all())
    torch.testing.assert_close(decode("x", columns).amax(1), x.amax(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_classes_that_are_ruled_out_stay_so(dtype):
    x = torch.tensor([[1.0, -torch.inf, 2.0], [-torch.inf, -torch.inf, -torch.inf]])
    assert torch.equal(decode("x", back(encode("x", x, dtype))).isneginf(), x.isneginf())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_are_refused(dtype, bad):
    columns = encode("logits", torch.tensor([[1.0, bad]]), dtype)
    with pytest.raises(UserError, match="NaN or infinity"):
        for name, value in columns.items():
            refuse_bad(name, value)


def test_values_that_float16_cannot_hold_are_refused():
    with pytest.raises(UserError, match="wider dtype"):
        refuse_bad("logits", encode("logits", torch.tensor([[1e5, 0.0]]), "float16")["logits"])


@pytest.mark.parametrize("kept", ["logits", "log_probabilities"])
def test_the_likeliest_come_back_as_log_probabilities(kept):
    logits = 4 * torch.randn(6, 50)
    columns = back(encode_top("logits", logits, 5, kept, "float32"))
    top, direct = decode_top("logits", columns, 50), TopK.of(logits, 5)
    assert torch.equal(top.ids, direct.ids)
    torch.testing.assert_close(top.log_probs, direct.log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(top.rest, direct.rest)


@pytest.mark.parametrize("classes, dtype", [(10, "uint8"), (256, "uint8"), (257, "uint16"), (128256, "uint32")])
def test_class_numbers_take_the_smallest_type_that_holds_them(classes, dtype):
    ids = torch.tensor([[0, classes - 1]])
    kept = Kept.of(ids, classes=classes)
    assert kept.dtype == dtype
    assert torch.equal(to_tensor(kept.items, kept.dtype).long(), ids)

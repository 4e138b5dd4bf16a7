"""Facts about regressions between features."""

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
    cosine_distance,
    feature_l1,
    feature_mse,
    feature_smooth_l1,
    normalize_features,
    resize_features,
    unit,
)

LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": feature_mse,
    "l1": feature_l1,
    "smooth_l1": partial(feature_smooth_l1, beta=0.5),
    "cosine": cosine_distance,
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
several = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


def features(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@each_loss
@several
@given(seed=seeds)
def test_zero_at_equality_positive_otherwise_and_symmetric(loss: Callable[..., Tensor], seed: int) -> None:
    a, b = features(seed, 4, 6), features(seed + 1, 4, 6)
    assert torch.allclose(loss(a, a, reduction="none"), torch.zeros(4), atol=1e-6)
    assert (loss(a, b, reduction="none") > 0).all()
    assert torch.allclose(loss(a, b, reduction="none"), loss(b, a, reduction="none"))


@each_loss
def test_gradients_agree_with_finite_differences(loss: Callable[..., Tensor]) -> None:
    a = features(0, 3, 4, dtype=torch.float64).requires_grad_()
    b = features(1, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(partial(loss, reduction="mean"), (a, b))


@pytest.mark.parametrize("how", ["l2", "layer", "channel"])
def test_normalised_losses_have_correct_gradients(how: str) -> None:
    a = features(0, 5, 4, dtype=torch.float64).requires_grad_()
    b = features(1, 5, 4, dtype=torch.float64).requires_grad_()
    loss = partial(feature_mse, normalize_student=how, normalize_target=how, reduction="sum")
    assert torch.autograd.gradcheck(loss, (a, b))


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    # 1000^2 overflows float16.
    a, b = (features(0, 3, 8) * 1000).to(dtype), (features(1, 3, 8) * 1000).to(dtype)
    value = loss(a, b, reduction="none")
    assert value.dtype == torch.float32 and value.isfinite().all()
    assert torch.equal(value, loss(a.float(), b.float(), reduction="none"))


def test_elementmean_is_the_mean_of_torch() -> None:
    a, b = features(0, 4, 6), features(1, 4, 6)
    assert torch.allclose(feature_mse(a, b, reduction="elementmean"), F.mse_loss(a, b))
    assert torch.allclose(feature_l1(a, b, reduction="elementmean"), F.l1_loss(a, b))
    smooth = feature_smooth_l1(a, b, beta=2, reduction="elementmean")
    assert torch.allclose(smooth, F.smooth_l1_loss(a, b, beta=2))


def test_maps_with_channels_first_have_one_item_a_position() -> None:
    a, b = features(0, 2, 5, 3, 4), features(1, 2, 5, 3, 4)
    items = feature_mse(a, b, dim=1, reduction="none")
    assert items.shape == (2, 3, 4) and torch.allclose(items, (a - b).square().sum(1))


@several
@given(seed=seeds, scale=st.floats(0.01, 100))
def test_cosine_distance_is_unchanged_by_scale_and_lies_in_zero_two(seed: int, scale: float) -> None:
    a, b = features(seed, 4, 6), features(seed + 1, 4, 6)
    value = cosine_distance(a, b, reduction="none")
    assert torch.allclose(value, cosine_distance(a * scale, b, reduction="none"), atol=1e-5)
    assert torch.allclose(value, 1 - F.cosine_similarity(a, b), atol=1e-6)
    assert torch.allclose(cosine_distance(a, -a, reduction="none"), torch.full((4,), 2.0), atol=1e-5)


def test_mse_of_unit_vectors_is_twice_the_cosine_distance() -> None:
    a, b = features(0, 4, 6), features(1, 4, 6)
    mse = feature_mse(a, b, normalize_student="l2", normalize_target="l2", reduction="none")
    assert torch.allclose(mse, 2 * cosine_distance(a, b, reduction="none"), atol=1e-5)


def test_only_the_side_that_is_named_is_normalised() -> None:
    a, b = features(0, 4, 6), features(1, 4, 6)
    value = feature_mse(a, b, normalize_target="layer", reduction="elementmean")
    assert torch.allclose(value, F.mse_loss(a, F.layer_norm(b, (6,), eps=1e-6)), atol=1e-5)


def test_channel_normalisation_is_batch_norm_without_affine() -> None:
    x = features(0, 3, 5, 4, 4) * 7 + 2
    expected = F.batch_norm(x, None, None, training=True, eps=1e-6)
    assert torch.allclose(normalize_features(x, "channel", dim=1), expected, atol=1e-5)
    assert torch.allclose(normalize_features(x.movedim(1, -1), "channel").movedim(-1, 1), expected, atol=1e-5)


def test_unit_vectors_have_length_one_and_a_zero_vector_stays_zero_with_finite_gradient() -> None:
    x = torch.cat([features(0, 3, 5), torch.zeros(1, 5)]).requires_grad_()
    value = unit(x)
    value.sum().backward()
    assert torch.allclose(value.norm(dim=1), torch.tensor([1.0, 1, 1, 0]), atol=1e-6)
    assert x.grad.isfinite().all()


def test_cosine_distance_of_a_zero_vector_is_one_with_finite_gradient() -> None:
    zero = torch.zeros(2, 5, requires_grad=True)
    value = cosine_distance(zero, features(0, 2, 5), reduction="mean")
    value.backward()
    assert value.item() == 1 and zero.grad.abs().max() < 10


def test_padded_tokens_are_left_out() -> None:
    a, b = features(0, 2, 3, 4), features(1, 2, 3, 4)
    tokens = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = (a - b).square().sum(-1)[tokens.bool()].mean()
    assert torch.allclose(feature_mse(a, b, reduction="mean", mask=tokens), expected)


def test_pooling_averages_whole_regions() -> None:
    x = features(0, 2, 3, 8, 8)
    assert torch.allclose(resize_features(x, (4, 4), mode="pool"), F.avg_pool2d(x, 2))


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "pool"])
def test_resizing_keeps_a_constant_and_gives_the_size(mode: str) -> None:
    resized = resize_features(torch.full((1, 2, 6, 4), 3.0), (5, 7), mode=mode)
    assert resized.shape == (1, 2, 5, 7) and torch.allclose(resized, torch.full_like(resized, 3.0))


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        feature_mse(torch.ones(2, 3), torch.ones(1, 3), reduction="mean")


def test_an_unknown_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match="'batch'"):
        normalize_features(torch.ones(2, 3), "batch")  # type: ignore[arg-type]


def test_an_unknown_resize_mode_or_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of bilinear"):
        resize_features(torch.ones(1, 1, 2, 2), (4, 4), mode="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected maps"):
        resize_features(torch.ones(2, 3), (4, 4), mode="pool")

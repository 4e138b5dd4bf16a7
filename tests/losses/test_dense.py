"""Pixel losses: what counts, what is ignored, and by what is divided."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.losses import (
    binary_dice_loss,
    dice_loss,
    kl_divergence,
    pixel_cross_entropy,
    pixel_kl,
    region_means,
)

B, C, H, W = 2, 4, 5, 6


def drawn(seed: int, ignored: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, C, H, W, generator=generator)
    mask = torch.randint(C, (B, H, W), generator=generator)
    return logits, torch.where(torch.rand(B, H, W, generator=generator) < ignored, 255, mask)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_cross_entropy_is_the_mean_over_pixels_with_a_class(seed):
    logits, mask = drawn(seed)
    loss = pixel_cross_entropy(logits, mask, reduction="mean")
    torch.testing.assert_close(loss, F.cross_entropy(logits, mask, ignore_index=255))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_weights_multiply_pixels_and_are_no_part_of_the_divisor(seed):
    logits, mask = drawn(seed)
    weight = torch.rand(B, H, W)
    items = F.cross_entropy(logits, mask, ignore_index=255, reduction="none")
    kept = mask != 255
    expected = (items * weight)[kept].sum() / kept.sum()
    torch.testing.assert_close(pixel_cross_entropy(logits, mask, reduction="mean", weight=weight), expected)


def test_counting_ignored_pixels_divides_by_all_of_them():
    logits, mask = drawn(1)
    share = (mask != 255).float().mean()
    over_all = pixel_cross_entropy(logits, mask, reduction="mean", count_ignored=True)
    torch.testing.assert_close(over_all, share * pixel_cross_entropy(logits, mask, reduction="mean"))


def test_a_batch_without_a_labelled_pixel_costs_nothing_and_has_no_gradient():
    logits = torch.randn(B, C, H, W, requires_grad=True)
    nothing = torch.full((B, H, W), 255)
    loss = pixel_cross_entropy(logits, nothing, reduction="mean") + dice_loss(logits, nothing, per_sample=True)
    pixel_cross_entropy(logits, nothing, reduction="mean").backward()
    assert pixel_cross_entropy(logits, nothing, reduction="mean") == 0 and loss.isfinite()
    assert not logits.grad.any()


def test_ignored_pixels_get_no_gradient():
    logits, mask = drawn(2)
    logits.requires_grad_()
    total = pixel_cross_entropy(logits, mask, reduction="mean") + dice_loss(logits, mask, per_sample=False)
    total.backward()
    touched = logits.grad.abs().sum(1) > 0
    assert torch.equal(touched, mask != 255)


def test_uint8_masks_and_other_sizes_are_told_apart():
    logits, mask = drawn(3)
    expected = pixel_cross_entropy(logits, mask, reduction="sum")
    assert pixel_cross_entropy(logits, mask.to(torch.uint8), reduction="sum") == expected
    with pytest.raises(ValueError, match="resize_logits"):
        pixel_cross_entropy(logits[..., ::2], mask, reduction="mean")


def test_pixel_kl_is_the_divergence_over_classes_at_the_kept_pixels():
    (student, mask), (teacher, _) = drawn(4), drawn(5)
    kept = mask != 255
    rows_s, rows_t = student.movedim(1, -1)[kept], teacher.movedim(1, -1)[kept]
    expected = kl_divergence(rows_s, rows_t, temperature=2.0, scale_by_t2=True, reduction="mean")
    loss = pixel_kl(student, teacher, temperature=2.0, scale_by_t2=True, reduction="mean", kept_BHW=kept)
    torch.testing.assert_close(loss, expected)


def test_pixel_kl_brings_the_teacher_to_the_students_size():
    student, _ = drawn(6)
    coarse = F.avg_pool2d(student, 2)
    fine = F.interpolate(coarse, (H, W), mode="bilinear", align_corners=False)
    assert pixel_kl(student, coarse, scale_by_t2=False, reduction="mean") == pixel_kl(
        student, fine, scale_by_t2=False, reduction="mean"
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), per_sample=st.booleans())
def test_dice_is_that_of_the_formula(seed, per_sample):
    logits, mask = drawn(seed, ignored=0.0)
    p, t = logits.softmax(1), F.one_hot(mask, C).movedim(-1, 1)
    groups = [(p[i : i + 1], t[i : i + 1]) for i in range(B)] if per_sample else [(p, t)]
    expected = torch.stack(
        [
            1 - (2 * (a[:, c] * b[:, c]).sum() + 1) / (a[:, c].sum() + b[:, c].sum() + 1)
            for a, b in groups
            for c in range(C)
        ]
    ).mean()
    torch.testing.assert_close(dice_loss(logits, mask, per_sample=per_sample), expected)


def test_dice_of_a_perfect_prediction_is_zero_and_of_present_classes_only_knows_no_others():
    _, mask = drawn(7, ignored=0.0)
    mask = mask % 2
    sure = F.one_hot(mask, C).movedim(-1, 1) * 100.0
    assert dice_loss(sure, mask, per_sample=True) < 1e-5
    swapped = sure[:, [1, 0, 2, 3]]  # both present classes wrong, the two absent ones rightly nowhere
    over_all, over_present = (dice_loss(swapped, mask, per_sample=False, only_present=x) for x in (False, True))
    torch.testing.assert_close(over_present, 2 * over_all)


def test_binary_dice_counts_each_sample_by_itself():
    target = torch.zeros(2, H, W)
    target[0, :2] = 1
    logits = (target - 0.5) * 200
    assert binary_dice_loss(logits, target) < 1e-5
    half = torch.stack([logits[0], -logits[0]])
    expected = (1 - (0 + 1) / (18 + 0 + 1)) / 2
    torch.testing.assert_close(binary_dice_loss(half, target), torch.tensor(expected))


def test_region_means_are_those_of_a_loop_and_zero_for_an_empty_region():
    features, regions = drawn(8)
    regions[regions == 3] = 255
    means, counts = region_means(features, regions, C)
    for b in range(B):
        for r in range(C):
            inside = features[b][:, regions[b] == r]
            assert counts[b, r] == inside.shape[1]
            expected = inside.mean(1) if inside.shape[1] else torch.zeros(C)
            torch.testing.assert_close(means[b, r], expected)
    assert not counts[:, 3].any()

"""Pseudo masks: who keeps a class, and who is left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.labels import confident_share, drop_uncertain, hard_mask, mask_accuracy

B, C, H, W = 2, 5, 8, 10


def probabilities(seed: int) -> Tensor:
    return torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(1)


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(1)


def test_without_a_threshold_every_pixel_gets_its_most_probable_class():
    p = probabilities(0)
    assert torch.equal(hard_mask(p), p.argmax(1))


def test_pixels_below_the_threshold_are_ignored_and_those_at_it_are_kept():
    p = probabilities(1)
    threshold = p.amax(1).flatten().sort().values[40]
    mask = hard_mask(p, threshold)
    assert torch.equal(mask == 255, p.amax(1) < threshold)
    assert torch.equal(mask[mask != 255], p.argmax(1)[mask != 255])


def test_each_class_has_its_own_threshold():
    p = probabilities(2)
    limits = torch.tensor([0.0, 1.1, 0.5, 0.0, 0.9])
    mask = hard_mask(p, limits)
    for c in range(C):
        predicted = p.argmax(1) == c
        assert torch.equal(mask[predicted] == c, p.amax(1)[predicted] >= limits[c])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), percent=st.sampled_from([50.0, 80.0, 95.0]))
def test_the_percentile_filter_keeps_its_share_of_the_labelled_pixels_but_for_one(seed, percent):
    p = probabilities(seed)
    mask = hard_mask(p)
    mask[:, :2] = 255
    kept = drop_uncertain(mask, p, percent) != 255
    labelled = (mask != 255).sum()
    assert abs(int(kept.sum()) - float(labelled) * percent / 100) <= 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_percentile_is_numpys_over_the_labelled_pixels(seed):
    p = probabilities(seed)
    mask = hard_mask(p)
    mask[0] = 255
    limit = np.percentile(entropy(p)[mask != 255].numpy(), 80)
    expected = (mask != 255) & (entropy(p) < limit)
    assert int((expected != (drop_uncertain(mask, p, 80.0) != 255)).sum()) == 0


def test_dropping_nothing_still_drops_the_pixel_of_highest_entropy():
    p = probabilities(3)
    dropped = drop_uncertain(hard_mask(p), p, 100.0) == 255
    assert dropped.sum() == 1 and entropy(p)[dropped] == entropy(p).max()


def test_a_mask_without_a_labelled_pixel_stays_so():
    nothing = torch.full((B, H, W), 255)
    assert torch.equal(drop_uncertain(nothing, probabilities(4), 80.0), nothing)


def test_the_confident_share_is_one_number_for_the_batch():
    p = probabilities(5)
    share = confident_share(p, 0.5)
    assert share.shape == () and share == (p.amax(1) >= 0.5).float().mean()


def test_accuracy_is_over_pixels_that_both_masks_label():
    mask, truth = torch.tensor([[[0, 1, 255, 2]]]), torch.tensor([[[0, 2, 1, 255]]])
    assert mask_accuracy(mask, truth) == 0.5
    assert mask_accuracy(torch.full_like(mask, 255), truth) == 0


def test_labels_are_constants():
    p = probabilities(6).requires_grad_()
    assert not hard_mask(p, 0.5).requires_grad and not confident_share(p, 0.5).requires_grad


@pytest.mark.parametrize("percent", [-1.0, 101.0])
def test_a_percentage_outside_0_to_100_is_refused(percent):
    with pytest.raises(ValueError, match="share"):
        drop_uncertain(torch.zeros(B, H, W).long(), probabilities(7), percent)

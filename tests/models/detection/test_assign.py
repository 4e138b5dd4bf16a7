"""Matching and sampling."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.models.detection import BACKGROUND, IGNORED, Targets, balanced_sample, match, sample_regions


def test_candidates_above_are_matched_below_are_background_between_are_ignored():
    iou = torch.tensor([[[0.8, 0.1], [0.5, 0.2], [0.2, 0.1], [0.7, 0.75]]])
    matched = match(iou, torch.ones(1, 2, dtype=torch.bool), 0.7, 0.3)
    assert matched.tolist() == [[0, IGNORED, BACKGROUND, 1]]


def test_the_foreground_limit_is_inclusive():
    assert match(torch.tensor([[[0.5], [0.4999]]]), torch.ones(1, 1).bool(), 0.5).tolist() == [[0, BACKGROUND]]


def test_every_target_gets_its_best_candidates_but_padding_and_targets_far_away_get_none():
    iou = torch.tensor([[[0.2, 0.0, 0.9], [0.1, 0.0, 0.0], [0.2, 0.0, 0.0]]])
    valid = torch.tensor([[True, True, False]])
    assert match(iou, valid, 0.7, 0.3, best_for_target=True).tolist() == [[0, BACKGROUND, 0]]
    assert match(iou, valid, 0.7, 0.3).tolist() == [[BACKGROUND] * 3]


def test_a_candidate_that_is_best_for_a_target_keeps_the_target_that_it_overlaps_more():
    iou = torch.tensor([[[0.8, 0.4], [0.1, 0.1]]])
    assert match(iou, torch.ones(1, 2).bool(), 0.7, 0.3, best_for_target=True)[0, 0] == 0


def test_without_targets_everything_is_background():
    assert match(torch.zeros(2, 3, 0), torch.zeros(2, 0).bool(), 0.5).tolist() == [[BACKGROUND] * 3] * 2
    assert match(torch.zeros(2, 3, 1), torch.zeros(2, 1).bool(), 0.5).tolist() == [[BACKGROUND] * 3] * 2


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 20), share=st.sampled_from([0.25, 0.5]))
def test_a_sample_holds_at_most_its_share_of_objects_and_fills_up_with_background(seed, count, share):
    torch.manual_seed(seed)
    matched = torch.randint(-2, 3, (4, 30))
    chosen = balanced_sample(matched, count, share)
    positives, negatives = (chosen & (matched >= 0)).sum(1), (chosen & (matched == BACKGROUND)).sum(1)
    wanted = (matched >= 0).sum(1).clamp(max=int(count * share))
    assert torch.equal(positives, wanted)
    assert torch.equal(negatives, (matched == BACKGROUND).sum(1).minimum(count - wanted))
    assert not (chosen & (matched == IGNORED)).any()


def test_sampling_draws_as_many_random_numbers_whatever_the_matches_are():
    states = []
    for matched in (torch.full((2, 9), BACKGROUND), torch.full((2, 9), IGNORED), torch.zeros(2, 9).long()):
        torch.manual_seed(0)
        balanced_sample(matched, 4, 0.5)
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_sampled_regions_carry_class_target_and_padding_and_objects_come_first():
    targets = Targets(torch.tensor([[[0.0, 0, 10, 10], [0, 0, 0, 0]]]), torch.tensor([[2, -1]]))
    proposals = torch.tensor([[[50.0, 50, 60, 60], [1, 0, 10, 10], [70, 70, 80, 80]]])
    valid = torch.tensor([[True, True, False]])
    sampled = sample_regions(proposals, valid, targets, num_classes=3, count=5, positive_share=0.5)
    assert sampled.labels.tolist() == [[2, 2, 3, -1, -1]]  # two objects: the proposal and the target itself
    assert sampled.target_boxes[0, :2].tolist() == [[0, 0, 10, 10]] * 2
    assert sampled.boxes[0, 2].tolist() == [50, 50, 60, 60]
    assert sampled.foreground(3).tolist() == [[True, True, False, False, False]]


def test_a_picture_without_targets_gives_background_alone():
    targets = Targets(torch.zeros(1, 0, 4), torch.zeros(1, 0).long())
    proposals = torch.tensor([[[50.0, 50, 60, 60], [1, 0, 10, 10]]])
    sampled = sample_regions(proposals, torch.ones(1, 2).bool(), targets, num_classes=3, count=2)
    assert sampled.labels.tolist() == [[3, 3]]

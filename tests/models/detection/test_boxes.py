"""Shapes: B images, N and M boxes. The references are plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.models.detection import anchor_grid, box_area, clip_boxes, decode_boxes, encode_boxes, nms, pairwise_iou
from limbeck.models.detection import boxes as module


def random_boxes(*shape: int, seed: int = 0, extent: float = 60.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * extent
    size = torch.rand(*shape, 2, generator=generator) * extent / 2 + 1
    return torch.cat([corner, corner + size], -1)


def looped_iou(a: Tensor, b: Tensor) -> float:
    width = max(0.0, min(float(a[2]), float(b[2])) - max(float(a[0]), float(b[0])))
    height = max(0.0, min(float(a[3]), float(b[3])) - max(float(a[1]), float(b[1])))
    inter = width * height
    area = [float((box[2] - box[0]) * (box[3] - box[1])) for box in (a, b)]
    return inter / (sum(area) - inter)


def looped_nms(boxes: Tensor, scores: Tensor, threshold: float, labels: Tensor | None) -> list[bool]:
    keep = [False] * len(boxes)
    for i in sorted(range(len(boxes)), key=lambda i: -float(scores[i])):
        rivals = [j for j in range(len(boxes)) if keep[j] and (labels is None or labels[i] == labels[j])]
        keep[i] = all(looped_iou(boxes[i], boxes[j]) <= threshold for j in rivals)
    return keep


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([0.1, 0.3, 0.5, 0.7]), classes=st.booleans())
def test_nms_of_a_batch_is_the_greedy_loop_of_each_image(seed, threshold, classes):
    boxes_BN4 = random_boxes(3, 25, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    scores_BN = torch.rand(3, 25, generator=generator)
    labels_BN = torch.randint(3, (3, 25), generator=generator) if classes else None
    keep_BN = nms(boxes_BN4, scores_BN, threshold, labels_BN)
    for b in range(3):
        labels = labels_BN[b] if labels_BN is not None else None
        assert keep_BN[b].tolist() == looped_nms(boxes_BN4[b], scores_BN[b], threshold, labels)


def test_a_box_that_only_a_suppressed_box_covers_is_kept():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]]])  # each overlaps the next by 6/14
    assert nms(boxes, torch.tensor([[0.9, 0.8, 0.7]]), 0.4).tolist() == [[True, False, True]]


def test_nms_threshold_is_strict_and_padding_is_never_kept():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10]]])
    scores = torch.tensor([[0.9, 0.8, -torch.inf]])
    assert nms(boxes, scores, 0.5).tolist() == [[True, True, False]]
    assert nms(boxes, scores, 0.49).tolist() == [[True, False, False]]


def test_boxes_of_different_classes_do_not_suppress_each_other_even_with_negative_coordinates():
    boxes = torch.tensor([[[-50.0, -50, 10, 10], [-50, -50, 10, 10], [-50, -50, 10, 10]]])
    labels = torch.tensor([[0, 1, 0]])
    assert nms(boxes, torch.tensor([[0.9, 0.8, 0.7]]), 0.5, labels).tolist() == [[True, True, False]]


def test_nms_in_pieces_of_images_is_the_same(monkeypatch):
    boxes_BN4, scores_BN = random_boxes(5, 30), torch.rand(5, 30)
    whole = nms(boxes_BN4, scores_BN, 0.3)
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 1000)
    assert torch.equal(nms(boxes_BN4, scores_BN, 0.3), whole)


def test_nms_of_no_boxes_is_empty():
    assert nms(torch.zeros(2, 0, 4), torch.zeros(2, 0), 0.5).shape == (2, 0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_iou_is_the_loop(seed):
    first, second = random_boxes(2, 4, seed=seed), random_boxes(2, 5, seed=seed + 1)
    expected = torch.tensor([[[looped_iou(a, b) for b in second[k]] for a in first[k]] for k in range(2)])
    torch.testing.assert_close(pairwise_iou(first, second), expected, rtol=1e-4, atol=1e-5)


def test_iou_of_boxes_without_area_is_zero_and_not_nan():
    assert pairwise_iou(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)).item() == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_decoding_takes_back_encoding(seed):
    boxes, anchors = random_boxes(3, 7, seed=seed), random_boxes(3, 7, seed=seed + 1)
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes, anchors), anchors), boxes, rtol=1e-4, atol=1e-3)


def test_deltas_are_those_of_the_paper():
    anchor, box = torch.tensor([0.0, 0, 10, 20]), torch.tensor([5.0, 10, 25, 30])
    # the centre moves by (10, 10) of a size (10, 20), the size changes to (20, 20)
    expected = torch.tensor([10 * 1.0, 10 * 0.5, 5 * torch.tensor(2.0).log(), 0.0])
    torch.testing.assert_close(encode_boxes(box, anchor), expected)


def test_zero_deltas_decode_to_the_anchor_and_huge_ones_to_at_most_62_times_its_size():
    anchor = torch.tensor([0.0, 0, 10, 20])
    torch.testing.assert_close(decode_boxes(torch.zeros(4), anchor), anchor)
    huge = decode_boxes(torch.tensor([0.0, 0, 1e4, 1e4]), anchor)
    torch.testing.assert_close(huge[2:] - huge[:2], torch.tensor([625.0, 1250.0]))


def test_clipping_cuts_at_the_edges_and_area_of_nothing_is_zero():
    clipped = clip_boxes(torch.tensor([[-5.0, -5, 50, 50], [70, 70, 80, 80]]), 40, 30)
    assert clipped.tolist() == [[0, 0, 30, 40], [30, 40, 30, 40]]
    assert box_area(clipped).tolist() == [1200, 0]


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_anchors_have_their_size_and_stand_on_the_cells_centres(ratio):
    anchors = anchor_grid(2, 3, 8, [16.0], [ratio], torch.device("cpu"))
    size = anchors[:, 2:] - anchors[:, :2]
    torch.testing.assert_close(size.prod(1), torch.full((6,), 256.0))
    torch.testing.assert_close(size[:, 1] / size[:, 0], torch.full((6,), ratio))
    centres = (anchors[:, 2:] + anchors[:, :2]) / 2
    assert centres.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]

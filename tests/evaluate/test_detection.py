"""Average precision against its definition, computed by a loop, and against pycocotools' own files and summary."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.data import Samples
from limbeck.errors import UserError
from limbeck.evaluate import DetectionEvaluator, box_recall, detect_all, detection_metrics
from limbeck.models.detection import Detections, pairwise_iou


def scene(seed: int, pictures: int = 4, most: int = 6, classes: int = 3) -> tuple[Detections, Tensor, Tensor]:
    """True boxes, and detections that are noisy copies of them among false ones; ragged, so padded."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(pictures, most, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 8 + torch.rand(pictures, most, 2, generator=generator) * 20], -1)
    labels = torch.randint(-1, classes, (pictures, most), generator=generator)
    noisy = boxes + torch.randn(boxes.shape, generator=generator) * 2
    noisy = torch.cat([noisy[..., :2], noisy[..., 2:].maximum(noisy[..., :2] + 1)], -1)
    found_labels = torch.where(torch.rand(pictures, most, generator=generator) < 0.8, labels, labels.flip(1))
    scores = torch.rand(pictures, most, generator=generator)
    return Detections(noisy, scores, found_labels), boxes, labels


def looped_ap(found: Detections, boxes: Tensor, labels: Tensor, label: int, iou: float) -> float:
    """101-point interpolated average precision of one class, greedy matching by score."""
    entries = []
    total = int((labels == label).sum())
    for p in range(len(labels)):
        truth = boxes[p][labels[p] == label]
        taken = [False] * len(truth)
        own = (found.labels[p] == label).nonzero().flatten()
        for slot in sorted(own.tolist(), key=lambda slot: -float(found.scores[p, slot])):
            overlap = pairwise_iou(found.boxes[p, slot : slot + 1], truth)[0] if len(truth) else torch.zeros(0)
            free = [(float(overlap[t]), t) for t in range(len(truth)) if not taken[t] and overlap[t] >= iou]
            if free:
                taken[max(free)[1]] = True
            entries.append((float(found.scores[p, slot]), bool(free)))
    hits, precisions, recalls = 0, [], []
    for number, (_, hit) in enumerate(sorted(entries, key=lambda entry: -entry[0]), start=1):
        hits += hit
        precisions.append(hits / number)
        recalls.append(hits / total)
    levels = np.linspace(0, 1, 101)  # pycocotools' own: 0.6 among them is a bit above 3 / 5
    points = [max((p for p, r in zip(precisions, recalls, strict=True) if r >= k), default=0.0) for k in levels]
    return sum(points) / 101


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_average_precision_is_that_of_the_loop(seed):
    found, boxes, labels = scene(seed)
    metrics = detection_metrics(found, boxes, labels, ["a", "b", "c"])
    known = [label for label in range(3) if (labels == label).any()]
    at_half = [looped_ap(found, boxes, labels, label, 0.5) for label in known]
    for label, value in zip(known, at_half, strict=True):
        assert metrics[f"map50_{'abc'[label]}"] == pytest.approx(value, abs=1e-6)
    assert metrics["map50"] == pytest.approx(sum(at_half) / len(at_half), abs=1e-6)
    every = [looped_ap(found, boxes, labels, label, 0.5 + 0.05 * t) for label in known for t in range(10)]
    assert metrics["map"] == pytest.approx(sum(every) / len(every), abs=1e-3)


def test_it_is_what_pycocotools_prints_of_json_files(tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found, boxes, labels = scene(3)
    truth, guesses = [], []
    for p in range(len(labels)):
        for slot in range(labels.shape[1]):
            for source, target in ((labels, truth), (found.labels, guesses)):
                if source[p, slot] >= 0:
                    x1, y1, x2, y2 = (boxes if target is truth else found.boxes)[p, slot].tolist()
                    entry = {"image_id": p, "category_id": int(source[p, slot]), "bbox": [x1, y1, x2 - x1, y2 - y1]}
                    extra = {"id": len(target) + 1, "iscrowd": 0, "area": (x2 - x1) * (y2 - y1)}
                    target.append({**entry, **(extra if target is truth else {"score": float(found.scores[p, slot])})})
    file = tmp_path / "truth.json"
    content = {
        "images": [{"id": p} for p in range(4)],
        "categories": [{"id": c} for c in range(3)],
        "annotations": truth,
    }
    file.write_text(json.dumps(content))
    (tmp_path / "found.json").write_text(json.dumps(guesses))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
        judge = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    metrics = detection_metrics(found, boxes, labels, ["a", "b", "c"])
    assert metrics["map"] == pytest.approx(judge.stats[0]) and metrics["map50"] == pytest.approx(judge.stats[1])


def test_perfect_detections_score_one_and_none_score_zero():
    _, boxes, labels = scene(0)
    perfect = Detections(boxes, torch.ones(labels.shape), labels)
    metrics = detection_metrics(perfect, boxes, labels, ["a", "b", "c"])
    assert all(value == pytest.approx(1) for value in metrics.values())
    none = Detections(boxes, torch.zeros(labels.shape), torch.full_like(labels, -1))
    assert not any(detection_metrics(none, boxes, labels, ["a", "b", "c"]).values())


def test_a_class_without_true_boxes_is_left_out_of_the_mean():
    boxes, labels = torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[0]])
    found = Detections(boxes.repeat(1, 2, 1), torch.tensor([[0.9, 0.8]]), torch.tensor([[0, 1]]))
    metrics = detection_metrics(found, boxes, labels, ["a", "b"])
    assert metrics["map50"] == pytest.approx(1) and metrics["map50_b"] == 0 and metrics["recall_b"] == 0


def test_pictures_without_any_box_are_fine():
    boxes, labels = torch.zeros(2, 1, 4), torch.full((2, 1), -1)
    found = Detections(
        torch.tensor([[[0.0, 0, 5, 5]], [[0.0, 0, 0, 0]]]), torch.tensor([[0.9], [0.0]]), torch.tensor([[0], [-1]])
    )
    assert not any(detection_metrics(found, boxes, labels, ["a"]).values())


def test_recall_counts_each_true_box_once_and_asks_for_score_class_and_overlap():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]]])
    labels = torch.tensor([[0, 0, 0, 1]])
    found = Detections(
        torch.tensor([[[0.0, 0, 10, 10], [1, 0, 10, 10], [20, 0, 30, 10], [44, 0, 56, 10], [60, 0, 70, 10]]]),
        torch.tensor([[0.9, 0.8, 0.2, 0.9, 0.9]]),
        torch.tensor([[0, 0, 0, 0, 0]]),
    )
    assert box_recall(found, boxes, labels, 0) == pytest.approx(2 / 3)
    assert box_recall(found, boxes, labels, 0, score=0.3) == pytest.approx(1 / 3)
    assert box_recall(found, boxes, labels, 1) == 0 and box_recall(found, boxes, labels, 2) == 0


class Constant(nn.Module):
    """A detector that finds one box where the picture is bright."""

    def forward(self, images: Tensor) -> Detections:
        rows = len(images)
        labels = torch.where(images.mean((1, 2, 3)) > 0.5, 0, -1)[:, None]
        return Detections(torch.tensor([[0.0, 0, 4, 4]]).expand(rows, 1, 4), torch.full((rows, 1), 0.8), labels)


def test_the_evaluator_runs_in_batches_in_order_and_gives_the_mode_back():
    image = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    image[1::2] = 255
    fields = {"image": image, "boxes": torch.tensor([[[0.0, 0, 4, 4]]]).repeat(5, 1, 1)}
    samples = Samples({**fields, "box_labels": torch.tensor([[-1], [0], [-1], [0], [-1]])}, ["a"])
    model = Constant().train()
    assert detect_all(model, samples, batch_size=2).labels.flatten().tolist() == [-1, 0, -1, 0, -1]
    assert DetectionEvaluator(batch_size=2)(model, samples)["map"] == pytest.approx(1)
    assert model.training
    assert detect_all(model, samples, rows=torch.tensor([1])).labels.tolist() == [[0]]
    with pytest.raises(UserError, match="no field 'picture'"):
        detect_all(model, samples, field="picture")


def test_truth_that_does_not_fit_is_refused():
    found, boxes, labels = scene(0)
    with pytest.raises(UserError, match="pictures"):
        detection_metrics(found, boxes[:2], labels[:2], ["a", "b", "c"])
    with pytest.raises(UserError, match="only|there are 1 classes"):
        detection_metrics(found, boxes, labels, ["a"])


def test_without_pycocotools_it_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install limbeck\[detection\]"):
        DetectionEvaluator()

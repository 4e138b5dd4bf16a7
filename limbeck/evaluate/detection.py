"""How good a detector is: COCO's average precision by pycocotools, and recall.

(torchmetrics wraps the same pycocotools, but only where torchvision is installed, which Limbeck does not need.)

Shapes: N pictures, M boxes of a picture (padded with label -1), T IoU thresholds, R recall levels, K classes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.data import Samples
from limbeck.errors import UserError
from limbeck.evaluate.classification import _inputs
from limbeck.models import evaluating
from limbeck.models.detection import Detections, pairwise_iou


@dataclass(frozen=True)
class DetectionEvaluator:
    """`evaluator(model, samples)` gives the metrics: `detect_all`, then `detection_metrics`.

    Raises:
        UserError: pycocotools is not installed; said here, before a detector is trained, not after.
    """

    batch_size: int = 24
    field: str = "image"

    def __post_init__(self) -> None:
        if importlib.util.find_spec("pycocotools") is None:
            raise UserError(
                "average precision needs pycocotools, which is not installed: pip install limbeck[detection]"
            )

    def __call__(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        found = detect_all(model, samples, batch_size=self.batch_size, field=self.field)
        return detection_metrics(found, samples.fields["boxes"], samples.fields["box_labels"], samples.classes or [])


def detect_all(
    model: nn.Module, samples: Samples, *, batch_size: int = 24, field: str = "image", rows: Tensor | None = None
) -> Detections:
    """A detector's findings on all samples (or some `rows`), on the CPU; in eval mode, without gradients.

    Raises:
        UserError: there are no samples, or they have no such field.
    """
    if not len(samples):
        raise UserError("There are no samples to evaluate on; give a split that is not empty.")
    if field not in samples.fields:
        raise UserError(f"The samples have no field '{field}' to evaluate on, they have {', '.join(samples.fields)}.")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    rows = torch.arange(len(samples)) if rows is None else rows
    with evaluating(model), torch.inference_mode():
        parts = [model(_inputs(samples.batch(part)[field], device)) for part in rows.split(batch_size)]
    return Detections(*(torch.cat([getattr(part, name).cpu() for part in parts]) for name in Detections._fields))


def detection_metrics(
    found: Detections, boxes_NM4: Tensor, labels_NM: Tensor, classes: Sequence[str], recall_score: float = 0.3
) -> dict[str, float]:
    """COCO's metrics in [0, 1], all better when larger.

    - `map`: average precision (101 recall levels, at most 100 detections a picture), mean over the classes that have
      true boxes and over IoU 0.50, 0.55, ..., 0.95; `map50`: at IoU 0.5; `map50_<class>`: of one class (0 where it has
      no true box).
    - `recall_<class>`: share of the class's true boxes that its detections with a score of at least `recall_score`
      meet at IoU 0.5, see `box_recall`.

    Raises:
        UserError: detections and truth are of different pictures, or a true label is not in `classes`.
    """
    if len(found.labels) != len(labels_NM):
        raise UserError(f"There are detections of {len(found.labels)} pictures and true boxes of {len(labels_NM)}.")
    if int(labels_NM.max()) >= len(classes):
        raise UserError(f"A true box has the label {int(labels_NM.max())}, but there are {len(classes)} classes.")
    precision_TRK = _precision(found, boxes_NM4, labels_NM, len(classes))
    known_K = (precision_TRK > -1).any((0, 1))
    ap_TK = np.where(known_K, precision_TRK.mean(1), 0.0)
    count = max(1, int(known_K.sum()))
    metrics = {"map": float(ap_TK.mean(0).sum() / count), "map50": float(ap_TK[0].sum() / count)}
    metrics |= {f"map50_{name}": float(ap_TK[0, number]) for number, name in enumerate(classes)}
    for number, name in enumerate(classes):
        metrics[f"recall_{name}"] = box_recall(found, boxes_NM4, labels_NM, number, score=recall_score)
    return metrics


def box_recall(
    found: Detections, boxes_NM4: Tensor, labels_NM: Tensor, label: int, *, score: float = 0.0, iou: float = 0.5
) -> float:
    """Share of the true boxes of one class that detections of that class meet; 0 where there is no true box.

    Greedy as in COCO: in the order of their scores (from `score` on) each detection takes the free true box that it
    overlaps most, if by at least `iou`.
    """
    met = total = 0
    for picture in range(len(labels_NM)):
        truth = boxes_NM4[picture][labels_NM[picture] == label]
        chosen = (found.labels[picture] == label) & (found.scores[picture] >= score)
        order = found.scores[picture][chosen].argsort(descending=True, stable=True)
        overlap = pairwise_iou(found.boxes[picture][chosen][order], truth)
        free = torch.ones(len(truth), dtype=torch.bool)
        for row in overlap if len(truth) else []:
            best = row.masked_fill(~free, -1.0)
            if best.max() >= iou:
                free[best.argmax()] = False
        met, total = met + int((~free).sum()), total + len(truth)
    return met / total if total else 0.0


def _precision(found: Detections, boxes_NM4: Tensor, labels_NM: Tensor, classes: int) -> np.ndarray:
    """COCO's precision [T, R, K], -1 for classes without true boxes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = _entries(boxes_NM4, labels_NM, None)
    guesses = _entries(found.boxes, found.labels, found.scores)
    images = [{"id": picture} for picture in range(len(labels_NM))]
    categories = [{"id": number} for number in range(classes)]
    sets = []
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        for entries in (truth, guesses):
            made = COCO()
            made.dataset = {"images": images, "categories": categories, "annotations": entries}
            made.createIndex()
            sets.append(made)
        judge = COCOeval(*sets, "bbox")
        judge.params.areaRng, judge.params.areaRngLbl = [[0.0, 1e10]], ["all"]
        judge.params.maxDets = [100]
        judge.evaluate()
        judge.accumulate()
    return judge.eval["precision"][..., 0, 0]


def _entries(boxes_NM4: Tensor, labels_NM: Tensor, scores_NM: Tensor | None) -> list[dict]:
    """COCO's annotations of what is no padding; ids count from 1, for COCO takes 0 for no match."""
    pictures, slots = (labels_NM >= 0).nonzero(as_tuple=True)
    boxes = boxes_NM4[pictures, slots].double()
    size = boxes[:, 2:] - boxes[:, :2]
    xywh, area = torch.cat([boxes[:, :2], size], 1).tolist(), size.prod(1).tolist()
    labels = labels_NM[pictures, slots].tolist()
    scores = [1.0] * len(labels) if scores_NM is None else scores_NM[pictures, slots].tolist()
    columns = zip(pictures.tolist(), labels, xywh, area, scores, strict=True)
    return [
        {"id": number, "image_id": picture, "category_id": label, "bbox": box, "area": a, "iscrowd": 0, "score": score}
        for number, (picture, label, box, a, score) in enumerate(columns, start=1)
    ]

"""How well a segmenter's masks fit the true ones.

Shapes: N samples, C classes, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from limbeck.data import Samples
from limbeck.errors import UserError
from limbeck.evaluate.classification import _inputs
from limbeck.models import evaluating

IGNORE = 255


@dataclass(frozen=True)
class SegmentationEvaluator:
    """`evaluator(model, samples)` gives the metrics of `segmentation_metrics` on samples with `image` and `mask`."""

    batch_size: int = 32
    ignore_index: int = IGNORE

    def __call__(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        confusion_CC = confusion(model, samples, batch_size=self.batch_size, ignore_index=self.ignore_index)
        return segmentation_metrics(confusion_CC, samples.classes)


def predict_masks(model: nn.Module, samples: Samples, *, batch_size: int = 32) -> Tensor:
    """int64 [N,H,W]: the class of highest logit at each pixel; the model runs in eval mode, where its weights are."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with evaluating(model), torch.inference_mode():
        parts = [
            model(_inputs(samples.batch(rows)["image"], device)).argmax(1).cpu()
            for rows in torch.arange(len(samples)).split(batch_size)
        ]
    return torch.cat(parts)


def confusion(model: nn.Module, samples: Samples, *, batch_size: int = 32, ignore_index: int = IGNORE) -> Tensor:
    """int64 [C,C]: pixels of class i (row) that the model calls j (column); ignored pixels are left out.

    Raises `UserError` for no samples, samples without masks, and masks of another size than the model's.
    """
    if not len(samples) or "mask" not in samples.fields:
        raise UserError(
            f"There is nothing to evaluate on: {len(samples)} samples with {', '.join(samples.fields)}; give samples "
            "with a mask."
        )
    total_CC = torch.zeros(samples.num_classes, samples.num_classes, dtype=torch.int64)
    for rows in torch.arange(len(samples)).split(batch_size):
        part = samples.select(rows)
        total_CC += confusion_matrix(
            predict_masks(model, part, batch_size=batch_size), part.fields["mask"], samples.num_classes, ignore_index
        )
    return total_CC


def confusion_matrix(predicted: Tensor, truth: Tensor, classes: int, ignore_index: int = IGNORE) -> Tensor:
    """int64 [C,C] of two masks of equal shape: rows are the true classes, columns the predicted ones."""
    if predicted.shape != truth.shape:
        raise UserError(
            f"The predicted masks are {list(predicted.shape)} and the true ones {list(truth.shape)}: a segmenter gives "
            "logits of its picture's height and width."
        )
    return multiclass_confusion_matrix(
        predicted.long(), truth.long(), classes, ignore_index=ignore_index, validate_args=False
    ).cpu()


def segmentation_metrics(confusion_CC: Tensor, classes: list[str] | None = None) -> dict[str, float]:
    """Metrics of a confusion matrix, all in [0, 1] and better when larger.

    - `miou`: mean of IoU_c = n_cc / (sum_j n_cj + sum_i n_ic - n_cc) over the classes that occur in the truth, so that
      every model is averaged over the same classes (a wrongly predicted further class costs the true ones).
    - `pixel_accuracy`: share of pixels with the true class.
    - `iou.<class>`: IoU of each of these classes.

    Raises `UserError` where no pixel counts.
    """
    counts_CC = confusion_CC.double()
    right_C = counts_CC.diagonal()
    union_C = counts_CC.sum(0) + counts_CC.sum(1) - right_C
    there_C = counts_CC.sum(1) > 0
    if not there_C.any():
        raise UserError("Every pixel of the masks is ignored; give masks with classes.")
    iou_C = right_C / union_C
    names = classes or [str(c) for c in range(len(counts_CC))]
    return {
        "miou": float(iou_C[there_C].mean()),
        "pixel_accuracy": float(right_C.sum() / counts_CC.sum()),
        **{f"iou.{name}": float(iou) for name, iou, there in zip(names, iou_C, there_C, strict=True) if there},
    }

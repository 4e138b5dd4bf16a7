"""mIoU and pixel accuracy against torchmetrics and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

from limbeck.data import Samples
from limbeck.errors import UserError
from limbeck.evaluate import SegmentationEvaluator, confusion_matrix, predict_masks, segmentation_metrics

N, C, H, W = 5, 4, 6, 8


class Fixed(nn.Module):
    """A segmenter that reads each pixel's class from the picture's first channel (class / 255)."""

    def forward(self, image):
        return -(image[:, :1] * 255 - torch.arange(C).view(1, C, 1, 1)).abs()


def masks(seed: int) -> torch.Tensor:
    return torch.randint(0, C, (N, H, W), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def samples(predicted: torch.Tensor, truth: torch.Tensor) -> Samples:
    return Samples({"image": predicted[:, None].expand(-1, 3, -1, -1).contiguous(), "mask": truth}, list("abcd"))


def test_metrics_are_torchmetrics_without_the_ignored_pixels():
    predicted, truth = masks(0), masks(1)
    truth[:, :2] = 255
    metrics = SegmentationEvaluator(batch_size=2)(Fixed(), samples(predicted, truth))
    reference = MulticlassJaccardIndex(C, ignore_index=255, average="none")(predicted.long(), truth.long())
    assert metrics["miou"] == pytest.approx(float(reference.mean()))
    assert [metrics[f"iou.{name}"] for name in "abcd"] == pytest.approx(reference.tolist())
    kept = truth != 255
    assert metrics["pixel_accuracy"] == pytest.approx(float((predicted == truth)[kept].float().mean()))


def test_a_class_that_is_not_in_the_truth_has_no_iou_but_costs_the_others():
    truth = torch.zeros(1, 2, 2, dtype=torch.uint8)
    predicted = torch.tensor([[[0, 0], [0, 3]]])
    metrics = segmentation_metrics(confusion_matrix(predicted, truth, C), list("abcd"))
    assert metrics == {"miou": 0.75, "pixel_accuracy": 0.75, "iou.a": 0.75}


def test_a_perfect_mask_has_iou_one_and_batches_do_not_matter():
    truth = masks(2)
    for batch_size in (1, 3, 8):
        metrics = SegmentationEvaluator(batch_size=batch_size)(Fixed(), samples(truth, truth))
        assert metrics["miou"] == metrics["pixel_accuracy"] == 1
    assert torch.equal(predict_masks(Fixed(), samples(truth, truth), batch_size=2), truth.long())


def test_rows_of_the_confusion_are_the_truth():
    matrix = confusion_matrix(torch.tensor([[[1]]]), torch.tensor([[[2]]]), C)
    assert matrix[2, 1] == 1 and matrix.sum() == 1


def test_what_cannot_be_evaluated_is_one_sentence():
    truth = masks(3)
    with pytest.raises(UserError, match="with a mask"):
        SegmentationEvaluator()(Fixed(), Samples({"image": truth[:, None]}))
    with pytest.raises(UserError, match="height and width"):
        confusion_matrix(truth[:, ::2], truth, C)
    with pytest.raises(UserError, match="Every pixel"):
        segmentation_metrics(confusion_matrix(truth, torch.full_like(truth, 255), C))

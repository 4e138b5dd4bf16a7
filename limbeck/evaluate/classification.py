"""Predictions of a classifier and how good and how well calibrated they are.

Shapes: N samples, C classes, M bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from limbeck.data import Samples
from limbeck.errors import UserError
from limbeck.models import evaluating

# The largest float32 below 1: torchmetrics gives a confidence of exactly 1 a bin of its own.
_BELOW_ONE = 1.0 - 2.0**-24


@dataclass(frozen=True)
class Reliability:
    """Data of a reliability diagram: M bins of equal width over the confidence, all lists of length M.

    `confidence` and `accuracy` are the means within a bin (0 where the bin is empty), `fraction` its share of
    the samples; `ece` is the sum of fraction * |accuracy - confidence|. All are fractions in [0, 1].
    """

    confidence: list[float]
    accuracy: list[float]
    fraction: list[float]
    ece: float


@dataclass(frozen=True)
class ClassificationEvaluator:
    """`evaluator(model, samples)` gives the metrics: `predict`, then `classification_metrics`."""

    batch_size: int = 256
    field: str = "image"

    def __call__(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        return classification_metrics(*predict(model, samples, batch_size=self.batch_size, field=self.field))


def predict(
    model: nn.Module,
    samples: Samples,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    field: str = "image",
) -> tuple[Tensor, Tensor]:
    """The logits of a model for labelled samples: `(logits_NC, labels_N)`, both on `device`.

    The model runs in eval mode without gradients, and each of its modules gets its own mode back afterwards.
    uint8 images become float32 in [0, 1]; a field that is a dict of tensors goes to the model as a dict.

    Args:
        model: `model(field) -> logits_BC`; it must already be on `device`.
        batch_size: samples in one forward pass.
        device: default: where the model's parameters are.
        field: what the model reads.

    Raises:
        UserError: there are no samples, they are not labelled, or they have no such field.
    """
    if not len(samples):
        raise UserError("There are no samples to evaluate on; give a split that is not empty.")
    if field not in samples.fields:
        raise UserError(f"The samples have no field '{field}' to evaluate on, they have {', '.join(samples.fields)}.")
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    labels = samples.labels.to(device)
    with evaluating(model), torch.inference_mode():
        parts = [
            model(_inputs(samples.batch(rows)[field], device)) for rows in torch.arange(len(samples)).split(batch_size)
        ]
        return torch.cat(parts).float(), labels


def classification_metrics(logits_NC: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Quality and calibration of a classifier's logits; all but `accuracy` are better when smaller.

    With p = softmax(logits), confidence c = max p and error e = [argmax p != label]:

    - `accuracy`: share of e = 0.
    - `nll`: mean of -log p[label], in nats.
    - `ece`: expected calibration error, 15 bins of equal width over c, sum of share * |accuracy - mean c|
      (Guo et al. 2017, section 2).
    - `adaptive_ece`: the same over 15 bins of equally many samples (Nguyen & O'Connor 2015).
    - `aurc`: area under the risk-coverage curve, the mean over k = 1..N of the error rate among the k most
      confident samples (Geifman et al. 2019, equation 3).
    - `brier`: mean of the sum over classes of (p - onehot)^2, in [0, 2].

    Samples of equal confidence share their mean error, so that their order never matters.

    Raises:
        UserError: shapes that do not fit, a label outside 0..C-1, or logits that are NaN or +inf.
    """
    logits_NC = _check(logits_NC, labels_N)
    probabilities_NC = logits_NC.softmax(1).clamp(max=_BELOW_ONE)
    classes = logits_NC.shape[1]
    confidence_N, error_N = _by_confidence(logits_NC, labels_N)
    one_hot_NC = F.one_hot(labels_N, classes)
    counts_N = torch.arange(1, len(labels_N) + 1, device=logits_NC.device)
    return {
        "accuracy": float(multiclass_accuracy(probabilities_NC, labels_N, classes, average="micro")),
        "nll": float(F.cross_entropy(logits_NC, labels_N)),
        "ece": float(multiclass_calibration_error(probabilities_NC, labels_N, classes, n_bins=15, norm="l1")),
        "adaptive_ece": float(_adaptive_ece(confidence_N, error_N, bins=15)),
        "aurc": float((error_N.cumsum(0) / counts_N).mean()),
        "brier": float((probabilities_NC - one_hot_NC).square().sum(1).mean()),
    }


def reliability(logits_NC: Tensor, labels_N: Tensor, bins: int = 15) -> Reliability:
    """Confidence against accuracy in `bins` bins of equal width; 15 give the `ece` of the metrics."""
    logits_NC = _check(logits_NC, labels_N)
    confidence_N, predicted_N = logits_NC.softmax(1).clamp(max=_BELOW_ONE).max(1)
    edges = torch.linspace(0, 1, bins + 1, device=logits_NC.device)
    bin_N = torch.bucketize(confidence_N, edges, right=True) - 1
    count_M = torch.bincount(bin_N, minlength=bins)
    filled_M = count_M.clamp(min=1)
    confidence_M = torch.bincount(bin_N, weights=confidence_N, minlength=bins) / filled_M
    accuracy_M = torch.bincount(bin_N, weights=(predicted_N == labels_N).float(), minlength=bins) / filled_M
    fraction_M = count_M / len(labels_N)
    return Reliability(
        confidence=confidence_M.tolist(),
        accuracy=accuracy_M.tolist(),
        fraction=fraction_M.tolist(),
        ece=float((fraction_M * (accuracy_M - confidence_M).abs()).sum()),
    )


def _by_confidence(logits_NC: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Confidences from high to low and the errors in that order, averaged where confidences are equal."""
    top_N, predicted_N = logits_NC.max(1)
    # The log-odds order samples as the probability does, but tell apart those that round to probability 1.
    others_NC = logits_NC.scatter(1, predicted_N[:, None], -torch.inf)
    odds_N, order_N = (top_N - others_NC.logsumexp(1)).sort(descending=True)
    error_N = (predicted_N != labels_N).float()[order_N]
    _, group_N, size = torch.unique_consecutive(odds_N, return_inverse=True, return_counts=True)
    return odds_N.sigmoid(), (torch.bincount(group_N, weights=error_N) / size)[group_N]


def _adaptive_ece(confidence_N: Tensor, error_N: Tensor, bins: int) -> Tensor:
    # The signed gaps of a bin add up to its size times (accuracy - mean confidence).
    gap_N = (1 - error_N) - confidence_N
    bin_N = torch.arange(len(gap_N), device=gap_N.device) * bins // len(gap_N)
    return torch.bincount(bin_N, weights=gap_N).abs().sum() / len(gap_N)


def _check(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """The logits as float32 with a row maximum of 0, once they fit the labels."""
    if logits_NC.dim() != 2 or labels_N.shape != logits_NC.shape[:1] or not len(labels_N):
        raise UserError(
            f"Metrics need logits [N, C] and labels [N] with N > 0, got {list(logits_NC.shape)} and "
            f"{list(labels_N.shape)}; pass what `predict` returns."
        )
    classes = logits_NC.shape[1]
    if bool(((labels_N < 0) | (labels_N >= classes)).any()):
        bad = int(((labels_N < 0) | (labels_N >= classes)).nonzero()[0])
        raise UserError(
            f"The label of sample {bad} is {int(labels_N[bad])}, but the model has {classes} classes; "
            f"labels go from 0 to {classes - 1}."
        )
    logits_NC = logits_NC.float()
    # A row has a softmax exactly when its logsumexp is finite; -inf (a class ruled out) is fine.
    finite_N = logits_NC.logsumexp(1).isfinite()
    if not bool(finite_N.all()):
        bad = int((~finite_N).nonzero()[0])
        raise UserError(f"The logits of sample {bad} are not finite; the model diverged or its input holds NaN.")
    # A constant in a row says nothing; without it, logits that differ in nothing else rank exactly alike.
    return logits_NC - logits_NC.amax(1, keepdim=True)


def _inputs(value: Tensor | dict[str, Tensor], device: torch.device | str) -> Tensor | dict[str, Tensor]:
    if isinstance(value, dict):
        return {name: part.to(device) for name, part in value.items()}
    value = value.to(device)
    return value.float() / 255 if value.dtype == torch.uint8 else value

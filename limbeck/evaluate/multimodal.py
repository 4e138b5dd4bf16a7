"""How good a classifier is that reads a batch of several modalities, or one of them.

Shapes: N samples, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.data import Samples
from limbeck.errors import UserError
from limbeck.evaluate.classification import classification_metrics
from limbeck.models import evaluating
from limbeck.train.reading import batches


@dataclass(frozen=True)
class MultimodalEvaluator:
    """`evaluator(model, samples)`: `classification_metrics` of a model that takes the batch (`OneModality`, ...)."""

    batch_size: int = 256

    def __call__(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        return classification_metrics(*predict_fields(model, samples, batch_size=self.batch_size))


def predict_fields(model: nn.Module, samples: Samples, *, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """The logits for labelled samples of a model that takes the batch: `(logits_NC, labels_N)`, on its device.

    In eval mode without gradients; each module gets its own mode back afterwards. Raises `UserError` where there are no
    samples or no labels.
    """
    if not len(samples):
        raise UserError("There are no samples to evaluate on; give a split that is not empty.")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with evaluating(model), torch.inference_mode():
        logits_NC = torch.cat([model(fields) for fields in batches(samples, device, batch_size)]).float()
    return logits_NC, samples.labels.to(device)

"""No label reads a value back from the device in a step: on the meta device, which has no values, reading fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from limbeck import labels

P = torch.empty(8, 4, device="meta")
INDEX = torch.empty(8, dtype=torch.int64, device="meta")
SCORES = torch.empty(8, device="meta")


def written_and_read() -> Tensor:
    table = labels.PredictionTable(torch.zeros(20, dtype=torch.int64), 4).to("meta")
    table.write(INDEX, P)
    return table.read(INDEX)


CALLS: dict[str, Callable[[], object]] = {
    "one_hot": lambda: labels.one_hot(INDEX, 4),
    "soften": lambda: labels.soften(P, 2.0),
    "sharpen": lambda: labels.sharpen(P, 0.5),
    "mix_targets": lambda: labels.mix_targets(P, P, SCORES),
    "pseudo_labels": lambda: labels.pseudo_labels(P, hard=True, mask=SCORES),
    "fixed": lambda: labels.fixed(P, 0.9, strict=True),
    "percentile": lambda: labels.percentile(SCORES, 0.8, keep="low", strict=True, mask=SCORES),
    "class_adaptive": lambda: labels.ClassAdaptive(20, 4).to("meta")(P, INDEX),
    "self_adaptive": lambda: labels.SelfAdaptive(4).to("meta")(P),
    "running_quantile": lambda: labels.RunningQuantile(4).to("meta")(P),
    "queue_alignment": lambda: labels.DistributionAlignment(4).to("meta")(P),
    "average_alignment": lambda: labels.AverageAlignment(4).to("meta")(P),
    "truncated_gaussian": lambda: labels.TruncatedGaussian(4).to("meta")(P),
    **{name: partial(getattr(labels, name), P) for name in ("confidence", "certainty", "margin", "hard")},
    "prediction_table": written_and_read,
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_read_back_from_the_device(name: str) -> None:
    CALLS[name]()


def test_reading_a_value_back_would_be_noticed() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        P[P > 0.5]
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(SCORES.sum())

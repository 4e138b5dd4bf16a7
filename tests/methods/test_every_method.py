"""What holds for a step of every method, tried on the meta device.

That device has no values, so reading one back from it fails.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from limbeck.data import Samples, Stream
from limbeck.methods.classification.kd import KD
from limbeck.methods.classification.ps_kd import PSKD
from limbeck.methods.classification.supervised import Supervised
from limbeck.methods.few_labels.dho import DHO
from limbeck.methods.few_labels.fixmatch import FixMatch
from limbeck.methods.few_labels.shrinkmatch import ShrinkMatch
from limbeck.teachers import Frozen
from limbeck.train import Losses, Method

B, C = 4, 5


def net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, C))


def teacher() -> Frozen:
    return Frozen(net().to("meta"))


METHODS: dict[str, Callable[[], Method]] = {
    "supervised": lambda: Supervised(net(), label_smoothing=0.1),
    "kd": lambda: KD(net(), teacher()),
    "ps_kd": lambda: PSKD(net()),
    "fixmatch": lambda: FixMatch(net(), align=True),
    "shrinkmatch": lambda: ShrinkMatch(net(), align=True),
    "dho": lambda: DHO(net(), teacher(), measure_conflict=True),
}


def one_step(name: str) -> tuple[Method, Losses]:
    method = METHODS[name]()
    samples = Samples({"image": torch.zeros(B, 1), "label": torch.arange(B)})
    method.prepare({"labelled": Stream(samples, B)})
    method.to("meta")
    view, integers = torch.empty(B, 1, 4, 4, device="meta"), torch.empty(B, dtype=torch.long, device="meta")
    fields = {"weak": view, "strong": view, "label": integers, "index": integers, "hidden_label": integers}
    return method, method.training_step({"labelled": fields, "unlabelled": fields})


@pytest.mark.parametrize("name", METHODS)
def test_no_logged_value_has_the_name_of_a_loss(name: str) -> None:
    """They would be averaged into one column."""
    method, losses = one_step(name)
    assert not method.logged.keys() & losses.keys()


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_those_of_loss_terms(name: str) -> None:
    """A weight of a term that is not there would silently do nothing."""
    method, losses = one_step(name)
    assert method.weights.keys() <= losses.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_step_reads_nothing_back_from_the_device(name: str) -> None:
    method, losses = one_step(name)
    total: Tensor = sum(losses.values())  # type: ignore[assignment]
    total.backward()
    method.after_step()
    assert total.device.type == "meta" and total.shape == ()

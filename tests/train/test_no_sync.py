"""A step never waits for the device: nothing in it turns a tensor's values into Python numbers or shapes.

A CPU has nothing to wait for, so the operations that would wait on an accelerator are counted instead. The view
`Strong` is left out: it reads numbers too, but draws them on the host in the first place.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.data import Stream
from limbeck.data.views import make_view
from limbeck.methods.classification.kd import KD
from limbeck.methods.classification.ps_kd import PSKD
from limbeck.methods.classification.supervised import Supervised
from limbeck.methods.few_labels.dho import DHO
from limbeck.methods.few_labels.fixmatch import FixMatch
from limbeck.methods.few_labels.shrinkmatch import ShrinkMatch
from limbeck.teachers import Ensemble, Frozen
from limbeck.train import Loop, Optimizer
from limbeck.train.loop import RunningTerms
from tests.train.toys import Classify, norm_net, pictures, trainer

aten = torch.ops.aten
SHAPE_FROM_VALUES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.equal.default}


class Waits(TorchDispatchMode):
    """Names of the operations that read values."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if function is aten._local_scalar_dense.default or function in SHAPE_FROM_VALUES or by_mask:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def views(*names):
    return {name: make_view("weak") for name in names}


def teacher():
    return Frozen(norm_net(seed=1))


METHODS = {
    "supervised": lambda: Supervised(norm_net()),
    "kd": lambda: KD(norm_net(), teacher()),
    "kd_ensemble": lambda: KD(norm_net(), Ensemble([teacher(), teacher()], average="probabilities", weights=[1, 3])),
    "ps_kd": lambda: PSKD(norm_net()),
    "dho": lambda: DHO(norm_net(), teacher(), measure_conflict=True),
    "fixmatch": lambda: FixMatch(norm_net(), align=True, threshold=0.3),
    "shrinkmatch": lambda: ShrinkMatch(norm_net(), align=True, threshold=0.3),
    "shrinkmatch_hard": lambda: ShrinkMatch(norm_net(), target="hard", threshold=0.3),
}


def waits_in_a_step(method, **settings) -> list[str]:
    loop = Loop(
        method,
        {
            "labelled": Stream(pictures(12), 4, views("weak")),
            "unlabelled": Stream(pictures(24, labelled=False), 8, views("weak", "strong")),
        },
        trainer(steps=20, ema_decay=0.9, **settings),
    )
    loop.sums = RunningTerms(check_each_step=False, checkpoint=None)
    loop.method.train()
    loop.step()  # buffers of the optimiser are made in the first step
    with Waits() as waits:
        for _ in range(3):
            loop.step()
    return waits.found


@pytest.mark.parametrize("name", METHODS)
def test_a_step_reads_no_value_from_the_device(name):
    assert waits_in_a_step(METHODS[name]()) == []


@pytest.mark.parametrize(
    "settings",
    [{"accumulate": 2}, {"clip_norm": 1.0}, {"precision": "bf16-mixed"}, {"optimizer": Optimizer("lars")}],
    ids=["accumulate", "clip", "bf16", "lars"],
)
def test_no_setting_of_the_trainer_makes_a_step_wait(settings):
    assert waits_in_a_step(METHODS["kd"](), **settings) == []


def test_one_row_of_the_log_reads_the_device_once():
    loop = Loop(KD(norm_net(), teacher()), {"labelled": Stream(pictures(12), 4, views("weak"))}, trainer())
    loop.sums = RunningTerms(check_each_step=False, checkpoint=None)
    loop.logs.start(0, 6)
    loop.step()
    reads = []
    read = torch.Tensor.tolist

    def counted(tensor):
        reads.append(tensor.shape)
        return read(tensor)

    torch.Tensor.tolist = counted
    try:
        with Waits() as waits:
            loop.report()
    finally:
        torch.Tensor.tolist = read
    assert len(reads) == 1 and set(waits.found) <= {"aten._local_scalar_dense.default"}


def test_reading_a_value_in_a_step_would_be_counted():
    class Careless(Classify):
        def training_step(self, batch):
            images = batch["labelled"]["weak"]
            if images.mean() > 0:
                images[batch["labelled"]["label"] == 1].sum().item()
            return super().training_step(batch)

    assert len(waits_in_a_step(Careless(norm_net()))) >= 3 * 3

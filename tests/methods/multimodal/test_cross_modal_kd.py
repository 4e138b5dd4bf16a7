"""Cross-modal KD: one formula, four sources."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.data import Data, Samples
from limbeck.errors import UserError
from limbeck.evaluate.multimodal import MultimodalEvaluator
from limbeck.methods.multimodal.cross_modal_kd import CrossModalKD, TaskTraining, cross_modal_kd
from limbeck.models.multimodal import load_multimodal_model
from limbeck.teachers import Frozen
from limbeck.teachers.routed import Routed
from limbeck.train import Optimizer, Stage, StreamSettings, Trainer, Workspace

SHAPES = {"image": (1, 8, 8), "spectrogram": (1, 8, 8)}
CNN = {"name": "small_cnn", "config": {"channels": [4, 6]}}


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    know = {"num_classes": 3, "shapes": SHAPES}
    return {
        "student": load_multimodal_model(**CNN, modality="spectrogram", **know),
        "fused": load_multimodal_model(encoders=dict.fromkeys(SHAPES, CNN), hidden=8, **know),
        "other": load_multimodal_model(**CNN, modality="image", **know),
    }


def samples() -> Samples:
    generator = torch.Generator().manual_seed(0)
    fields = {name: torch.rand(12, *shape, generator=generator) for name, shape in SHAPES.items()}
    return Samples({**fields, "label": torch.arange(12) % 3})


def run(folder, **more):
    stage = Stage(
        Trainer(epochs=1, optimizer=Optimizer("adam", lr=0.01), accelerator="cpu"),
        {"labelled": StreamSettings(batch_size=6, views={})},
    )
    ws = Workspace(folder, evaluator=MultimodalEvaluator())
    data = Data(samples(), samples(), validation=samples())
    return ws, cross_modal_kd(
        ws, data, **{**networks(), **more.pop("change", {})}, pretrain=stage, distill=stage, **more
    )


def test_the_loss_is_the_mean_of_the_teachers_terms():
    nets = {name: net.eval() for name, net in networks().items()}
    fields = dict(samples().fields)
    pool = Routed([Frozen(nets["fused"]), Frozen(nets["other"])])
    losses = CrossModalKD(nets["student"], pool, temperature=2.0).training_step({"labelled": fields})
    z = nets["student"](fields)
    terms = [
        4 * F.kl_div((z / 2).log_softmax(1), (nets[name](fields) / 2).softmax(1), reduction="batchmean")
        for name in ("fused", "other")
    ]
    torch.testing.assert_close(losses["kd"], sum(terms) / 2)
    torch.testing.assert_close(losses["ce"], F.cross_entropy(z, fields["label"]))


def test_teachers_learn_the_task_side_by_side_and_independently():
    nets = {name: net for name, net in networks().items() if name != "student"}
    losses = TaskTraining(nets).training_step({"labelled": dict(samples().fields)})
    assert list(losses) == ["ce_fused", "ce_other"]
    losses["ce_fused"].backward()
    assert all(p.grad is None for p in nets["other"].parameters())


@pytest.mark.parametrize(
    ("source", "taught_by"),
    [("fused", ["fused"]), ("other", ["other"]), ("average", ["fused", "other"]), ("none", [])],
)
def test_only_the_teachers_of_the_source_are_trained(tmp_path, source, taught_by):
    ws, student = run(tmp_path, source=source)
    assert list(ws.fits) == (["pretrain", "distill"] if taught_by else ["distill"])
    assert [name.removeprefix("teachers.") for name in ws.measured] == taught_by
    assert ("kd" in ws.fits["distill"].train[0]) == bool(taught_by)
    assert student.modalities == ("spectrogram",)


def test_a_source_without_its_network_is_refused(tmp_path):
    with pytest.raises(UserError, match="source 'average' needs the network 'other'"):
        run(tmp_path, source="average", change={"other": None})

"""Objectives that systems of several stages use as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import Data, Optimizer, Samples, Stage, StreamSettings, Trainer, UserError, Workspace
from limbeck.train import CrossEntropy, linear_probe
from tests.train.toys import plain_net


def test_cross_entropy_is_torchs_with_the_smoothing_that_was_asked_for():
    net, batch = plain_net(), {"weak": torch.rand(4, 3, 8, 8), "label": torch.arange(4)}
    loss = CrossEntropy(net, label_smoothing=0.2).training_step({"labelled": batch})["ce"]
    torch.testing.assert_close(loss, F.cross_entropy(net(batch["weak"]), batch["label"], label_smoothing=0.2))


def test_a_smoothing_that_is_no_share_is_refused():
    with pytest.raises(UserError, match="label_smoothing"):
        CrossEntropy(plain_net(), label_smoothing=1.2)


def separable(count: int = 60) -> Data:
    """Pictures whose first pixel tells the class."""
    label = torch.arange(count) % 3
    image = torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.1
    image[:, 0, 0, 0] += 0.3 * label
    samples = Samples({"image": image, "label": label})
    return Data(samples, samples)


def probed(folder, encoder: nn.Module) -> nn.Module:
    settings = Stage(
        Trainer(steps=150, optimizer=Optimizer("adamw", lr=0.05)),
        {"labelled": StreamSettings(20, {"weak": "identity"})},
    )
    return linear_probe(Workspace(folder), "probe", encoder, 4, separable(), settings)


def test_a_linear_probe_learns_what_the_embeddings_tell_and_leaves_the_encoder_alone(tmp_path):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    classifier = probed(tmp_path, encoder).eval()
    data = separable()
    predicted = classifier(data.test.fields["image"]).argmax(1)
    assert (predicted == data.test.labels).float().mean() > 0.95
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_a_probes_embeddings_are_computed_once(tmp_path):
    calls = []
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    encoder.register_forward_hook(lambda *_: calls.append(1))
    probed(tmp_path, encoder)
    assert len(calls) == 1, "one batch holds all 60 samples"
    probed(tmp_path, encoder)
    assert len(calls) == 1, "they were loaded"


def test_a_workspace_evaluates_by_its_own_evaluator(tmp_path):
    data = separable()
    workspace = Workspace(tmp_path, evaluator=lambda model, samples: {"rows": float(len(samples))})
    assert workspace.evaluate(nn.Identity(), data.test) == {"rows": 60.0}
    with pytest.raises(UserError, match="no evaluator"):
        Workspace(tmp_path / "other").evaluate(nn.Identity(), data.test)


def test_what_was_measured_is_measured_once_and_kept(tmp_path):
    calls = []
    for _ in range(2):
        workspace = Workspace(tmp_path)
        assert workspace.measure("codes", lambda: {"used": 3 + len(calls)} if not calls.append(1) else {}) == {
            "used": 4.0
        }
        assert workspace.measured == {"codes.used": 4.0}
    assert len(calls) == 1

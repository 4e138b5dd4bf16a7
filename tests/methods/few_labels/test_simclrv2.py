"""SimCLRv2: the contrastive loss, the classifier that starts inside the projection head, and distillation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import Data, Optimizer, Stage, StreamSettings, Trainer, UserError, Workspace
from limbeck.methods.few_labels.simclrv2 import Classifier, Distill, SimCLR, simclrv2
from limbeck.models import Projector
from limbeck.recipes import run
from limbeck.recipes.recipe import override, read
from limbeck.teachers import Frozen
from limbeck.train.checkpoint import load_tensors
from tests.train.toys import norm_net, pictures


class Vectors(nn.Module):
    """An encoder and a projector in one: the pictures' own numbers."""

    def forward(self, image):
        return image.flatten(1)


def contrast(first, second, temperature=0.5):
    method = SimCLR(Vectors(), nn.Identity(), temperature=temperature)
    return method.training_step({"unlabelled": {"first": first, "second": second}})["contrast"]


def test_identical_views_of_orthogonal_pictures_have_the_closed_form():
    views = torch.eye(6)
    expected = 2 * math.log(1 + (2 * 6 - 2) * math.exp(-1 / 0.5))
    torch.testing.assert_close(contrast(views, views), torch.tensor(expected))


def test_the_loss_is_cross_entropy_over_the_other_views_with_the_own_one_left_out():
    torch.manual_seed(0)
    a, b = F.normalize(torch.randn(5, 7), dim=1), F.normalize(torch.randn(5, 7), dim=1)
    own = torch.eye(5).bool()
    logits_a = torch.cat([a @ b.T, (a @ a.T).masked_fill(own, -torch.inf)], 1) / 0.5
    logits_b = torch.cat([b @ a.T, (b @ b.T).masked_fill(own, -torch.inf)], 1) / 0.5
    target = torch.arange(5)
    torch.testing.assert_close(contrast(a, b), F.cross_entropy(logits_a, target) + F.cross_entropy(logits_b, target))


def test_the_length_of_a_projection_does_not_matter():
    torch.manual_seed(0)
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    torch.testing.assert_close(contrast(3 * a, b), contrast(a, 0.1 * b))


def test_the_projector_has_no_relu_and_no_shift_at_its_end():
    torch.manual_seed(0)
    projector = Projector(8, out=4, layers=3)
    assert [len(layer) for layer in projector.layers] == [3, 3, 2]
    assert not projector.layers[-1][1].bias.requires_grad and projector.layers[0][1].bias.requires_grad
    assert all(layer[0].bias is None for layer in projector.layers)
    out = projector(torch.randn(64, 8))
    assert (out < 0).any()
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("layers", "modules"), [(0, 0), (1, 1), (3, 3)])
def test_the_classifier_keeps_the_first_layers_of_the_head_and_shares_them(layers, modules):
    projector = Projector(8, hidden=6, out=4)
    kept = projector.first(layers)
    assert len(kept) == modules
    assert all(mine is theirs for mine, theirs in zip(kept, projector.layers, strict=False))
    net = Classifier(nn.Identity(), kept, projector.widths[layers], 10)
    assert net(torch.randn(5, 8)).shape == (5, 10)
    assert net.head.in_features == [8, 6, 6, 4][layers]


def test_another_layer_to_start_from_gives_another_feature():
    torch.manual_seed(0)
    projector, features = Projector(8, out=8), torch.randn(16, 8)
    assert not torch.allclose(projector.first(0)(features), projector.first(1)(features))


def test_the_new_head_is_spared_from_decay_and_adaptation():
    net = Classifier(nn.Linear(8, 8), nn.Identity(), 8, 10)
    built = Optimizer("lars", lr=1.0, weight_decay=0.1).build(net.parameters())
    groups = {id(p): group for group in built.param_groups for p in group["params"]}
    head, encoder = groups[id(net.head.weight)], groups[id(net.encoder.weight)]
    assert head["weight_decay"] == 0 and not head["adapt"]
    assert encoder["weight_decay"] == 0.1 and encoder["adapt"]


@pytest.mark.parametrize("t", [0.5, 1.0, 3.0])
def test_the_gradient_of_distillation_is_t_times_the_difference_of_the_softened_probabilities(t):
    torch.manual_seed(0)
    logits = torch.randn(6, 5, requires_grad=True)
    teacher = torch.randn(6, 5)
    method = Distill(nn.Identity(), Frozen(_Constant(teacher)), temperature=t)
    method.training_step({"unlabelled": {"weak": logits}})["distill"].backward()
    expected = t * ((logits / t).softmax(1) - (teacher / t).softmax(1)) / 6
    torch.testing.assert_close(logits.grad, expected.detach())


class _Constant(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, _):
        return self.logits


def test_a_student_that_equals_its_teacher_has_no_gradient_and_the_teachers_entropy_as_loss():
    torch.manual_seed(0)
    logits = torch.randn(6, 5, requires_grad=True)
    method = Distill(nn.Identity(), Frozen(_Constant(logits.detach().clone())))
    loss = method.training_step({"unlabelled": {"weak": logits}})["distill"]
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-7, rtol=0)
    p = logits.softmax(1)
    torch.testing.assert_close(loss, -(p * p.log()).sum(1).mean())


def test_alpha_one_has_no_labelled_stream_and_alpha_zero_is_plain_cross_entropy():
    net = norm_net()
    assert set(Distill(net, Frozen(norm_net(1)), alpha=1.0).streams) == {"unlabelled"}
    method = Distill(net, Frozen(norm_net(1)), alpha=0.0)
    assert set(method.streams) == {"unlabelled", "labelled"} and method.weights == {"ce": 1.0, "distill": 0.0}
    batch = {"weak": torch.rand(4, 3, 8, 8), "label": torch.arange(4)}
    losses = method.training_step({"unlabelled": batch, "labelled": batch})
    torch.testing.assert_close(losses["ce"], F.cross_entropy(net(batch["weak"]), batch["label"]), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the three stages


def data() -> Data:
    return Data(pictures(16), pictures(8), unlabelled=pictures(32, seed=1, labelled=False), name="toys")


def stage(stream: str, views: dict[str, str], steps: int = 6) -> Stage:
    trainer = Trainer(steps=steps, optimizer=Optimizer("adamw", lr=1e-2), checkpoint_every=2, log_every=2)
    return Stage(trainer, {stream: StreamSettings(8, views)})


def whole(folder: Path, **more) -> nn.Module:
    torch.manual_seed(0)
    nets = {"student": norm_net(5, dropout=0.3), "teacher": norm_net(6, dropout=0.3)}
    stages = {
        "pretrain": stage("unlabelled", {"first": "weak", "second": "weak"}),
        "finetune": stage("labelled", {"weak": "weak"}),
        "distill": stage("unlabelled", {"weak": "weak"}),
    }
    return simclrv2(Workspace(folder, {"run": "toys"}, seed=1), data(), **nets, **{**stages, **more})


def test_all_three_stages_run_and_the_student_ships(tmp_path):
    shipped = whole(tmp_path)
    assert {"pretrain", "finetune", "distill"} == {path.name for path in (tmp_path / "stages").iterdir()}
    assert not isinstance(shipped, Classifier)


def test_without_distillation_the_fine_tuned_teacher_ships(tmp_path):
    assert isinstance(whole(tmp_path, distill=None), Classifier)


def test_self_distillation_comes_before_the_student(tmp_path):
    whole(tmp_path, self_distill=stage("unlabelled", {"weak": "weak"}))
    assert (tmp_path / "stages/self_distill/done.json").exists()


def test_the_fine_tuned_teacher_is_as_it_was_after_distillation(tmp_path):
    tuned = whole(tmp_path / "a", distill=None).state_dict()
    whole(tmp_path / "b")
    stored = load_tensors(tmp_path / "b/stages/finetune/method.safetensors")
    assert all(torch.equal(stored[f"student.{name}"], value) for name, value in tuned.items())


def test_data_without_unlabelled_samples_are_refused(tmp_path):
    with pytest.raises(UserError, match="data have none"):
        simclrv2(
            Workspace(tmp_path),
            Data(pictures(16), pictures(8)),
            norm_net(),
            norm_net(),
            pretrain=stage("unlabelled", {}),
            finetune=stage("labelled", {}),
        )


def test_a_layer_that_the_head_does_not_have_is_refused(tmp_path):
    with pytest.raises(UserError, match="finetune_layer is 4"):
        whole(tmp_path, finetune_layer=4)


@pytest.mark.slow
def test_a_vision_transformer_of_real_size_takes_a_step_of_every_stage_by_the_recipe_alone(tmp_path):
    recipe = override(
        read("simclrv2"),
        {
            "data": {"name_or_path": "digits", "limit": {"train": 40, "test": 2}, "labels_per_class": 2},
            "teacher": {"name": "hf-config:vit", "config": {"image_size": 8, "patch_size": 2}},  # ViT-B
            **{f"stages.{stage}.trainer": {"steps": 1} for stage in ("pretrain", "finetune", "distill")},
            "stages.pretrain.streams.unlabelled.batch_size": 4,
            "stages.finetune.streams.labelled.batch_size": 4,
            "stages.distill.streams.unlabelled.batch_size": 4,
        },
    )
    result = run(recipe, workspace=tmp_path, report=False)
    sizes = [path.stat().st_size for path in (tmp_path / "stages").glob("*/method.safetensors")]
    assert max(sizes) > 4 * 80e6, "the teacher has more than 80 million weights"
    assert result.metrics["steps"] == 3

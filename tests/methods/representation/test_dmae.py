"""DMAE: one mask for two networks, a teacher that stops early, features that are aligned as directions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from limbeck import Optimizer, Samples, Trainer, UserError
from limbeck.methods.representation.dmae import DMAE
from limbeck.methods.representation.mae import MAE
from limbeck.recipes import run
from limbeck.recipes.recipe import override, read
from limbeck.teachers import Frozen
from limbeck.train import fit
from tests.models.test_mae import TINY, network
from tests.train.toys import stream


def method(student=None, teacher=None, **more) -> DMAE:
    return DMAE(student or network(), Frozen(teacher or network(1)), **more)


def step(made: DMAE, seed: int = 3, rows: int = 4):
    torch.manual_seed(seed)
    return made.training_step({"unlabelled": {"weak": torch.rand(rows, 1, 8, 8)}})


def test_equal_networks_with_an_identity_head_are_aligned_already():
    made = method(network(0), network(0))
    made.eval()
    nn.init.eye_(made.heads[0].weight)
    nn.init.zeros_(made.heads[0].bias)
    torch.testing.assert_close(step(made)["align"], torch.tensor(0.0), atol=1e-6, rtol=0)


def test_another_mask_for_the_teacher_would_not_be_aligned():
    made = method(network(0), network(0)).eval()
    nn.init.eye_(made.heads[0].weight)
    nn.init.zeros_(made.heads[0].bias)
    image = torch.rand(4, 1, 8, 8)
    keep, other = torch.arange(4).expand(4, -1), torch.arange(4, 8).expand(4, -1)
    mine = [made.student.blocks(image, keep)[made.student_blocks[0]]]
    assert made.alignment(mine, made.teacher_features(image, other)) > 1e-3


def test_alignment_looks_at_directions_alone_and_is_bounded_by_the_width():
    torch.manual_seed(0)
    made = method(student_blocks=[2], teacher_blocks=[2])
    made.heads[0].bias.data.zero_()
    mine, theirs = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    value = made.alignment([mine], [theirs])
    torch.testing.assert_close(made.alignment([3 * mine], [0.2 * theirs]), value)
    assert value <= 2 / math.sqrt(8) + 1e-6


def test_zero_features_stay_zero_and_their_gradient_is_finite():
    made = method()
    made.heads[0].bias.data.zero_()
    mine = torch.zeros(2, 3, 8, requires_grad=True)
    value = made.alignment([mine], [torch.randn(2, 3, 8)])
    value.backward()
    assert value.isfinite() and mine.grad.isfinite().all()


def test_the_default_blocks_stand_at_three_quarters_of_the_depth():
    made = method(network(config={"num_hidden_layers": 12}), network(config={"num_hidden_layers": 24}))
    assert (made.student_blocks, made.teacher_blocks) == ((8,), (17,))


def test_the_teacher_runs_no_further_than_its_block_and_never_its_decoder():
    teacher, calls = network(1), []
    for number, block in enumerate(teacher.model.vit.layers):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    teacher.model.decoder.register_forward_hook(lambda *_: calls.append("decoder"))
    step(method(teacher=teacher, teacher_blocks=[1], student_blocks=[0]))
    assert calls == [0, 1]


def test_no_gradient_reaches_the_teacher_and_it_is_no_part_of_the_checkpoint():
    made = method()
    sum(step(made).values()).backward()
    assert all(p.grad is None for p in made.teacher.model.parameters())
    assert made.student.model.vit.embeddings.patch_embeddings.projection.weight.grad is not None
    assert not any("teacher" in name for name in made.state_dict())


def test_several_layers_have_a_head_each_and_their_losses_are_summed():
    made = method(student_blocks=[0, 2], teacher_blocks=[1, 3])
    assert len(made.heads) == 2
    mine, theirs = [torch.randn(2, 3, 8) for _ in range(2)], [torch.randn(2, 3, 8) for _ in range(2)]
    both = made.alignment(mine, theirs)
    made.heads, first = made.heads[:1], made.heads[0]
    one = made.alignment(mine[:1], theirs[:1])
    made.heads = nn.ModuleList([nn.Linear(8, 8)])
    assert first is not made.heads[0] and both > one


def test_without_alignment_it_is_mae_step_for_step():
    pictures = Samples({"image": torch.rand(16, 1, 8, 8)})
    trainer = Trainer(steps=5, optimizer=Optimizer("adamw", lr=1e-2))
    nets = [network(), network()]
    plain, none = MAE(nets[0]), DMAE(nets[1], Frozen(network(1)), align_weight=0.0)
    for made in (plain, none):
        fit(made, {"unlabelled": stream(pictures)}, trainer)
    for mine, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"student_blocks": [9]}, r"student_blocks is \[9\]; the student has 4 blocks"),
        ({"teacher_blocks": [1, 2]}, "1 student_blocks and 2 teacher_blocks"),
        ({"mask_ratio": 1.5}, "mask_ratio"),
    ],
)
def test_what_does_not_fit_is_named(arguments, named):
    with pytest.raises(UserError, match=named):
        method(**arguments)


def test_networks_that_cut_pictures_otherwise_are_refused():
    with pytest.raises(UserError, match="4 patches and the student into 16"):
        method(teacher=network(config={"patch_size": 4}))


DIGITS = {"name_or_path": "digits", "labels_per_class": 10}
SMALL = {f"stages.{stage}.trainer": {"steps": 2} for stage in ("pretrain", "probe", "finetune")}


def teacher_recipe() -> dict:
    student = {"name": "hf-config:vit_mae", "config": TINY}
    return {"run": {"method": "mae", "data": DIGITS, "student": student, "trainer": {"steps": 2}}}


def test_the_recipe_pretrains_probes_and_fine_tunes(tmp_path):
    recipe = override(read("dmae"), {"data": DIGITS, "teacher": teacher_recipe(), "student.config": TINY, **SMALL})
    result = run(recipe, workspace=tmp_path)
    assert {"accuracy", "linear.accuracy"} <= result.metrics.keys()
    assert result.student(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    page = (tmp_path / "report.html").read_text()
    assert "what it painted" in page and "Embeddings of test samples" in page


@pytest.mark.slow
def test_a_vit_base_takes_a_step_by_the_recipe_alone(tmp_path):
    recipe = override(
        read("dmae"),
        {
            "data": {"name_or_path": "digits", "labels_per_class": 2, "limit": {"train": 40, "test": 4}},
            "teacher": teacher_recipe(),
            "student": {"name": "hf-config:vit_mae", "config": {"patch_size": 2}},  # all else is ViT-B with 8 blocks
            "stages.pretrain.streams.unlabelled.batch_size": 4,
            "stages.finetune.streams.labelled.batch_size": 4,
            "stages.probe": None,
            "stages.pretrain.trainer": {"steps": 1},
            "stages.finetune.trainer": {"steps": 1},
        },
    )
    result = run(recipe, workspace=tmp_path, report=False)
    assert result.metrics["parameters"] > 80e6

"""A frozen teacher is no part of the method that holds it, and its outputs can be learnt from."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.losses import kl_divergence
from limbeck.teachers import Frozen, Teacher
from limbeck.train import Method


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


class Holder(Method):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = net(), Frozen(net(1))


IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
FIELDS = {"weak": IMAGES}


def test_a_frozen_teacher_is_neither_in_the_parameters_nor_in_the_state():
    method = Holder()
    weights = {id(p) for p in method.teacher.model.parameters()}
    assert not weights & {id(p) for p in method.parameters()}
    assert all(name.startswith("student.") for name in method.state_dict())
    assert method.teachers() == {"teacher": method.teacher}


def test_a_frozen_teacher_stays_in_eval_mode_and_without_gradients():
    method = Holder()
    method.train()
    assert not any(module.training for module in method.teacher.model.modules())
    assert not any(p.requires_grad for p in method.teacher.model.parameters())


def test_a_deep_copy_of_the_method_shares_the_teacher():
    method = Holder()
    copied = copy.deepcopy(method)
    assert copied.teacher is method.teacher and copied.student is not method.student


@pytest.mark.parametrize("taps", [(), ("1",)])
def test_outputs_are_those_of_the_model_in_eval_mode(taps):
    outputs = Frozen(net(), taps=taps)(FIELDS, "weak")
    model = net().eval()
    torch.testing.assert_close(outputs.logits, model(IMAGES).detach())
    for name in taps:
        torch.testing.assert_close(outputs.features[name], model[:2](IMAGES).detach())


@pytest.mark.parametrize("taps", [(), ("1",)])
def test_outputs_can_be_targets_of_every_kind_of_loss(taps):
    """Tensors born in inference mode may not be saved for backward, nor written to."""
    outputs = Frozen(net(1), taps=taps)(FIELDS, "weak")
    student = net()
    logits = student(IMAGES)
    loss = F.mse_loss(logits, outputs.logits) + (logits * outputs.logits).mean()
    loss = loss + kl_divergence(logits, outputs.logits, temperature=2.0, scale_by_t2=True, reduction="batchmean")
    for feature in outputs.features.values():
        loss = loss + (student[:2](IMAGES) * feature).mean()
    loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    outputs.logits.add_(1).requires_grad_()
    assert not outputs.logits.is_inference()


def test_nothing_of_the_teacher_moves_when_the_student_learns_from_it():
    teacher, student = Frozen(net(1)), net()
    before = copy.deepcopy(teacher.model.state_dict())
    for _ in range(3):
        F.mse_loss(student(IMAGES), teacher(FIELDS, "weak").logits).backward()
    assert all(torch.equal(value, teacher.model.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in teacher.model.parameters())


def test_batch_statistics_normalise_by_the_batch_and_move_nothing():
    teacher = Frozen(net(), batch_statistics=True)
    before = copy.deepcopy(teacher.model.state_dict())
    answers = [teacher(FIELDS, "weak").logits for _ in range(2)]
    torch.testing.assert_close(answers[0], net().train()(IMAGES).detach())
    assert torch.equal(*answers)
    assert all(torch.equal(value, teacher.model.state_dict()[name]) for name, value in before.items())
    assert not torch.allclose(answers[0], net().eval()(IMAGES))


def test_the_view_that_is_asked_for_is_the_one_that_is_read():
    teacher = Frozen(net())
    fields = {"weak": IMAGES, "strong": IMAGES.flip(0)}
    torch.testing.assert_close(teacher(fields, "strong").logits, teacher(fields, "weak").logits.flip(0))


def test_class_count_is_that_of_the_head_and_unknown_without_one():
    assert Frozen(net()).class_count == 5
    assert Frozen(nn.Conv2d(3, 3, 1)).class_count is None


def test_a_teacher_moves_to_a_memory_format():
    teacher = Frozen(net())
    assert teacher.to(memory_format=torch.channels_last) is teacher
    assert teacher.model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_teacher_must_answer():
    with pytest.raises(NotImplementedError):
        Teacher()(FIELDS, "weak")

"""KD: both ends of alpha, zero where teacher and student agree, the factor T^2, and a teacher that stays out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.data import Samples, Stream, Weak
from limbeck.errors import UserError
from limbeck.methods.classification.kd import KD
from limbeck.teachers import Frozen
from limbeck.train import Losses

B, C, D = 6, 5, 16


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, C))


def batch(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weak = torch.rand(B, 1, 4, 4, generator=generator)
    return {"labelled": {"weak": weak, "label": torch.randint(C, (B,), generator=generator)}}


def total(method: KD, losses: Losses) -> Tensor:
    return sum(method.now(method.weights.get(name, 1.0)) * value for name, value in losses.items())


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0, 1), temperature=st.floats(0.5, 20), seed=st.integers(0, 1000))
def test_loss_is_the_papers_mixture(alpha, temperature, seed):
    student, teacher, data = net(seed), net(seed + 1).eval(), batch(seed)
    method = KD(student, Frozen(teacher), temperature=temperature, alpha=alpha)
    got = total(method, method.training_step(data))
    z_s, z_t = student(data["labelled"]["weak"]), teacher(data["labelled"]["weak"])
    kl = F.kl_div((z_s / temperature).log_softmax(-1), (z_t / temperature).softmax(-1), reduction="batchmean")
    want = (1 - alpha) * F.cross_entropy(z_s, data["labelled"]["label"]) + alpha * temperature**2 * kl
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_alpha_0_is_cross_entropy_and_alpha_1_ignores_the_labels():
    data, other = batch(), batch()
    other["labelled"]["label"] = (data["labelled"]["label"] + 1) % C
    plain = KD(net(0), Frozen(net(1)), alpha=0.0)
    loss = total(plain, plain.training_step(data))
    assert loss == F.cross_entropy(plain.student(data["labelled"]["weak"]), data["labelled"]["label"])
    blind = KD(net(0), Frozen(net(1)), alpha=1.0)
    assert total(blind, blind.training_step(data)) == total(blind, blind.training_step(other))


def test_divergence_and_its_gradient_are_zero_when_student_equals_teacher():
    student = nn.Sequential(nn.Flatten(), nn.Linear(D, C))
    method = KD(student, Frozen(copy.deepcopy(student)))
    kd = method.training_step(batch())["kd"]
    kd.backward()
    assert kd.abs() < 1e-6
    assert student[1].weight.grad.abs().max() < 1e-6


def test_teacher_and_student_see_the_same_augmented_picture():
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, C))
    samples = Samples({"image": torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8), "label": torch.arange(8) % C})
    stream = Stream(samples, 8, {"weak": Weak(padding=3)})
    stream.open("labelled", seed=0)
    rendered = stream.render(stream.next())
    assert not torch.equal(rendered["weak"], rendered["image"])
    assert KD(student, Frozen(copy.deepcopy(student))).training_step({"labelled": rendered})["kd"].abs() < 1e-6


def test_at_high_temperature_the_gradient_is_that_of_matching_centred_logits():
    """T^2 KL tends to |centred z_S - centred z_T|^2 / 2C, whatever T is (Hinton et al., section 2.1)."""
    for temperature in (50.0, 100.0):
        student = nn.Linear(B, C, bias=False)  # on the identity matrix: logits_BC = weight_CB transposed
        teacher = nn.Linear(B, C, bias=False)
        method = KD(student, Frozen(teacher), temperature=temperature)
        method.training_step({"labelled": {"weak": torch.eye(B), "label": torch.zeros(B, dtype=torch.long)}})[
            "kd"
        ].backward()
        difference = (student.weight - teacher.weight).detach().T
        want = (difference - difference.mean(-1, keepdim=True)) / (B * C)
        torch.testing.assert_close(student.weight.grad.T, want, rtol=0.05, atol=2e-4)


def test_the_teacher_is_neither_trained_nor_saved_nor_put_in_training_mode():
    teacher = net(1)
    before = copy.deepcopy(teacher.state_dict())
    method = KD(net(0), Frozen(teacher))
    method.train()
    losses = method.training_step(batch())
    total(method, losses).backward()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert {p.data_ptr() for p in method.parameters()}.isdisjoint(p.data_ptr() for p in teacher.parameters())
    assert all(name.startswith("student.") for name in method.state_dict())


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"temperature": -1.0}, {"alpha": 1.5}, {"alpha": -0.1}])
def test_settings_out_of_range_are_refused_at_the_door(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        KD(net(0), Frozen(net(1)), **setting)

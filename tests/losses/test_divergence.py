"""Facts about the divergences between two models' logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.losses import (
    entropy,
    jensen_shannon,
    kl_divergence,
    kl_to_uniform,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    symmetric_kl,
)

Divergence = Callable[..., Tensor]

BOUNDED: dict[str, Divergence] = {
    "jensen_shannon": jensen_shannon,
    "jensen_shannon_0.1": partial(jensen_shannon, beta=0.1),
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
}
DIVERGENCES: dict[str, Divergence] = {
    "kl_divergence": kl_divergence,
    "reverse_kl": reverse_kl,
    "symmetric_kl": partial(symmetric_kl, halves="sum"),
    **BOUNDED,
}
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())
each_bounded = pytest.mark.parametrize("divergence", BOUNDED.values(), ids=BOUNDED.keys())
several = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


def logits(seed: int, *shape: int, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def plain(divergence: Divergence, student: Tensor, teacher: Tensor, **others: object) -> Tensor:
    return divergence(student, teacher, **({"scale_by_t2": False, "reduction": "none"} | others))


@each_divergence
@several
@given(seed=seeds, temperature=st.floats(0.5, 20))
def test_zero_with_zero_gradient_when_student_equals_teacher_up_to_a_constant(
    divergence: Divergence, seed: int, temperature: float
) -> None:
    teacher = logits(seed, 4, 7, dtype=torch.float64)
    student = (teacher + logits(seed + 1, 4, 1, dtype=torch.float64)).requires_grad_()
    value = plain(divergence, student, teacher, temperature=temperature)
    value.sum().backward()
    assert torch.allclose(value, torch.zeros(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(student.grad, torch.zeros_like(student), atol=1e-12)


@each_divergence
@several
@given(seed=seeds)
def test_positive_when_the_distributions_differ(divergence: Divergence, seed: int) -> None:
    assert (plain(divergence, logits(seed, 4, 7), logits(seed + 1, 4, 7)) > 0).all()


@each_divergence
@several
@given(seed=seeds)
def test_unchanged_by_a_constant_and_by_a_permutation_of_the_classes(divergence: Divergence, seed: int) -> None:
    student, teacher = logits(seed, 4, 7, dtype=torch.float64), logits(seed + 1, 4, 7, dtype=torch.float64)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    value = plain(divergence, student, teacher)
    assert torch.allclose(value, plain(divergence, student + 5.0, teacher - 11.0))
    assert torch.allclose(value, plain(divergence, student[:, order], teacher[:, order]))
    assert torch.allclose(value.flip(0), plain(divergence, student.flip(0), teacher.flip(0)))


@each_divergence
def test_classes_in_dimension_one_give_the_values_of_classes_last(divergence: Divergence) -> None:
    student, teacher = logits(0, 2, 5, 3, 4), logits(1, 2, 5, 3, 4)
    first = plain(divergence, student, teacher, dim=1)
    last = plain(divergence, student.movedim(1, -1), teacher.movedim(1, -1))
    assert first.shape == (2, 3, 4) and torch.allclose(first, last)


@each_divergence
def test_classes_that_both_leave_out_change_nothing(divergence: Divergence) -> None:
    student, teacher = logits(0, 3, 6).requires_grad_(), logits(1, 3, 6).requires_grad_()
    left_out = torch.tensor([False, True, False, False, True, False])
    value = plain(divergence, student.masked_fill(left_out, -torch.inf), teacher.masked_fill(left_out, -torch.inf))
    expected = plain(divergence, student[:, ~left_out], teacher[:, ~left_out])
    wanted = torch.autograd.grad(expected.sum(), [student, teacher])
    got = torch.autograd.grad(value.sum(), [student, teacher])
    assert torch.allclose(value, expected)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@each_divergence
def test_extreme_logits_have_finite_values_and_gradients(divergence: Divergence) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0], [1e4, -1e4, -1e4]], requires_grad=True)
    value = plain(divergence, student, teacher, temperature=0.5, scale_by_t2=True)
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all() and teacher.grad.isfinite().all()


@each_divergence
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(divergence: Divergence, dtype: torch.dtype) -> None:
    student, teacher = logits(0, 4, 7).to(dtype), logits(1, 4, 7).to(dtype)
    value = plain(divergence, student, teacher, temperature=0.01)
    assert value.dtype == torch.float32
    assert torch.equal(value, plain(divergence, student.float(), teacher.float(), temperature=0.01))


@each_divergence
def test_gradients_agree_with_finite_differences(divergence: Divergence) -> None:
    student = logits(0, 3, 4, scale=1, dtype=torch.float64).requires_grad_()
    teacher = logits(1, 3, 4, scale=1, dtype=torch.float64).requires_grad_()
    temperature = torch.tensor([0.7, 2.0, 5.0], dtype=torch.float64, requires_grad=True)

    def of(s: Tensor, t: Tensor, temperature: Tensor) -> Tensor:
        return divergence(s, t, temperature=temperature, scale_by_t2=True, reduction="mean")

    assert torch.autograd.gradcheck(of, (student, teacher, temperature))


@each_divergence
def test_a_temperature_per_item_equals_items_done_one_by_one(divergence: Divergence) -> None:
    student, teacher = logits(0, 3, 5), logits(1, 3, 5)
    each = [1.0, 2.0, 7.0]
    together = plain(divergence, student, teacher, temperature=torch.tensor(each), scale_by_t2=True)
    alone = [
        plain(divergence, student[i : i + 1], teacher[i : i + 1], temperature=t, scale_by_t2=True)
        for i, t in enumerate(each)
    ]
    assert torch.allclose(together, torch.cat(alone))


def test_a_learned_temperature_has_a_finite_gradient_when_classes_are_left_out() -> None:
    temperature = torch.tensor(2.0, requires_grad=True)
    student, teacher = logits(0, 3, 5), logits(1, 3, 5)
    student[:, 2] = teacher[:, 2] = -torch.inf
    kl_divergence(student, teacher, temperature=temperature, scale_by_t2=True, reduction="mean").backward()
    assert temperature.grad.isfinite() and temperature.grad != 0


def test_kl_divergence_equals_torch_with_the_teacher_as_target() -> None:
    student, teacher = logits(0, 6, 5), logits(1, 6, 5)
    theirs = 9 * F.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="none")
    wanted = {"batchmean": theirs.sum() / 6, "mean": theirs.sum(1).mean(), "elementmean": theirs.mean()}
    for reduction, value in wanted.items():
        ours = kl_divergence(student, teacher, temperature=3, scale_by_t2=True, reduction=reduction)
        assert torch.allclose(ours, value)


def test_reverse_kl_is_the_forward_kl_of_the_exchanged_arguments() -> None:
    student, teacher = logits(0, 6, 5), logits(1, 6, 5)
    assert torch.allclose(plain(reverse_kl, student, teacher), plain(kl_divergence, teacher, student))
    assert not torch.allclose(plain(reverse_kl, student, teacher), plain(kl_divergence, student, teacher))


@several
@given(seed=seeds)
def test_symmetric_kl_and_jensen_shannon_are_symmetric(seed: int) -> None:
    student, teacher = logits(seed, 4, 7), logits(seed + 1, 4, 7)
    for divergence in (partial(symmetric_kl, halves="mean"), jensen_shannon):
        there, back = plain(divergence, student, teacher), plain(divergence, teacher, student)
        assert torch.allclose(there, back, rtol=1e-4, atol=1e-5)


def test_symmetric_kl_is_the_sum_or_the_mean_of_both_directions() -> None:
    student, teacher = logits(0, 4, 7), logits(1, 4, 7)
    both = plain(kl_divergence, student, teacher) + plain(reverse_kl, student, teacher)
    assert torch.allclose(plain(symmetric_kl, student, teacher, halves="sum"), both, rtol=1e-4)
    assert torch.allclose(plain(symmetric_kl, student, teacher, halves="mean"), both / 2, rtol=1e-4)


def test_closed_form_gradients_of_both_directions() -> None:
    student = logits(0, 4, 7, dtype=torch.float64).requires_grad_()
    teacher = logits(1, 4, 7, dtype=torch.float64)
    q, p = student.softmax(1).detach(), teacher.softmax(1)
    (forward,) = torch.autograd.grad(plain(kl_divergence, student, teacher).sum(), student)
    reverse = plain(reverse_kl, student, teacher)
    (backward,) = torch.autograd.grad(reverse.sum(), student)
    assert torch.allclose(forward, q - p)
    assert torch.allclose(backward, q * ((q / p).log() - reverse.detach()[:, None]))


@each_bounded
def test_bounded_divergences_stay_finite_on_disjoint_distributions(divergence: Divergence) -> None:
    student = torch.tensor([[0.0, -torch.inf]], requires_grad=True)
    teacher = torch.tensor([[-torch.inf, 0.0]])
    value = plain(divergence, student, teacher)
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all()


def test_bounds_are_reached_on_disjoint_distributions() -> None:
    student, teacher = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    assert plain(jensen_shannon, student, teacher).item() == pytest.approx(math.log(2))
    assert plain(skew_kl, student, teacher, skew=0.2).item() == pytest.approx(-math.log(0.2))
    assert plain(skew_reverse_kl, student, teacher, skew=0.2).item() == pytest.approx(-math.log(0.2))
    assert plain(kl_divergence, student, teacher).item() == math.inf


def test_jensen_shannon_equals_its_definition_in_probabilities() -> None:
    student, teacher = logits(0, 4, 7, dtype=torch.float64), logits(1, 4, 7, dtype=torch.float64)
    q, p = student.softmax(1), teacher.softmax(1)
    m = 0.3 * p + 0.7 * q
    expected = 0.3 * (p * (p / m).log()).sum(1) + 0.7 * (q * (q / m).log()).sum(1)
    assert torch.allclose(plain(jensen_shannon, student, teacher, beta=0.3), expected)


def test_jensen_shannon_over_beta_tends_to_the_forward_kl() -> None:
    student, teacher = logits(0, 4, 7, scale=1, dtype=torch.float64), logits(1, 4, 7, scale=1, dtype=torch.float64)
    near = plain(jensen_shannon, student, teacher, beta=1e-6) / 1e-6
    assert torch.allclose(near, plain(kl_divergence, student, teacher), rtol=1e-4)


def test_skew_divergences_equal_their_definitions_in_probabilities() -> None:
    student, teacher = logits(0, 4, 7, dtype=torch.float64), logits(1, 4, 7, dtype=torch.float64)
    q, p = student.softmax(1), teacher.softmax(1)
    forward, backward = 0.1 * p + 0.9 * q, 0.1 * q + 0.9 * p
    assert torch.allclose(plain(skew_kl, student, teacher), (p * (p / forward).log()).sum(1))
    assert torch.allclose(plain(skew_reverse_kl, student, teacher), (q * (q / backward).log()).sum(1))


@each_divergence
def test_t_squared_keeps_the_size_of_the_gradient(divergence: Divergence) -> None:
    student, teacher = logits(0, 8, 10, scale=1).requires_grad_(), logits(1, 8, 10, scale=1)

    def size(temperature: float, scale: bool) -> float:
        value = divergence(student, teacher, temperature=temperature, scale_by_t2=scale, reduction="mean")
        return torch.autograd.grad(value, student)[0].norm().item()

    assert size(40, True) == pytest.approx(size(20, True), rel=0.1)
    assert size(40, False) == pytest.approx(size(20, False) / 4, rel=0.1)


def test_the_teacher_is_not_detached() -> None:
    teacher = logits(1, 4, 7).requires_grad_()
    plain(kl_divergence, logits(0, 4, 7), teacher).sum().backward()
    assert teacher.grad.abs().sum() > 0


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        plain(kl_divergence, logits(0, 2, 3), logits(1, 2, 3), temperature=temperature)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        plain(kl_divergence, logits(0, 2, 3), logits(1, 1, 3))


@pytest.mark.parametrize("divergence", [jensen_shannon, skew_kl, skew_reverse_kl])
def test_a_share_outside_zero_and_one_is_refused(divergence: Divergence) -> None:
    name = "beta" if divergence is jensen_shannon else "skew"
    for share in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match=f"{name} is {share}"):
            plain(divergence, logits(0, 2, 3), logits(1, 2, 3), **{name: share})


@several
@given(seed=seeds)
def test_soft_cross_entropy_is_kl_plus_the_entropy_of_the_target(seed: int) -> None:
    student, teacher = logits(seed, 4, 7, dtype=torch.float64), logits(seed + 1, 4, 7, dtype=torch.float64)
    value = soft_cross_entropy(student, teacher.softmax(1), reduction="none")
    assert torch.allclose(value, plain(kl_divergence, student, teacher) + entropy(teacher, reduction="none"))


def test_soft_cross_entropy_of_one_hot_targets_is_cross_entropy() -> None:
    student, labels = logits(0, 6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    value = soft_cross_entropy(student, F.one_hot(labels, 5), reduction="mean")
    assert torch.allclose(value, F.cross_entropy(student, labels))


def test_soft_cross_entropy_gradient_is_q_minus_the_target() -> None:
    student = logits(0, 4, 7, dtype=torch.float64).requires_grad_()
    target = logits(1, 4, 7, dtype=torch.float64).softmax(1)
    soft_cross_entropy(student, target, reduction="sum").backward()
    assert torch.allclose(student.grad, student.softmax(1) - target)


def test_soft_cross_entropy_ignores_a_class_left_out_that_the_target_does_not_want() -> None:
    student = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    value = soft_cross_entropy(student, torch.tensor([[0.25, 0.75, 0.0]]), reduction="sum")
    value.backward()
    expected = soft_cross_entropy(student[:, :2], torch.tensor([[0.25, 0.75]]), reduction="sum")
    assert torch.equal(value, expected) and student.grad.isfinite().all()


def test_soft_cross_entropy_gradients_agree_with_finite_differences() -> None:
    student = logits(0, 3, 4, dtype=torch.float64).requires_grad_()
    target = logits(1, 3, 4, dtype=torch.float64).softmax(1).requires_grad_()
    of = partial(soft_cross_entropy, temperature=2.0, scale_by_t2=True, reduction="mean")
    assert torch.autograd.gradcheck(of, (student, target))


@several
@given(seed=seeds, classes=st.integers(2, 20))
def test_entropy_lies_between_zero_and_log_classes(seed: int, classes: int) -> None:
    value = entropy(logits(seed, 5, classes), reduction="none")
    assert (value >= 0).all() and (value <= math.log(classes) + 1e-5).all()
    assert entropy(torch.zeros(2, classes), reduction="mean").item() == pytest.approx(math.log(classes))


def test_entropy_of_a_certain_prediction_is_zero_with_finite_gradient() -> None:
    certain = torch.tensor([[1e4, -1e4, -torch.inf]], requires_grad=True)
    value = entropy(certain, reduction="sum")
    value.backward()
    assert value.item() == 0 and certain.grad.isfinite().all()


def test_kl_to_uniform_is_zero_at_uniform_and_equals_its_definition() -> None:
    student = logits(0, 4, 7, dtype=torch.float64)
    u = torch.full((4, 7), 1 / 7, dtype=torch.float64)
    expected = F.kl_div(student.log_softmax(1), u, reduction="none").sum(1)
    assert torch.allclose(kl_to_uniform(student, reduction="none"), expected)
    assert torch.allclose(kl_to_uniform(torch.ones(2, 9), reduction="none"), torch.zeros(2), atol=1e-6)


def test_kl_to_uniform_and_entropy_leave_out_classes_at_minus_infinity() -> None:
    student = logits(0, 4, 5)
    padded = torch.cat([student, torch.full((4, 2), -torch.inf)], 1)
    for loss in (kl_to_uniform, entropy):
        assert torch.allclose(loss(student, reduction="none"), loss(padded, reduction="none"))


def test_entropy_and_kl_to_uniform_gradients_agree_with_finite_differences() -> None:
    student = logits(0, 3, 4, scale=1, dtype=torch.float64).requires_grad_()
    for loss in (entropy, kl_to_uniform):
        assert torch.autograd.gradcheck(partial(loss, temperature=1.5, reduction="mean"), (student,))

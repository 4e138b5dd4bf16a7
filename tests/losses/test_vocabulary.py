"""Losses from hidden states and output layers: those of whole logits, in chunks, with four products and no more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from limbeck.losses import (
    jensen_shannon,
    kl_divergence,
    linear_cross_entropy,
    linear_divergence,
    linear_sparse_divergence,
    reduce,
    reduce_tokens,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    sparse_divergence,
    token_cross_entropy,
    total_variation,
)

B, L, V, D, E = 3, 5, 11, 4, 6
BETA, SKEW = 0.3, 0.2
WHOLE: dict[str, Callable[..., Tensor]] = {
    "forward": kl_divergence,
    "reverse": reverse_kl,
    "jensen_shannon": partial(jensen_shannon, beta=BETA),
    "skew": partial(skew_kl, skew=SKEW),
    "skew_reverse": partial(skew_reverse_kl, skew=SKEW),
    "total_variation": total_variation,
}
each_divergence = pytest.mark.parametrize("name", WHOLE)


def taid(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """The definition, per item."""
    target = ((1 - t) * student.detach() + t * teacher).softmax(-1)
    return -(target * student.log_softmax(-1)).sum(-1)


class Case:
    """Tensors of both output layers, and labels of which some are -100."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> None:
        make = torch.Generator().manual_seed(seed)
        shapes = {"h": (B, L, D), "w": (V, D), "b": (V,), "g": (B, L, E), "v": (V, E), "c": (V,)}
        for letter, shape in shapes.items():
            setattr(self, letter, (scale * torch.randn(shape, generator=make, dtype=torch.float64)).to(dtype))
        self.student: list[Tensor] = [tensor.requires_grad_() for tensor in (self.h, self.w, self.b)]
        self.labels = torch.randint(0, V, (B, L), generator=make)
        self.labels[torch.rand(B, L, generator=make) < 0.4] = -100
        self.labels[0, 0], self.labels[1] = 1, -100
        self.weight = torch.rand(B, L, generator=make, dtype=torch.float64)
        self.t = 0.3

    def logits(self) -> tuple[Tensor, Tensor]:
        return F.linear(self.h, self.w, self.b), F.linear(self.g, self.v, self.c)

    def items(self, name: str, temperature: float = 1.0, scale_by_t2: bool = False) -> Tensor:
        student, teacher = self.logits()
        if name == "taid":
            items = taid(student / temperature, teacher / temperature, self.t)
            return items * temperature**2 if scale_by_t2 else items
        return WHOLE[name](student, teacher, temperature=temperature, scale_by_t2=scale_by_t2, reduction="none")

    def chunked(self, name: str, **more: Any) -> Tensor:
        given: dict[str, Any] = {"scale_by_t2": False, "reduction": "mean", "t": self.t, "beta": BETA, "skew": SKEW}
        given |= {"student_bias_V": self.b, "teacher_bias_V": self.c}
        return linear_divergence(self.h, self.w, self.g, self.v, divergence=name, **(given | more))


def agree(found: Tensor, wanted: Tensor, inputs: list[Tensor], **tolerance: float) -> None:
    """In value, and in the gradients of three times the value."""
    torch.testing.assert_close(found, wanted, **tolerance)
    pairs = zip(torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * wanted, inputs), strict=True)
    for gradient, wanted_gradient in pairs:
        torch.testing.assert_close(gradient, wanted_gradient, **tolerance)


# ---------------------------------------------------------------- the losses of whole logits


@pytest.mark.parametrize("chunk", [1, 4, 100, None])
@pytest.mark.parametrize("name", [*WHOLE, "taid"])
def test_value_and_gradients_are_those_of_whole_logits(name: str, chunk: int | None) -> None:
    case = Case()
    items = case.items(name, temperature=2.0, scale_by_t2=True)
    wanted = reduce_tokens(items, case.labels, reduction="token_mean")
    found = case.chunked(
        name, temperature=2.0, scale_by_t2=True, reduction="token_mean", labels=case.labels, chunk=chunk
    )
    agree(found, wanted, case.student)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from([*WHOLE, "taid"]),
    seed=st.integers(0, 10_000),
    scale=st.floats(0.1, 3),
    temperature=st.floats(0.5, 4),
    chunk=st.integers(1, 20),
)
def test_any_logits_temperature_and_chunk(name: str, seed: int, scale: float, temperature: float, chunk: int) -> None:
    case = Case(seed, scale=scale)
    wanted = reduce(case.items(name, temperature), reduction="mean", weight=case.weight)
    agree(case.chunked(name, temperature=temperature, weight=case.weight, chunk=chunk), wanted, case.student)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_reductions_of_tokens_are_those_of_reduce_tokens(reduction: Any) -> None:
    case = Case()
    wanted = reduce_tokens(case.items("forward"), case.labels, reduction=reduction)
    agree(case.chunked("forward", reduction=reduction, labels=case.labels, chunk=2), wanted, case.student)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_flat_reductions_masks_and_weights_are_those_of_reduce(reduction: Any) -> None:
    case = Case()
    kept = {"mask": torch.tensor([[1, 1, 0, 0, 1], [0] * 5, [1] * 5]), "weight": torch.tensor([0.5, 2.0, 0.0])}
    wanted = reduce(case.items("reverse"), reduction=reduction, **kept)
    agree(case.chunked("reverse", reduction=reduction, chunk=2, **kept), wanted, case.student)


@pytest.mark.parametrize("name", ["forward", "reverse", "jensen_shannon", "skew", "skew_reverse"])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    case, step = Case(), 1e-6
    gradients = torch.autograd.grad(case.chunked(name, labels=case.labels, temperature=1.5, chunk=2), case.student)
    for tensor, gradient in zip(case.student, gradients, strict=True):
        values = []
        for shift in (step, -step):
            with torch.no_grad():
                moved = tensor.add_(shift * gradient)
                values.append(case.chunked(name, labels=case.labels, temperature=1.5, chunk=2))
                moved.sub_(shift * gradient)
        torch.testing.assert_close((values[0] - values[1]) / (2 * step), gradient.square().sum(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_the_share_of_taid_may_be_a_tensor(t: float) -> None:
    case = Case()
    case.t = t
    agree(case.chunked("taid", t=torch.tensor(t)), case.items("taid").mean(), case.student)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_cross_entropy_is_that_of_whole_logits(reduction: Any) -> None:
    case = Case()
    wanted = token_cross_entropy(case.logits()[0], case.labels, reduction=reduction)
    found = linear_cross_entropy(case.h, case.w, case.labels, student_bias_V=case.b, reduction=reduction, chunk=2)
    agree(found, wanted, case.student)


@pytest.mark.parametrize("rest", ["ignore", "spread", "bucket"])
@each_divergence
def test_a_sparse_teacher_gives_the_sparse_loss_of_whole_logits(name: Any, rest: Any) -> None:
    case = Case()
    student, teacher = case.logits()
    for kept in (1, 4, V - 1, V):
        log_probs, ids = teacher.log_softmax(-1).topk(kept)
        known = (ids, log_probs, (1 - log_probs.exp().sum(-1)).clamp(min=0))
        named = {"divergence": name, "rest": rest, "beta": BETA, "skew": SKEW, "scale_by_t2": True}
        named["temperature"] = 1.0 if rest == "bucket" else 2.0
        wanted = reduce_tokens(
            sparse_divergence(student, *known, reduction="none", **named), case.labels, reduction="token_mean"
        )
        found = linear_sparse_divergence(
            case.h, case.w, *known, student_bias_V=case.b, reduction="token_mean", labels=case.labels, chunk=2, **named
        )
        torch.testing.assert_close(found, wanted)
        gradients = [torch.autograd.grad(loss, case.student, retain_graph=True) for loss in (found, wanted)]
        for gradient, wanted_gradient in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, wanted_gradient)


# ---------------------------------------------------------------- what it costs


def products(loss: Callable[[], Tensor]) -> float:
    """Matrix products forwards and backwards, in units of items * words * (multiply and add)."""
    with FlopCounterMode(display=False) as counter:
        value = loss()
        if value.requires_grad:
            value.backward()
    return counter.get_total_flops() / (2 * B * L * V)


def test_there_are_four_products_and_fewer_where_a_gradient_is_not_wanted() -> None:
    case = Case()
    loss = partial(case.chunked, "forward", chunk=4, student_bias_V=None)
    assert products(loss) == D + E + D + D
    case.w = case.w.detach()
    assert products(loss) == D + E + D
    with torch.no_grad():
        assert products(loss) == D + E
    assert loss().grad_fn is not None


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        for value in answer if isinstance(answer, tuple | list) else [answer]:
            if isinstance(value, Tensor):
                self.size = max(self.size, value.numel())
        return answer


@pytest.mark.parametrize("name", [*WHOLE, "taid"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(name: str) -> None:
    items, words, chunk = 64, 500, 8
    h, w = torch.randn(items, D, requires_grad=True), torch.randn(words, D, requires_grad=True)
    with Largest() as largest:
        linear_divergence(
            h, w, h.detach(), w.detach(), divergence=name, scale_by_t2=False, reduction="mean", chunk=chunk
        ).backward()
    assert largest.size == chunk * words


def test_places_left_out_are_not_computed() -> None:
    case = Case()
    kept = int((case.labels != -100).sum())
    loss = partial(case.chunked, "forward", labels=case.labels, student_bias_V=None, teacher_bias_V=None)
    assert products(loss) == (D + E + D + D) * kept / (B * L)


def test_what_stands_at_places_left_out_does_not_matter() -> None:
    case = Case()
    wanted = case.chunked("forward", labels=case.labels)
    wrong = case.h.detach().clone()
    wrong[case.labels == -100] = torch.nan
    case.h = wrong.requires_grad_()
    found = case.chunked("forward", labels=case.labels)
    torch.testing.assert_close(found, wanted)
    assert torch.autograd.grad(found, case.h)[0].isfinite().all()


# ---------------------------------------------------------------- gradients


def test_the_teacher_and_the_weights_of_places_get_no_gradient() -> None:
    case = Case()
    constants = [case.g, case.v, case.c, case.weight]
    for constant in constants:
        constant.requires_grad_()
    case.chunked("jensen_shannon", weight=case.weight, chunk=2).backward()
    assert all(constant.grad is None for constant in constants)
    assert all(tensor.grad is not None for tensor in case.student)


def test_gradients_of_several_losses_add_up() -> None:
    case = Case()
    (wanted,) = torch.autograd.grad(case.items("forward").mean() * 0.5 + case.items("reverse").mean(), case.w)
    (0.5 * case.chunked("forward", chunk=2)).backward()
    case.chunked("reverse", chunk=2).backward()
    torch.testing.assert_close(case.w.grad, wanted)


def test_going_back_a_second_time_is_an_error_and_no_wrong_gradient() -> None:
    case = Case()
    loss = case.chunked("forward", chunk=2)
    torch.autograd.grad(loss, case.student, retain_graph=True)
    with pytest.raises(RuntimeError, match="gone back through already"):
        torch.autograd.grad(loss, case.student)


@pytest.mark.parametrize("name", [*WHOLE, "taid"])
def test_where_nothing_is_kept_the_loss_is_0_with_zero_gradients(name: str) -> None:
    case = Case()
    loss = case.chunked(name, labels=torch.full((B, L), -100))
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, case.student))


@each_divergence
def test_a_student_like_its_teacher_has_loss_and_gradient_0(name: str) -> None:
    case = Case()
    case.g, case.v, case.c = (tensor.detach() for tensor in case.student)
    loss = case.chunked(name)
    assert loss.abs() < 1e-14
    assert all(gradient.abs().max() < 1e-14 for gradient in torch.autograd.grad(loss, case.student))


# ---------------------------------------------------------------- numbers at the edge


@pytest.mark.parametrize("name", [*WHOLE, "taid"])
def test_words_that_both_rule_out_change_nothing(name: str) -> None:
    case, wide = Case(), Case()
    more = torch.zeros(2, D, dtype=torch.float64), torch.zeros(2, E, dtype=torch.float64)
    ruled_out = torch.full((2,), -torch.inf, dtype=torch.float64)
    wide.w, wide.v = torch.cat([case.w, more[0]]), torch.cat([case.v, more[1]])
    wide.b, wide.c = torch.cat([case.b, ruled_out]), torch.cat([case.c, ruled_out])
    wide.h = case.h
    agree(wide.chunked(name, chunk=4), case.chunked(name), case.student)


@pytest.mark.parametrize("name", [*WHOLE, "taid"])
@pytest.mark.parametrize("side", ["b", "c"])
def test_a_word_that_one_side_rules_out_means_what_it_means_for_whole_logits(name: str, side: str) -> None:
    case = Case()
    with torch.no_grad():
        getattr(case, side)[2] = -torch.inf
    found = case.chunked(name)
    if name == "taid":  # a word that the student rules out contributes 0
        student, teacher = case.logits()
        target = ((1 - case.t) * student.detach() + case.t * teacher).softmax(-1)
        log_q = student.log_softmax(-1)
        wanted = -torch.where(torch.isneginf(log_q), 0.0, target * log_q).sum(-1).mean()
    else:
        wanted = case.items(name).mean()
    torch.testing.assert_close(found, wanted)
    assert bool(found.isinf()) == ((name, side) in [("forward", "b"), ("reverse", "c")])
    if found.isfinite():
        gradients = torch.autograd.grad(found, case.student)
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_at_the_ends_of_taid_the_other_model_may_rule_words_out() -> None:
    case = Case()
    with torch.no_grad():
        case.c[2] = -torch.inf
    torch.testing.assert_close(case.chunked("taid", t=0.0), taid(*case.logits()[:1] * 2, 0.0).mean())
    assert case.chunked("taid", t=1.0).isfinite()


@pytest.mark.parametrize("name", [*WHOLE, "taid"])
def test_logits_of_ten_thousand_give_finite_values_and_gradients(name: str) -> None:
    case = Case(dtype=torch.float32, scale=100.0)
    loss = case.chunked(name)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, case.student))


def test_a_common_offset_of_ten_thousand_costs_no_more_digits_than_in_whole_logits() -> None:
    case = Case(dtype=torch.float32)
    wanted = Case().items("forward").mean().item()
    with torch.no_grad():
        case.b += 10_000
    assert case.chunked("forward").item() == pytest.approx(wanted, abs=2e-3)


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("name", [*WHOLE, "taid"])
def test_float32_is_as_near_to_float64_as_whole_logits_are(name: str) -> None:
    exact, single = Case(), Case(dtype=torch.float32)
    agree(single.chunked(name, chunk=4).double(), exact_of(exact, single, name), single.student, rtol=1e-4, atol=1e-5)


def exact_of(exact: Case, single: Case, name: str) -> Tensor:
    """The loss in float64 of the float32 case's tensors, through which its gradients flow."""
    exact.h, exact.w, exact.b = (tensor.double() for tensor in single.student)
    return exact.items(name).mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tensors_keep_their_dtype_and_lose_only_its_digits(dtype: torch.dtype) -> None:
    exact, half = Case(), Case(dtype=dtype)
    found = half.chunked("forward", chunk=4)
    exact.h, exact.w, exact.b = (tensor.double() for tensor in half.student)
    exact.g, exact.v, exact.c = (tensor.double() for tensor in (half.g, half.v, half.c))
    wanted = exact.items("forward").mean()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0.03, atol=0.01)
    gradients = torch.autograd.grad(found, half.student)
    for gradient, precise in zip(gradients, torch.autograd.grad(wanted, half.student), strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, precise, rtol=0.1, atol=0.02)


def test_small_shares_of_a_place_survive_half_precision() -> None:
    case = Case(dtype=torch.float16)
    one, tiny = (case.chunked("forward", reduction="sum", weight=torch.full((B, L), w)) for w in (1.0, 1e-6))
    (whole,) = torch.autograd.grad(one, case.w)
    (scaled,) = torch.autograd.grad(2.0**16 * tiny, case.w)  # what a gradient scaler does
    torch.testing.assert_close(scaled.float(), whole.float() * 2.0**16 * 1e-6, rtol=0.02, atol=1e-4)


def test_a_factor_before_the_loss_does_not_round_the_gradients_of_half_precision_twice() -> None:
    case = Case(dtype=torch.bfloat16)
    (whole,) = torch.autograd.grad(case.chunked("forward", reduction="sum"), case.w)
    (third,) = torch.autograd.grad(case.chunked("forward", reduction="sum") / 3, case.w)
    assert torch.equal(third, (whole.float() / 3).bfloat16())


def test_autocast_runs_the_products_in_its_dtype_and_the_divergence_in_float32() -> None:
    case = Case(dtype=torch.float32)
    wanted = case.chunked("forward")
    with torch.autocast("cpu", torch.bfloat16):
        found = case.chunked("forward", chunk=4)
    assert found.dtype == torch.float32 and found != wanted
    torch.testing.assert_close(found, wanted, rtol=0.03, atol=0.01)
    pairs = zip(torch.autograd.grad(found, case.student), torch.autograd.grad(wanted, case.student), strict=True)
    for gradient, whole in pairs:
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, whole, rtol=0.1, atol=0.02)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reduction": "none"}, "on the way forward"),
        ({"divergence": "kl"}, "divergence is 'kl'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"divergence": "jensen_shannon", "beta": 1.0}, "beta is 1.0"),
        ({"divergence": "skew", "skew": 0.0}, "skew is 0.0"),
        ({"labels": torch.zeros(B, L), "mask": torch.ones(B, L)}, "only once"),
        ({"labels": torch.zeros(B)}, "labels have shape"),
        ({"mask": torch.ones(L)}, "mask has shape"),
        ({"student_weight_VD": torch.ones(V, D + 1)}, "has width 4"),
        ({"teacher_weight_VE": torch.ones(V + 1, E)}, "11 words but the teacher has 12"),
        ({"teacher_hidden": torch.ones(B, L + 1, E)}, "the same tokens"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    whole: dict[str, Any] = {
        "student_hidden": torch.ones(B, L, D),
        "student_weight_VD": torch.ones(V, D),
        "teacher_hidden": torch.ones(B, L, E),
        "teacher_weight_VE": torch.ones(V, E),
        "divergence": "forward",
        "scale_by_t2": False,
        "reduction": "mean",
    }
    with pytest.raises(ValueError, match=message):
        linear_divergence(**(whole | given))


def test_sequences_need_two_dimensions_of_items() -> None:
    with pytest.raises(ValueError, match="sequence_mean"):
        linear_cross_entropy(
            torch.ones(3, D), torch.ones(V, D), torch.zeros(3, dtype=torch.int64), reduction="sequence_mean"
        )

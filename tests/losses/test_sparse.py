"""A teacher known by its K likeliest words: equal to the dense computation on the distribution that is recovered."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.losses import divergence_named, sparse_divergence, token_cross_entropy

NAMES = ["forward", "reverse", "jensen_shannon", "skew", "skew_reverse", "total_variation"]
N, V = 5, 9
each_divergence = pytest.mark.parametrize("name", NAMES)
each_rest = pytest.mark.parametrize("rest", ["ignore", "spread", "bucket"])


def case(kept: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's logits, and ids, log-probabilities and the mass left of a teacher."""
    make = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(N, V, generator=make, dtype=torch.float64) for _ in range(2))
    log_probs, ids = teacher.log_softmax(-1).topk(kept)
    rest = (1 - log_probs.exp().sum(-1)).clamp(min=0)
    return student.to(dtype).requires_grad_(), ids, log_probs.to(dtype), rest.to(dtype)


def by_definition(
    name: Any, rest: str, student: Tensor, ids: Tensor, log_probs: Tensor, mass: Tensor, temperature: float
) -> Tensor:
    """The dense divergence between the two distributions over the classes that are compared."""
    kept = ids.shape[-1]
    compare = partial(divergence_named(name, 0.3, 0.2), temperature=temperature, scale_by_t2=True, reduction="none")
    if rest == "spread":
        share = mass / max(V - kept, 1)
        p = share[:, None].repeat(1, V).scatter(-1, ids, log_probs.exp())
        return compare(student, p.log())
    if rest == "ignore":
        return compare(student.gather(-1, ids), log_probs)
    q = student.softmax(-1)
    student_classes = torch.cat([q.gather(-1, ids), q.scatter(-1, ids, 0.0).sum(-1, keepdim=True)], -1)
    return compare(student_classes.log(), torch.cat([log_probs.exp(), mass[:, None]], -1).log())


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    rest=st.sampled_from(["ignore", "spread", "bucket"]),
    kept=st.integers(1, V - 1),
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.5, 4),
)
def test_value_and_gradient_are_those_of_the_recovered_distribution(
    name: Any, rest: Any, kept: int, seed: int, temperature: float
) -> None:
    student, *known = case(kept, seed)
    temperature = 1.0 if rest == "bucket" else temperature
    wanted = by_definition(name, rest, student, *known, temperature).mean()
    found = sparse_divergence(
        student, *known, divergence=name, rest=rest, beta=0.3, skew=0.2, temperature=temperature, scale_by_t2=True,
        reduction="mean",
    )  # fmt: skip
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (found, wanted)))


@each_rest
@each_divergence
def test_with_all_words_kept_it_is_the_plain_divergence(name: Any, rest: Any) -> None:
    student, ids, log_probs, mass = case(V)
    teacher = torch.empty_like(student).scatter(-1, ids, log_probs)
    wanted = divergence_named(name, 0.5, 0.1)(student, teacher, scale_by_t2=False, reduction="mean")
    found = sparse_divergence(
        student, ids, log_probs, mass, divergence=name, rest=rest, scale_by_t2=False, reduction="mean"
    )
    torch.testing.assert_close(found, wanted)


@each_rest
@pytest.mark.parametrize("name", [name for name in NAMES if name != "total_variation"])
def test_gradients_agree_with_finite_differences(name: Any, rest: Any) -> None:
    student, *known = case(4)

    def loss(student: Tensor) -> Tensor:
        return sparse_divergence(student, *known, divergence=name, rest=rest, scale_by_t2=False, reduction="mean")

    assert torch.autograd.gradcheck(loss, student)


def test_the_three_rests_disagree_about_a_student_that_puts_its_mass_on_other_words() -> None:
    student, *known = case(3)
    with torch.no_grad():
        far = student.scatter(-1, known[0][:, -1:], -9.0) + 9 * (torch.arange(V) == known[0].max())
    losses = {
        rest: float(
            sparse_divergence(far, *known, divergence="forward", rest=rest, scale_by_t2=False, reduction="mean")
        )  # type: ignore[arg-type]
        for rest in ("ignore", "bucket", "spread")
    }
    assert losses["ignore"] < losses["bucket"] < losses["spread"]


def test_the_bucket_never_exceeds_the_loss_over_all_words() -> None:
    # Lumping classes together can only lose information (data-processing inequality).
    student, *known = case(3)
    bucket, spread = (
        sparse_divergence(student, *known, divergence="forward", rest=rest, scale_by_t2=False, reduction="none")  # type: ignore[arg-type]
        for rest in ("bucket", "spread")
    )
    assert (bucket <= spread + 1e-12).all()


def test_one_word_with_all_the_mass_is_cross_entropy() -> None:
    student, ids, _, mass = case(1)
    found = sparse_divergence(
        student, ids, torch.zeros_like(mass)[:, None], torch.zeros_like(mass), divergence="forward", rest="spread",
        scale_by_t2=False, reduction="mean",
    )  # fmt: skip
    torch.testing.assert_close(found, token_cross_entropy(student[None], ids.T, reduction="token_mean"))


@each_rest
@each_divergence
def test_a_mass_that_rounding_has_eaten_and_a_sure_student_stay_finite(name: Any, rest: Any) -> None:
    student, ids, log_probs, mass = case(3, dtype=torch.float32)
    with torch.no_grad():
        student += 1e4 * (torch.arange(V) == 0)
    log_probs = log_probs.log_softmax(-1)
    loss = sparse_divergence(
        student, ids, log_probs, torch.zeros_like(mass), divergence=name, rest=rest, scale_by_t2=False, reduction="mean"
    )
    assert loss.isfinite()
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"divergence": "taid"}, "divergence is 'taid'"),
        ({"rest": "drop"}, "rest is 'drop'"),
        ({"rest": "bucket", "temperature": 2.0}, "mass at a temperature is unknown"),
        ({"rest_mass": torch.zeros(N, 1)}, r"rest_mass \(5, 1\)"),
        ({"ids": torch.zeros(N, 2, dtype=torch.int64)}, r"ids \(5, 2\)"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    student, ids, log_probs, mass = case(3)
    whole: dict[str, Any] = {
        "ids": ids, "log_probs": log_probs, "rest_mass": mass, "divergence": "forward", "rest": "spread",
        "scale_by_t2": False, "reduction": "mean",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        sparse_divergence(student, **(whole | given))

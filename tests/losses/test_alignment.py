"""Different vocabularies: shared words by name, sorted probabilities, and answers placed side by side."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.losses import (
    answer_places,
    kl_divergence,
    reduce_tokens,
    shared_divergence,
    shared_tokens,
    universal_logit_distance,
)

STUDENT = {"a": 2, "b": 0, "c": 1, "only student": 3}
TEACHER = {"c": 0, "only teacher": 1, "a": 4, "other": 3, "b": 2}


def logits(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_words_are_aligned_by_their_strings() -> None:
    ours, theirs = shared_tokens(STUDENT, TEACHER)
    assert ours.tolist() == [0, 1, 2] and theirs.tolist() == [2, 0, 4]


def test_vocabularies_that_share_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="share none"):
        shared_tokens({"Ġthe": 0}, {"▁the": 0})


def test_the_classes_are_the_shared_words_and_one_for_all_others() -> None:
    student, teacher = logits(0, 6, 4).requires_grad_(), logits(1, 6, 5)
    q, p = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    q = torch.cat([q[:, [0, 1, 2]], q[:, [3]]], -1)
    p = torch.cat([p[:, [2, 0, 4]], p[:, [1]] + p[:, [3]]], -1)
    wanted = 4 * (p * (p / q).log()).sum(-1).mean()
    found = shared_divergence(
        student, teacher, *shared_tokens(STUDENT, TEACHER), divergence="forward", temperature=2.0, scale_by_t2=True,
        reduction="mean",
    )  # fmt: skip
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (found, wanted)))


def test_one_vocabulary_in_another_order_gives_the_plain_divergence() -> None:
    student, teacher, order = logits(0, 6, 4), logits(1, 6, 4), torch.tensor([2, 0, 3, 1])
    found = shared_divergence(
        student, teacher[:, order.argsort()], torch.arange(4), order, divergence="forward", scale_by_t2=False,
        reduction="mean",
    )  # fmt: skip
    torch.testing.assert_close(found, kl_divergence(student, teacher, scale_by_t2=False, reduction="mean"))


def test_where_the_student_has_no_other_words_the_shared_ones_are_renormalised() -> None:
    student, teacher = logits(0, 6, 3), logits(1, 6, 5)
    found = shared_divergence(
        student, teacher, torch.arange(3), torch.tensor([2, 0, 4]), divergence="forward", scale_by_t2=False,
        reduction="mean",
    )  # fmt: skip
    wanted = kl_divergence(student, teacher[:, [2, 0, 4]], scale_by_t2=False, reduction="mean")
    torch.testing.assert_close(found, wanted)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), ours=st.integers(2, 8), theirs=st.integers(2, 8))
def test_the_universal_distance_is_the_sum_over_ranks(seed: int, ours: int, theirs: int) -> None:
    student, teacher = logits(seed, 3, ours), logits(seed + 1, 3, theirs)
    found = universal_logit_distance(student, teacher, student_temperature=2.0, reduction="none")
    for row in range(3):
        q = sorted((student[row] / 2).softmax(-1).tolist(), reverse=True) + [0.0] * 8
        p = sorted(teacher[row].softmax(-1).tolist(), reverse=True) + [0.0] * 8
        assert float(found[row]) == pytest.approx(sum(abs(a - b) for a, b in zip(q[:8], p[:8], strict=True)))
    assert ((found >= 0) & (found <= 2)).all()


def test_the_universal_distance_forgets_which_word_is_which() -> None:
    student = logits(0, 4, 6)
    other_words = student[:, torch.randperm(6, generator=torch.Generator().manual_seed(0))]
    distance = universal_logit_distance(student, other_words, reduction="mean")
    torch.testing.assert_close(distance, torch.zeros_like(distance))


def test_the_universal_distance_has_the_gradient_of_finite_differences() -> None:
    student, teacher = logits(0, 4, 6).requires_grad_(), logits(1, 4, 8)
    assert torch.autograd.gradcheck(lambda s: universal_logit_distance(s, teacher, reduction="mean"), student)


def test_answers_are_paired_place_by_place_and_the_rest_of_the_longer_one_is_left_out() -> None:
    ours = torch.tensor([[-100, -100, 5, 6, 7, -100], [1, 2, -100, -100, -100, -100]])
    theirs = torch.tensor([[-100, 8, 9, -100], [-100, -100, -100, 4]])
    student_places, teacher_places, kept = answer_places(ours, theirs)
    assert student_places[kept].tolist() == [2, 3, 0]
    assert teacher_places[kept].tolist() == [1, 2, 3]
    assert kept.tolist() == [[True, True, False, False], [True, False, False, False]]


def test_paired_answers_give_the_loss_of_the_official_code() -> None:
    # Mean over the pairs of a sequence, then over the sequences.
    ours = torch.tensor([[-100, -100, 5, 6, 7], [1, 2, -100, -100, -100]])
    theirs = torch.tensor([[-100, 8, 9, -100], [-100, -100, -100, 4]])
    student, teacher = logits(0, 2, 5, 6), logits(1, 2, 4, 7)
    student_places, teacher_places, kept = answer_places(ours, theirs)
    items = universal_logit_distance(
        torch.take_along_dim(student, student_places[..., None], 1),
        torch.take_along_dim(teacher, teacher_places[..., None], 1),
        reduction="none",
    )
    found = reduce_tokens(items, torch.where(kept, 0, -100), reduction="sequence_mean")
    pairs = [[((0, 2), (0, 1)), ((0, 3), (0, 2))], [((1, 0), (1, 3))]]
    wanted = torch.stack(
        [
            torch.stack([universal_logit_distance(student[i], teacher[j], reduction="none") for i, j in row]).mean()
            for row in pairs
        ]
    ).mean()
    torch.testing.assert_close(found, wanted)


def test_logits_that_do_not_stand_side_by_side_are_refused() -> None:
    with pytest.raises(ValueError, match="side by side"):
        universal_logit_distance(logits(0, 4, 6), logits(1, 5, 6), reduction="mean")

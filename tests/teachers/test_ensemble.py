"""Several teachers as one: what is averaged, with which weights."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck.errors import UserError
from limbeck.models import Outputs
from limbeck.teachers import Ensemble, Frozen, Teacher
from limbeck.teachers.ensemble import combine

seeds = st.integers(0, 10**6)
averages = pytest.mark.parametrize("average", ["logits", "probabilities"])


def logits_of(seed: int, size: float = 3.0) -> torch.Tensor:
    """M = 3 members, B = 4 samples, C = 5 classes."""
    return size * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed))


def member(seed: int, classes: int = 5) -> Frozen:
    torch.manual_seed(seed)
    return Frozen(nn.Sequential(nn.Flatten(), nn.Linear(12, classes)))


FIELDS = {"weak": torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(7))}


@given(seed=seeds, weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_logits_are_averaged_with_weights_that_sum_to_one(seed, weights):
    logits = logits_of(seed)
    shares = [w / sum(weights) for w in weights]
    wanted = sum(share * z for share, z in zip(shares, logits, strict=True))
    torch.testing.assert_close(combine(logits, torch.tensor(weights), "logits"), wanted, rtol=1e-4, atol=1e-5)


@given(seed=seeds, weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_the_softmax_of_the_answer_is_the_mean_of_the_members_probabilities(seed, weights):
    logits = logits_of(seed)
    shares = [w / sum(weights) for w in weights]
    wanted = sum(share * z.softmax(-1) for share, z in zip(shares, logits, strict=True))
    answer = combine(logits, torch.tensor(weights), "probabilities").softmax(-1)
    torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-6)


@averages
def test_weights_may_differ_between_samples(average):
    logits = logits_of(0)
    weights = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) + 0.1
    together = combine(logits, weights, average)
    for sample in range(4):
        alone = combine(logits[:, sample : sample + 1], weights[:, sample], average)
        torch.testing.assert_close(together[sample], alone[0])


@averages
def test_a_member_of_weight_zero_says_nothing(average):
    logits = logits_of(0)
    answer = combine(logits, torch.tensor([0.0, 0.0, 2.0]), average)
    torch.testing.assert_close(answer.softmax(-1), logits[2].softmax(-1))


@averages
def test_one_member_and_equal_members_answer_as_themselves(average):
    one = logits_of(0)[:1]
    for members in (one, one.expand(3, -1, -1)):
        torch.testing.assert_close(combine(members, torch.ones(len(members)), average).softmax(-1), one[0].softmax(-1))


@averages
def test_extreme_half_precision_logits_give_no_nan(average):
    logits = torch.tensor([[[60000.0, -60000.0, 0.0]], [[-60000.0, 60000.0, 0.0]]], dtype=torch.float16)
    answer = combine(logits, torch.ones(2), average)
    assert answer.dtype == torch.float32 and answer.softmax(-1).isfinite().all()


@averages
def test_an_ensemble_asks_its_members(average):
    members = [member(0), member(1)]
    answer = Ensemble(members, average=average, weights=[3, 1])(FIELDS, "weak").logits
    logits = torch.stack([teacher(FIELDS, "weak").logits for teacher in members])
    torch.testing.assert_close(answer, combine(logits, torch.tensor([3.0, 1.0]), average))
    assert not answer.is_inference()


def test_without_weights_all_members_count_the_same():
    members = [member(0), member(1)]
    torch.testing.assert_close(
        Ensemble(members)(FIELDS, "weak").logits, Ensemble(members, weights=[2, 2])(FIELDS, "weak").logits
    )


def test_a_deep_copy_shares_the_ensemble():
    ensemble = Ensemble([member(0)])
    assert copy.deepcopy([ensemble])[0] is ensemble


class Unknown(Teacher):
    """A teacher that does not tell how many classes it knows."""

    def __call__(self, fields, view):
        return Outputs(logits=torch.zeros(len(fields[view]), 5))


def test_members_of_unknown_class_count_are_taken_at_their_word():
    assert Ensemble([member(0), Unknown()]).class_count == 5
    assert Ensemble([Unknown()]).class_count is None


@pytest.mark.parametrize(
    ("members", "weights", "words"),
    [
        ([], None, "at least one teacher"),
        ([5, 7], None, "have 5, 7 classes"),
        ([5, 5], [1], "2 non-negative weights"),
        ([5, 5], [1, -1], "non-negative"),
        ([5, 5], [0, 0], "non-negative"),
    ],
)
def test_members_and_weights_that_do_not_fit_are_refused(members, weights, words):
    with pytest.raises(UserError, match=words):
        Ensemble([member(0, classes) for classes in members], weights=weights)


def test_a_member_without_logits_is_refused():
    class Mute(Teacher):
        def __call__(self, fields, view):
            return Outputs()

    with pytest.raises(UserError, match="no logits"):
        Ensemble([Mute()])(FIELDS, "weak")

"""Committees and the weight of each voice."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import UserError
from limbeck.labels.votes import seats, vote_weights

PRIORS = [63.0, 65.3, 68.5, 67.6, 67.4]


@settings(max_examples=25, deadline=None)
@given(priors=st.lists(st.floats(0, 100), min_size=1, max_size=6), temperature=st.floats(0.1, 100))
def test_weights_are_a_distribution_in_the_order_of_the_priors(priors, temperature):
    weights = vote_weights(priors, temperature)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    for i, j in itertools.combinations(range(len(priors)), 2):
        assert (priors[i] - priors[j]) * float(weights[i] - weights[j]) >= 0


def test_weights_of_the_paper():
    assert vote_weights([63, 68.5], 5).tolist() == pytest.approx([0.25, 0.75], abs=0.001)
    assert vote_weights([60, 65], 5).tolist()[1] == pytest.approx(math.e / (1 + math.e))


def test_equal_priors_give_equal_weights_and_temperature_goes_from_the_best_alone_to_all():
    assert torch.allclose(vote_weights([50.0] * 4, 5), torch.full((4,), 0.25))
    assert vote_weights(PRIORS, 1e-3).tolist() == [0, 0, 1, 0, 0]
    assert torch.allclose(vote_weights(PRIORS, 1e6), torch.full((5,), 0.2), atol=1e-4)
    assert torch.allclose(vote_weights(PRIORS, 5, "equal"), torch.full((5,), 0.2))
    assert not torch.equal(vote_weights(PRIORS, 5, "random"), vote_weights(PRIORS, 5, "random"))


def test_a_walk_visits_every_pair_in_lexicographic_order():
    assert [seats(index, PRIORS, 2) for index in range(10)] == list(itertools.combinations(range(5), 2))
    assert seats(10, PRIORS, 2) == (0, 1)


def test_the_best_are_the_highest_priors_and_random_ones_differ():
    assert seats(7, PRIORS, 2, "best") == (2, 3)
    drawn = {seats(0, PRIORS, 2, "random") for _ in range(50)}
    assert len(drawn) > 3 and all(len(set(pair)) == 2 for pair in drawn)


def test_impossible_committees_are_refused():
    with pytest.raises(UserError, match="a committee of 6 cannot be chosen from 5 networks"):
        seats(0, PRIORS, 6)
    with pytest.raises(UserError, match="not 'worst'"):
        seats(0, PRIORS, 2, "worst")
    with pytest.raises(UserError, match="voting is 'loud'"):
        vote_weights(PRIORS, 5, "loud")
    with pytest.raises(UserError, match="temperature is 0"):
        vote_weights(PRIORS, 0)

"""Schedules: their ends, their warm-up, their shapes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import UserError
from limbeck.train import Schedule

KINDS = ("constant", "linear", "cosine", "cosine_7_16", "step", "poly")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_begins_at_start(kind):
    assert Schedule(kind, start=3.0, end=1.0)(0, 100) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("kind", "last"),
    [("constant", 3.0), ("linear", 1.0), ("cosine", 1.0), ("poly", 1.0), ("step", 1.02), ("cosine_7_16", 1.39018)],
)
def test_behind_the_last_step_each_kind_has_come_to_its_end(kind, last):
    assert Schedule(kind, start=3.0, end=1.0)(100, 100) == pytest.approx(last, abs=1e-5)
    assert Schedule(kind, start=3.0, end=1.0)(250, 100) == pytest.approx(last, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "half"),
    [
        ("linear", 0.5),
        ("cosine", 0.5),
        ("poly", 0.5**0.9),
        ("step", 0.1),
        ("cosine_7_16", math.cos(7 * math.pi / 32)),
    ],
)
def test_half_way_each_kind_has_its_own_value(kind, half):
    assert Schedule(kind)(50, 100) == pytest.approx(half)


def test_step_multiplies_at_each_milestone_and_not_before():
    values = [Schedule("step", milestones=(0.5, 0.75), gamma=0.1)(step, 100) for step in (49, 50, 74, 75)]
    assert values == pytest.approx([1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("warmup", [20, 0.2])
def test_warm_up_grows_linearly_over_steps_or_a_share_of_them(warmup):
    schedule = Schedule("cosine", start=2.0, warmup=warmup)
    assert [schedule(step, 100) for step in (0, 5, 10, 20)] == pytest.approx([0, 0.5, 1, 2])
    assert schedule(60, 100) == pytest.approx(1.0)  # the shape spans what the warm-up leaves


def test_warm_up_may_begin_above_zero():
    assert Schedule(warmup=10, warmup_start=0.5)(0, 100) == 0.5


@given(
    kind=st.sampled_from(KINDS),
    warmup=st.one_of(st.integers(0, 50), st.floats(0, 0.9)),
    steps=st.integers(1, 200),
    step=st.integers(0, 250),
)
@settings(max_examples=100, deadline=None)
def test_values_stay_between_end_and_start(kind, warmup, steps, step):
    assert 0 <= Schedule(kind, warmup=warmup)(step, steps) <= 1


@pytest.mark.parametrize("bad", [{"warmup": -1}, {"milestones": (0.5, 1.0)}])
def test_impossible_schedules_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Schedule(**bad)


def test_a_stretched_cosine_ends_before_its_zero():
    smoothed = Schedule("cosine", stretch=2.0)
    assert smoothed(0, 300) == pytest.approx(1.0) and smoothed(300, 300) == pytest.approx(0.5)
    assert smoothed(150, 300) == pytest.approx(0.5 * (1 + math.cos(math.pi * 150 / 600)))
    with pytest.raises(UserError, match="stretch is 0.5"):
        Schedule("cosine", stretch=0.5)

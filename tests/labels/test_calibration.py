"""Calibration error by hand and against torchmetrics, and the two-stage search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_calibration_error

from limbeck.labels import expected_calibration_error, grid_search


@settings(max_examples=25, deadline=None)
@given(confidence=st.floats(0, 1, width=32), right=st.integers(0, 30))
def test_the_error_of_a_constant_confidence_is_its_distance_from_the_accuracy(confidence, right):
    correct = torch.arange(30) < right
    found = expected_calibration_error(torch.full((30,), confidence), correct)
    assert float(found) == pytest.approx(abs(right / 30 - confidence), abs=1e-5)


def test_the_error_by_hand():
    """Two of three right at 0.9 (gap 7/30), none of one at 0.4: 3/4 * 7/30 + 1/4 * 0.4."""
    found = expected_calibration_error(torch.tensor([0.9, 0.4, 0.9, 0.9]), torch.tensor([1, 0, 0, 1]))
    assert float(found) == pytest.approx(0.75 * 7 / 30 + 0.25 * 0.4, abs=1e-6)


@pytest.mark.parametrize("edge", [0.1, 0.2, 0.3, 0.6, 0.7])
def test_bins_are_closed_above(edge):
    """A confidence at an edge lies with the ones below: their gaps cancel, which two bins would not allow."""
    confidence = torch.tensor([edge, edge - 0.05])
    together = expected_calibration_error(confidence, torch.tensor([1, 0]))
    assert float(together) == pytest.approx(abs(1 - 2 * edge + 0.05) / 2, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bins=st.integers(2, 20))
def test_the_error_is_that_of_torchmetrics(seed, bins):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(50, generator=generator)
    correct = torch.rand(50, generator=generator) < 0.6
    expected = binary_calibration_error(confidence, correct.int(), n_bins=bins, norm="l1")
    torch.testing.assert_close(expected_calibration_error(confidence, correct, bins), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shapes", [((0,), (0,)), ((3,), (2,)), ((2, 2), (2, 2))])
def test_predictions_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="both must be"):
        expected_calibration_error(*(torch.zeros(shape) for shape in shapes))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_search_returns_the_smallest_score_that_it_saw(seed):
    seen = {}

    def score(value: float) -> torch.Tensor:
        seen[value] = torch.rand((), generator=torch.Generator().manual_seed(seed + round(1000 * value)))
        return seen[value]

    values, scores = grid_search(score)
    assert float(scores.min()) == pytest.approx(float(min(seen.values())))
    assert len(values) == len(seen) and bool((values[1:] > values[:-1]).all())


@settings(max_examples=25, deadline=None)
@given(best=st.floats(0.05, 1.0))
def test_the_search_is_as_near_to_one_valley_as_its_fine_grid(best):
    values, scores = grid_search(lambda value: torch.tensor(abs(value - best)))
    assert abs(float(values[scores.argmin()]) - best) <= 0.01 + 1e-6


def test_the_grids_are_tenths_and_then_fiftieths_around_the_best():
    values, _ = grid_search(lambda value: torch.tensor(abs(value - 0.34)))
    tenths = [n / 10 for n in range(1, 11)]
    around = [0.22, 0.24, 0.26, 0.28, 0.32, 0.34, 0.36, 0.38]
    assert values.tolist() == pytest.approx(sorted(tenths + around))


def test_the_search_stays_above_zero():
    values, _ = grid_search(lambda value: torch.tensor(value))
    assert float(values[0]) == pytest.approx(0.02)

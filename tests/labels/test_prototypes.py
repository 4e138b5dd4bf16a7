"""Soft assignment to prototypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.labels import class_means, prototype_scores, soft_assignment

METRICS = ("cosine", "euclidean", "squared_euclidean")


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), metric=st.sampled_from(METRICS))
def test_scores_are_the_formula_pair_by_pair(seed, metric):
    x, prototypes = drawn(seed, 3, 4, 5), drawn(seed + 1, 6, 5)
    for i in range(3):
        for j in range(4):
            for k in range(6):
                a, b = x[i, j], prototypes[k]
                expected = {
                    "cosine": (a @ b) / (a.norm() * b.norm()),
                    "euclidean": -(a - b).norm(),
                    "squared_euclidean": -(a - b).square().sum(),
                }[metric]
                assert torch.allclose(prototype_scores(x, prototypes, metric=metric)[i, j, k], expected)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), metric=st.sampled_from(METRICS), temperature=st.floats(0.01, 100))
def test_an_assignment_is_a_distribution_whose_mode_is_the_nearest(seed, metric, temperature):
    x, prototypes = drawn(seed, 7, 5), drawn(seed + 1, 6, 5)
    p = soft_assignment(x, prototypes, temperature=temperature, metric=metric)
    assert torch.allclose(p.sum(-1), torch.ones(7, dtype=torch.float64)) and bool((p >= 0).all())
    assert torch.equal(p.argmax(-1), prototype_scores(x, prototypes, metric=metric).argmax(-1))


def test_temperature_goes_from_one_hot_to_uniform():
    x, prototypes = drawn(0, 7, 5), drawn(1, 6, 5)
    assert torch.allclose(soft_assignment(x, prototypes, temperature=1e-5).amax(-1), torch.ones(7, dtype=torch.float64))
    uniform = soft_assignment(x, prototypes, temperature=1e6)
    assert torch.allclose(uniform, torch.full_like(uniform, 1 / 6), atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_are_finite_on_a_prototype_and_at_zero(metric):
    prototypes = torch.randn(3, 4)
    x = torch.stack([prototypes[0], torch.zeros(4)]).requires_grad_()
    prototype_scores(x, prototypes, metric=metric).sum().backward()
    assert bool(x.grad.isfinite().all())


def test_class_means_say_which_classes_are_absent():
    features, labels = torch.tensor([[1.0, 3.0], [3.0, 5.0], [7.0, 7.0]]), torch.tensor([0, 0, 2])
    means, present = class_means(features, labels, 4)
    assert means.tolist() == [[2, 4], [0, 0], [7, 7], [0, 0]] and present.tolist() == [True, False, True, False]


def test_widths_and_metrics_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="features have width 3 and prototypes 4"):
        prototype_scores(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="metric is 'dot'"):
        prototype_scores(torch.ones(2, 3), torch.ones(2, 3), metric="dot")

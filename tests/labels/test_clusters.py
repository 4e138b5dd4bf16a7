"""Whitening, k-means and mutual information: what a rotation must not change, and what cannot be clustered."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import UserError
from limbeck.labels import cluster_labels, kmeans, mutual_information, nearest_centre, whiten


def features(seed: int, n: int = 200, width: int = 8) -> Tensor:
    """Correlated, of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(n, width, generator=generator) * torch.logspace(-1, 1, width)
    return spread @ rotation(width, seed) + 5


def islands(seed: int, n: int = 120, clusters: int = 4, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(n) % clusters
    centres = 8 * torch.eye(clusters, width)
    return centres[truth] + 0.3 * torch.randn(n, width, generator=generator), truth


def rotation(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), dims=st.integers(1, 8))
def test_whitened_features_have_the_identity_as_covariance(seed: int, dims: int) -> None:
    white = whiten(features(seed), dims)
    assert white.shape == (200, dims)
    torch.testing.assert_close(torch.cov(white.T).reshape(dims, dims), torch.eye(dims), atol=1e-2, rtol=0)
    torch.testing.assert_close(white.mean(0), torch.zeros(dims), atol=1e-3, rtol=0)


def test_directions_without_variance_are_left_out() -> None:
    flat = torch.cat([features(0, width=3), torch.zeros(200, 4), features(0, width=3)[:, :1]], 1)
    assert whiten(flat, 8).shape == (200, 3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_clusters_survive_rotation_shift_and_scaling_of_the_features(seed: int, scale: float) -> None:
    x, _ = islands(seed)
    labels = cluster_labels(x, 4, seed=seed)
    turned = cluster_labels(scale * x @ rotation(6, seed) + 3, 4, seed=seed)
    assert mutual_information(labels, turned) == pytest.approx(1)


def test_islands_are_found() -> None:
    x, truth = islands(0)
    assert mutual_information(cluster_labels(x, 4), truth) == pytest.approx(1)


def test_centres_are_the_means_of_their_members_and_new_points_go_to_the_nearest() -> None:
    x, _ = islands(1)
    found = kmeans(x, 4, seed=0)
    for k in range(4):
        torch.testing.assert_close(found.centres_KD[k], x[found.ids_N == k].mean(0), atol=1e-4, rtol=0)
    assert torch.equal(nearest_centre(x, found.centres_KD), found.ids_N)


def test_the_same_seed_gives_the_same_labels() -> None:
    x = features(3)
    assert torch.equal(cluster_labels(x, 12, seed=1), cluster_labels(x, 12, seed=1))


def test_a_cluster_that_stays_empty_is_refused() -> None:
    with pytest.raises(UserError, match="3 of 6 clusters are empty"):
        kmeans(torch.tensor([[0.0], [1.0], [5.0]]).repeat(5, 1), 6)


@pytest.mark.parametrize(
    ("x", "clusters", "words"), [(torch.randn(4, 2), 5, "lower clusters"), (torch.randn(4, 2), 0, "0")]
)
def test_more_clusters_than_samples_are_refused(x: Tensor, clusters: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        kmeans(x, clusters)


@pytest.mark.parametrize("x", [torch.ones(10, 3), torch.full((10, 3), torch.nan), torch.ones(1, 3)])
def test_features_that_say_nothing_are_refused(x: Tensor) -> None:
    with pytest.raises(UserError, match="cannot be whitened"):
        whiten(x, 2)


def test_mutual_information_is_one_for_a_renaming_and_zero_for_a_constant() -> None:
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    assert mutual_information(ids, torch.tensor([5, 5, 3, 3, 9, 9])) == pytest.approx(1)
    assert mutual_information(ids, torch.zeros(6, dtype=torch.int64)) == 0

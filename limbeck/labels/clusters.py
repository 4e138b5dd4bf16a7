"""Cluster ids as labels: whitened features, k-means, and how much the clusters say of known groups.

Letters: N samples, D width of the features, P whitened dimensions, K clusters. Everything runs on the host, in float64
where a covariance is inverted, and is a pure function of its arguments and the seed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError

NEGLIGIBLE = 1e-7  # of the largest variance: such directions are rounding, whitening would blow them up


class Clusters(NamedTuple):
    """`ids_N` int64 in 0..K-1, and `centres_KD` float32, the means of their members."""

    ids_N: Tensor
    centres_KD: Tensor


def whiten(features_ND: Tensor, dims: int) -> Tensor:
    """The first `dims` principal components, centred and scaled to variance 1 each: float32 [N,P].

    P is smaller than `dims` where the features have fewer directions of a variance above 1e-7 of the largest. The
    components are uncorrelated over the N samples; a rotation, shift or scaling of the features changes signs at most.

    Raises `UserError` for fewer than 2 samples, and for features that are all equal or not finite.
    """
    from sklearn.decomposition import PCA

    values = features_ND.detach().cpu().double().numpy()
    if len(values) < 2 or not np.isfinite(values).all() or not values.std(0).any():
        raise UserError(
            f"Features {list(features_ND.shape)} cannot be whitened: expected at least 2 samples with finite "
            "features that are not all equal; look whether the encoder is trained."
        )
    pca = PCA(min(dims, *values.shape), svd_solver="full")
    components = pca.fit_transform(values)
    kept = int((pca.explained_variance_ > NEGLIGIBLE * pca.explained_variance_[0]).sum())
    return torch.from_numpy(components[:, :kept] / np.sqrt(pca.explained_variance_[:kept])).float()


def kmeans(features_ND: Tensor, clusters: int, *, iterations: int = 20, seed: int = 0) -> Clusters:
    """Lloyd's k-means from k-means++ centres, once. An empty cluster takes the sample that is farthest from its centre.

    Raises `UserError` where there are fewer different samples than clusters, so that one stays empty.
    """
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if not 1 <= clusters <= len(features_ND):
        raise UserError(f"{clusters} clusters were asked for of {len(features_ND)} samples: lower clusters.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what it warns of is checked below
        found = KMeans(clusters, n_init=1, max_iter=iterations, random_state=seed).fit(
            features_ND.detach().cpu().numpy()
        )
    ids = torch.from_numpy(found.labels_).long()
    empty = int((torch.bincount(ids, minlength=clusters) == 0).sum())
    if empty:
        raise UserError(
            f"{empty} of {clusters} clusters are empty: the features have too few different values; lower clusters "
            "(about the root of the number of samples), or look whether the encoder collapsed."
        )
    return Clusters(ids, torch.from_numpy(found.cluster_centers_).float())


def nearest_centre(features_ND: Tensor, centres_KD: Tensor) -> Tensor:
    """The id of the nearest centre by Euclidean distance, int64 [N]: for samples that were not clustered."""
    return torch.cdist(features_ND.float(), centres_KD.to(features_ND.device)).argmin(1)


def cluster_labels(
    features_ND: Tensor, clusters: int, *, dims: int = 128, iterations: int = 20, seed: int = 0
) -> Tensor:
    """Pseudo-labels int64 [N]: `whiten` to `dims`, rows of unit length, `kmeans`.

    Unchanged, up to the clusters' numbers, by a rotation, shift and scaling of the features.
    Source: DeepCluster (Caron et al. 2018, section 4) as UnFuSeD has it.
    """
    return kmeans(F.normalize(whiten(features_ND, dims)), clusters, iterations=iterations, seed=seed).ids_N


def mutual_information(first_N: Tensor, second_N: Tensor) -> float:
    """Normalised mutual information of two labellings, in 0..1: 1 where each tells the other, 0 where neither does.

    I(a, b) / ((H(a) + H(b)) / 2). Random labels have more than 0 where groups are small: compare with a permutation.
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(first_N.cpu().numpy(), second_N.cpu().numpy()))

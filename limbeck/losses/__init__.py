"""Losses: pure functions of tensors that return a tensor. They know nothing of models, data or training.

`reduction.py` says what every `reduction`, `weight` and `mask` means; each room's first lines say what holds
for all of its functions.
"""

from .contrastive import info_nce, nt_xent, supervised_contrastive
from .divergence import (
    entropy,
    jensen_shannon,
    kl_divergence,
    kl_to_uniform,
    linear_kl,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    symmetric_kl,
)
from .feature import (
    cosine_distance,
    feature_l1,
    feature_mse,
    feature_smooth_l1,
    normalize_features,
    resize_features,
    unit,
)
from .reduction import Reduction, reduce, upcast
from .relation import (
    attention_relation,
    attention_transfer,
    channel_wise,
    gram,
    rkd_angle,
    rkd_distance,
    similarity_matrix,
    similarity_preserving,
    split_heads,
)

__all__ = [
    "Reduction",
    "attention_relation",
    "attention_transfer",
    "channel_wise",
    "cosine_distance",
    "entropy",
    "feature_l1",
    "feature_mse",
    "feature_smooth_l1",
    "gram",
    "info_nce",
    "jensen_shannon",
    "kl_divergence",
    "kl_to_uniform",
    "linear_kl",
    "normalize_features",
    "nt_xent",
    "reduce",
    "resize_features",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "similarity_matrix",
    "similarity_preserving",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "split_heads",
    "supervised_contrastive",
    "symmetric_kl",
    "unit",
    "upcast",
]

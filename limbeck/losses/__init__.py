"""Losses: pure functions of tensors that return a tensor. They know nothing of models, data or training.

`reduction.py` says what every `reduction`, `weight` and `mask` means; each room's first lines say what holds
for all of its functions.
"""

from .alignment import answer_places, shared_divergence, shared_tokens, universal_logit_distance
from .balance import balance_cv, balance_kl, balance_switch
from .contrastive import info_nce, nt_xent, supervised_contrastive
from .dense import (
    binary_dice_loss,
    dice_loss,
    pixel_cross_entropy,
    pixel_kl,
    region_means,
    resize_logits,
)
from .detection import generalized_iou, giou_loss
from .diffusion import (
    denoising,
    discrimination,
    distribution_matching,
    distribution_matching_gradient,
    gradient_as_loss,
    pseudo_huber,
    realism,
    x0_weight,
)
from .divergence import (
    entropy,
    jensen_shannon,
    kl_divergence,
    kl_to_uniform,
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
from .language import (
    TokenReduction,
    reduce_tokens,
    shift,
    token_cross_entropy,
    token_divergence,
    token_entropy,
    token_soft_cross_entropy,
    total_variation,
)
from .reconstruction import masked_patch_mse
from .reduction import Reduction, reduce, upcast
from .redundancy import barlow_twins, cross_correlation
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
from .sparse import Rest, SparseDivergence, divergence_named, sparse_divergence
from .vocabulary import linear_cross_entropy, linear_divergence, linear_sparse_divergence

__all__ = [
    "masked_patch_mse",
    "Reduction",
    "Rest",
    "SparseDivergence",
    "TokenReduction",
    "answer_places",
    "attention_relation",
    "attention_transfer",
    "balance_cv",
    "balance_kl",
    "balance_switch",
    "barlow_twins",
    "binary_dice_loss",
    "channel_wise",
    "cosine_distance",
    "cross_correlation",
    "denoising",
    "dice_loss",
    "discrimination",
    "distribution_matching",
    "distribution_matching_gradient",
    "divergence_named",
    "entropy",
    "feature_l1",
    "feature_mse",
    "feature_smooth_l1",
    "generalized_iou",
    "giou_loss",
    "gradient_as_loss",
    "gram",
    "info_nce",
    "jensen_shannon",
    "kl_divergence",
    "kl_to_uniform",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_sparse_divergence",
    "normalize_features",
    "nt_xent",
    "pixel_cross_entropy",
    "pixel_kl",
    "pseudo_huber",
    "realism",
    "reduce",
    "reduce_tokens",
    "region_means",
    "resize_features",
    "resize_logits",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "shared_divergence",
    "shared_tokens",
    "shift",
    "similarity_matrix",
    "similarity_preserving",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "sparse_divergence",
    "split_heads",
    "supervised_contrastive",
    "symmetric_kl",
    "token_cross_entropy",
    "token_divergence",
    "token_entropy",
    "token_soft_cross_entropy",
    "total_variation",
    "unit",
    "universal_logit_distance",
    "upcast",
    "x0_weight",
]

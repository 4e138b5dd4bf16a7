"""No loss reads a value back from the device: on the meta device, which has no values, reading fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from limbeck import losses

S = torch.empty(8, 4, device="meta", requires_grad=True)
T = torch.empty(8, 4, device="meta")
MAPS = torch.empty(2, 3, 4, 4, device="meta", requires_grad=True)
TOKENS = torch.empty(2, 4, dtype=torch.bool, device="meta")
LABELS = torch.empty(8, dtype=torch.int64, device="meta")
WEIGHTED = {"reduction": "mean", "weight": T[:, 0], "mask": T[:, 0]}
HEAD = torch.empty(50, 4, device="meta")

DIVERGENCES = ["kl_divergence", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl"]
CALLS: dict[str, Callable[[], Tensor]] = {
    **{name: partial(getattr(losses, name), S, T, scale_by_t2=True, **WEIGHTED) for name in DIVERGENCES},
    "symmetric_kl": lambda: losses.symmetric_kl(S, T, halves="sum", scale_by_t2=True, **WEIGHTED),
    "temperature_per_item": lambda: losses.kl_divergence(S, T, temperature=T[:, 0], scale_by_t2=True, **WEIGHTED),
    "soft_cross_entropy": lambda: losses.soft_cross_entropy(S, T, **WEIGHTED),
    "entropy": lambda: losses.entropy(S, **WEIGHTED),
    "kl_to_uniform": lambda: losses.kl_to_uniform(S, **WEIGHTED),
    "linear_kl": lambda: losses.linear_kl(S, HEAD, T, HEAD, scale_by_t2=False, chunk=3, **WEIGHTED),
    "feature_mse": lambda: losses.feature_mse(S, T, normalize_student="l2", normalize_target="layer", **WEIGHTED),
    "feature_smooth_l1": lambda: losses.feature_smooth_l1(S, T, beta=2.0, normalize_target="channel", **WEIGHTED),
    "cosine_distance": lambda: losses.cosine_distance(S, T, **WEIGHTED),
    "similarity_preserving": lambda: losses.similarity_preserving(S, T),
    "rkd_distance": lambda: losses.rkd_distance(S, T),
    "rkd_angle": lambda: losses.rkd_angle(S, T),
    "attention_transfer": lambda: losses.attention_transfer(MAPS, MAPS, reduction="mean"),
    "channel_wise": lambda: losses.channel_wise(MAPS, MAPS, temperature=4.0, scale_by_t2=True, reduction="mean"),
    "attention_relation": lambda: losses.attention_relation(MAPS, MAPS, tokens_BT=TOKENS, reduction="mean"),
    "info_nce": lambda: losses.info_nce(S, T, temperature=T[0, 0], normalize=True, positives_BM=S @ T.T, **WEIGHTED),
    "nt_xent": lambda: losses.nt_xent(S, T, temperature=0.1, normalize=True, halves="sum", **WEIGHTED),
    "supervised_contrastive": lambda: losses.supervised_contrastive(
        S, T, LABELS, LABELS, own_offset=0, temperature=0.1, normalize=True, **WEIGHTED
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_read_back_from_the_device_forwards_or_backwards(name: str) -> None:
    CALLS[name]().backward()

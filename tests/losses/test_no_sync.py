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
WIDE = torch.empty(8, 50, device="meta", requires_grad=True)
IDS = torch.empty(8, 4, dtype=torch.int64, device="meta")

DIVERGENCES = ["kl_divergence", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl"]
CALLS: dict[str, Callable[[], Tensor]] = {
    **{name: partial(getattr(losses, name), S, T, scale_by_t2=True, **WEIGHTED) for name in DIVERGENCES},
    "symmetric_kl": lambda: losses.symmetric_kl(S, T, halves="sum", scale_by_t2=True, **WEIGHTED),
    "temperature_per_item": lambda: losses.kl_divergence(S, T, temperature=T[:, 0], scale_by_t2=True, **WEIGHTED),
    "soft_cross_entropy": lambda: losses.soft_cross_entropy(S, T, **WEIGHTED),
    "entropy": lambda: losses.entropy(S, **WEIGHTED),
    "kl_to_uniform": lambda: losses.kl_to_uniform(S, **WEIGHTED),
    **{
        f"linear_{name}": partial(
            losses.linear_divergence, S, HEAD, T, HEAD, divergence=name, scale_by_t2=True, chunk=3, **WEIGHTED
        )
        for name in ("forward", "reverse", "jensen_shannon", "skew", "skew_reverse", "total_variation")
    },
    "linear_taid": lambda: losses.linear_divergence(
        S, HEAD, T, HEAD, divergence="taid", t=T[0, 0], scale_by_t2=False, chunk=3, **WEIGHTED
    ),
    "linear_cross_entropy": lambda: losses.linear_cross_entropy(S, HEAD, LABELS, reduction="mean", chunk=3),
    **{
        f"linear_sparse_{rest}": partial(
            losses.linear_sparse_divergence,
            S,
            HEAD,
            IDS,
            T,
            T[:, 0],
            divergence="forward",
            rest=rest,
            scale_by_t2=False,
            chunk=3,
            **WEIGHTED,
        )
        for rest in ("ignore", "spread", "bucket")
    },
    **{
        f"sparse_{rest}": partial(
            losses.sparse_divergence,
            WIDE,
            IDS,
            T,
            T[:, 0],
            divergence="forward",
            rest=rest,
            scale_by_t2=False,
            **WEIGHTED,
        )
        for rest in ("ignore", "spread", "bucket")
    },
    "shared_divergence": lambda: losses.shared_divergence(
        S, WIDE, LABELS[:3], LABELS[:3], divergence="forward", scale_by_t2=False, **WEIGHTED
    ),
    "universal_logit_distance": lambda: losses.universal_logit_distance(S, WIDE, **WEIGHTED),
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

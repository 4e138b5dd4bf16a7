"""Load balance of a router: that no expert (teacher) gets all the samples and none gets too few.

Letters: B samples (or tokens), M experts, K picked by each sample.

All take the gate logits [B,M] of the WHOLE batch: under several processes gather them with gradient first, since the
mean over the batch stands inside a logarithm or a quotient. g = softmax(logits), gbar_m = mean_b g_bm, u_m = 1/M.
Computed in float32 (float64 stays) and, where there is a logarithm, in the log domain: a gate that is sure of one
expert gives a large value with a gradient, never inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reduction import upcast


def balance_kl(gate_logits_BM: Tensor, *, uniform_first: bool, mean: bool) -> Tensor:
    """Divergence between the mean gate and the uniform one; 0 where the mean gate is uniform, never negative.

    `uniform_first`: KL(u || gbar) = sum_m u_m (log u_m - log gbar_m), as MST-Distill has it, which grows without bound
    as an expert starves; else KL(gbar || u) = sum_m gbar_m log(M gbar_m), at most log M, as Astrea has it.
    `mean` divides by M (`batchmean` of a vector in the official code of MST-Distill).
    """
    logits_BM = upcast(gate_logits_BM)
    samples, experts = logits_BM.shape
    log_mean_M = logits_BM.log_softmax(-1).logsumexp(0) - math.log(samples)
    log_uniform = -math.log(experts)
    terms_M = (log_uniform - log_mean_M) / experts if uniform_first else log_mean_M.exp() * (log_mean_M - log_uniform)
    return terms_M.mean() if mean else terms_M.sum()


def balance_cv(gate_logits_BM: Tensor) -> Tensor:
    """Coefficient of variation of the experts' importance: std_m(I) / mean_m(I), I = sum_b g_b, std with n - 1.

    In [0, sqrt(M)]. Source: Shazeer et al. 2017, equation 6, without the square; mode `CV` of MST-Distill. ValueError
    with fewer than two experts, which have no deviation.
    """
    if gate_logits_BM.shape[-1] < 2:
        raise ValueError(f"balance_cv needs at least two experts, got gate logits {tuple(gate_logits_BM.shape)}.")
    importance_M = upcast(gate_logits_BM).softmax(-1).sum(0)
    spread_M = importance_M - importance_M.mean()
    # The root of a square sum of zeros has no gradient: a balanced gate would turn into NaN.
    square = spread_M.square().sum() / (len(spread_M) - 1)
    deviation = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
    return deviation / importance_M.mean()


def balance_switch(gate_logits_BM: Tensor, index_BK: Tensor, *, mask_B: Tensor | None = None) -> Tensor:
    """M * sum_k sum_m f_km P_m: f_km the share of samples whose k-th pick is m (no gradient), P_m the mean of g_m.

    K at perfect balance, up to K M. `mask_B` leaves samples out of both (padding). Of several layers concatenate logits
    and picks first. Experts that a router may not pick have the logit -inf. Source: Switch Transformer (Fedus et al.
    2022), equation 4, for K = 1; MoIIE for K = 2.
    """
    gates_BM = upcast(gate_logits_BM).softmax(-1)
    weight_B = gates_BM.new_ones(len(gates_BM)) if mask_B is None else mask_B.to(gates_BM)
    weight_B = weight_B / weight_B.sum().clamp(min=1)
    experts = gates_BM.shape[-1]
    picked_BKM = torch.nn.functional.one_hot(index_BK, experts).to(gates_BM)
    share_KM = (weight_B[:, None, None] * picked_BKM).sum(0)
    return experts * (share_KM * (weight_B[:, None] * gates_BM).sum(0)).sum()

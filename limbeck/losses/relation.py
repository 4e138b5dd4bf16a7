"""Losses on relations: between samples, between positions, between tokens.

Letters: B samples, N and M vectors, D width, C channels, H and W height and width, A attention heads, T
tokens. Nothing is detached: detach a frozen target. Computed in float32 (float64 stays), also under autocast:
relations are products of features, and half precision would round them before they are compared.
The relations between samples are those of this process's batch; gather the features first for those of all
processes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Literal, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

from .divergence import kl_divergence
from .feature import unit
from .reduction import EXCLUDED, Reduction, reduce, upcast

Metric = Literal["cosine", "dot", "euclidean"]
Arguments = ParamSpec("Arguments")


def full_precision(function: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """The function with autocast switched off inside, so that its matrix products stay in float32."""

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        device = tensor.device.type
        switch = torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()
        with switch:
            return function(*args, **kwargs)

    return run


@full_precision
def gram(x_ND: Tensor) -> Tensor:
    """Inner products x x^T over the last two dimensions: [..., N, D] -> [..., N, N].

    For a channel Gram matrix (style, ICKD) give [B, C, H * W] and divide by H * W as the paper says.
    """
    x_ND = upcast(x_ND)
    return x_ND @ x_ND.mT


@full_precision
def similarity_matrix(x_ND: Tensor, y_MD: Tensor | None = None, *, metric: Metric) -> Tensor:
    """All pairs of x with y (with x itself when y is None): [..., N, D], [..., M, D] -> [..., N, M].

    "cosine" in [-1, 1]; "dot"; "euclidean" is the DISTANCE |x - y| (0 for equal vectors, gradient 0 there).
    Raises ValueError for another metric.
    """
    x_ND = upcast(x_ND)
    y_MD = x_ND if y_MD is None else upcast(y_MD)
    if metric == "cosine":
        return unit(x_ND) @ unit(y_MD).mT
    if metric == "dot":
        return x_ND @ y_MD.mT
    if metric == "euclidean":
        # The matrix-product form of cdist loses the small distances to cancellation.
        return torch.cdist(x_ND, y_MD, compute_mode="donot_use_mm_for_euclid_dist")
    raise ValueError(f'metric is {metric!r}: choose "cosine", "dot" or "euclidean".')


@full_precision
def similarity_preserving(student: Tensor, target: Tensor) -> Tensor:
    """|G_t - G_s|_F^2 / B^2 with G = A A^T, rows of G scaled to unit length; A: [B, everything else
    flattened].

    The widths of the two may differ, the B samples not (ValueError). Source: Tung & Mori 2019, equations 2 to
    4.
    """
    _check_same_samples(student, target)
    difference = unit(gram(student.flatten(1))) - unit(gram(target.flatten(1)))
    return difference.square().mean()


@full_precision
def rkd_distance(student_BD: Tensor, target_BE: Tensor) -> Tensor:
    """Smooth L1 (beta 1) between the pairwise distances, each divided by its own mean, over all B^2 pairs.

    The mean is over the distances that are not zero, and the divisor B^2 counts the diagonal, as in the
    official code. Unchanged by scaling, shifting or rotating either side. The widths may differ, the samples
    not (ValueError). Source: RKD (Park et al. 2019), equations 4 and 5.
    """
    _check_same_samples(student_BD, target_BE)
    return F.smooth_l1_loss(_relative_distances(student_BD), _relative_distances(target_BE))


@full_precision
def rkd_angle(student_BD: Tensor, target_BE: Tensor) -> Tensor:
    """Smooth L1 (beta 1) between the cosines of the angles at x_j of all triplets (x_i, x_j, x_k); mean over
    B^3.

    Needs B^3 numbers. Unchanged by scaling, shifting or rotating either side. The widths may differ, the
    samples not (ValueError). Source: RKD (Park et al. 2019), equations 6 and 7.
    """
    _check_same_samples(student_BD, target_BE)
    return F.smooth_l1_loss(_cosines_of_angles(student_BD), _cosines_of_angles(target_BE))


@full_precision
def attention_transfer(
    student_BCHW: Tensor,
    target_BDHW: Tensor,
    *,
    power: float = 2.0,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """|Q_s - Q_t|^2 per sample, Q = the map mean_c |A_c|^power over positions, scaled to unit length.

    Items [B]; "elementmean" (divided by H * W too) is the official code; the paper's equation 2 has the norm,
    not its square. Channels may differ, height and width not (ValueError: use `resize_features`).
    Unchanged when either side is scaled. Source: Zagoruyko & Komodakis 2017, section 3.1.
    """
    if student_BCHW.shape[2:] != target_BDHW.shape[2:]:
        raise ValueError(
            f"the student's map has size {tuple(student_BCHW.shape[2:])} but the target's "
            f"{tuple(target_BDHW.shape[2:])}: bring one to the other's with resize_features."
        )
    _check_same_samples(student_BCHW, target_BDHW)
    student_BP = unit(upcast(student_BCHW).abs().pow(power).mean(1).flatten(1))
    target_BP = unit(upcast(target_BDHW).abs().pow(power).mean(1).flatten(1))
    items = (student_BP - target_BP).square().sum(1)
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=student_BP.shape[1])


def channel_wise(
    student_BCHW: Tensor,
    target_BCHW: Tensor,
    *,
    temperature: float | Tensor,
    scale_by_t2: bool,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """KL between softmaxes over the H * W POSITIONS of each channel (not over channels): CWD.

    Items [B, C]. "mean" is the mean over samples and channels with positions summed (Shu et al. 2021 and LAD,
    with scale_by_t2=True). Unchanged by a constant added to a whole channel. Equal shapes, or ValueError.
    Source: Shu et al. 2021, equations 3 and 4.
    """
    return kl_divergence(
        student_BCHW.flatten(2),
        target_BCHW.flatten(2),
        temperature=temperature,
        scale_by_t2=scale_by_t2,
        reduction=reduction,
        weight=weight,
        mask=mask,
    )


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """[B, T, D] -> [B, heads, T, D / heads]: re-splits concatenated heads so that both models have equally
    many.

    Raises ValueError when heads does not divide D. Source: MiniLMv2 (Wang et al. 2021), section 3.
    """
    if x_BTD.shape[-1] % heads:
        raise ValueError(f"width {x_BTD.shape[-1]} cannot be split into {heads} heads: choose a divisor.")
    return x_BTD.unflatten(-1, (heads, -1)).transpose(1, 2)


@full_precision
def attention_relation(
    student_BATD: Tensor,
    target_BATE: Tensor,
    *,
    student_keys_BATD: Tensor | None = None,
    target_keys_BATE: Tensor | None = None,
    tokens_BT: Tensor | None = None,
    reduction: Reduction,
) -> Tensor:
    """KL(R_t || R_s), R = softmax over tokens of (X Y^T / sqrt(width)): query-query, key-key and value-value
    relations.

    Without keys Y = X. With both keys, X queries and Y keys, R is the attention itself (MiniLM, section 3.1).
    tokens_BT: 1 for real tokens, 0 for padding; padded tokens get no probability, and their own rows are left
    out. Items [B, A, T]: "mean" is the mean over heads and real tokens. Widths may differ, heads and tokens
    not (ValueError; see `split_heads`). Source: MiniLM (Wang et al. 2020), section 3.2; MiniLMv2, equations 7
    to 9.
    """
    if student_BATD.shape[:-1] != target_BATE.shape[:-1]:
        raise ValueError(
            f"student has [samples, heads, tokens] {tuple(student_BATD.shape[:-1])} but the target has "
            f"{tuple(target_BATE.shape[:-1])}: re-split the heads with split_heads, and use the same tokens."
        )
    if (student_keys_BATD is None) != (target_keys_BATE is None):
        raise ValueError("keys are given for one model only: give both (query-key relations) or neither.")
    student_BATT = _relation_logits(student_BATD, student_keys_BATD, tokens_BT)
    target_BATT = _relation_logits(target_BATE, target_keys_BATE, tokens_BT)
    rows = None if tokens_BT is None else tokens_BT[:, None, :]
    return kl_divergence(student_BATT, target_BATT, scale_by_t2=False, reduction=reduction, mask=rows)


def _relation_logits(x_BATD: Tensor, y_BATD: Tensor | None, tokens_BT: Tensor | None) -> Tensor:
    x_BATD = upcast(x_BATD)
    y_BATD = x_BATD if y_BATD is None else upcast(y_BATD)
    logits_BATT = (x_BATD * x_BATD.shape[-1] ** -0.5) @ y_BATD.mT
    if tokens_BT is None:
        return logits_BATT
    # Not -inf: a sample that is all padding would get a softmax of NaN.
    return logits_BATT.masked_fill(~tokens_BT.bool()[:, None, None, :], EXCLUDED)


def _relative_distances(x_BD: Tensor) -> Tensor:
    distance_BB = similarity_matrix(x_BD.flatten(1), metric="euclidean")
    pairs = (distance_BB > 0).sum().clamp(min=1)
    mean = distance_BB.sum() / pairs
    return distance_BB / torch.where(mean > 0, mean, torch.ones_like(mean))


def _cosines_of_angles(x_BD: Tensor) -> Tensor:
    x_BD = upcast(x_BD).flatten(1)
    towards_BBD = unit(x_BD[None, :, :] - x_BD[:, None, :])
    return towards_BBD @ towards_BBD.mT


def _check_same_samples(student: Tensor, target: Tensor) -> None:
    if student.shape[0] != target.shape[0]:
        raise ValueError(
            f"the student has {student.shape[0]} samples but the target {target.shape[0]}: "
            f"relations are compared between the same samples."
        )

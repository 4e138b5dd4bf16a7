"""Divergences between the distributions that two models' logits stand for.

Letters: B samples, C classes.
p = softmax(teacher / T), q = softmax(student / T), both over `dim`.

What holds for every function here:
* Arguments in the order (student, teacher). NOTHING is detached: gradient flows into whatever requires it,
  because some systems train through the target (mst-distill, stage 1). For a frozen teacher or one's own
  past, detach first.
* `temperature` T: a number, or a tensor with one value for all or one per item; it may be learned.
* `scale_by_t2`: multiply by T^2, which keeps the size of the gradients about constant as T grows (Hinton et
  al. 2015, section 2). The papers differ, so it has no default.
* `reduction`, `weight`, `mask`: see `limbeck.losses.reduction`. `dim`: the dimension of classes (1 for [B, C,
  H, W]).
* Computed in float32 (float64 stays). Logits of +-1e4 and logits of -inf (classes left out) give finite
  values and gradients wherever the divergence is finite. KL(p || q) is inf, as it should be, if q = 0 where p
  > 0.
* ValueError: shapes that differ, a temperature that is not positive, weights or masks that do not fit the
  items.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .reduction import EXCLUDED, Reduction, check_same_shape, per_item, reduce, upcast

Temperature = float | Tensor
Halves = Literal["sum", "mean"]


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Temperature = 1.0,
    scale_by_t2: bool,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Forward KL: KL(p || q) = sum_c p_c (log p_c - log q_c), the teacher's distribution first.

    The gradient into the student's logits is (q - p) / T per item, so it covers all that the teacher finds
    likely. Logits of equal shape [..., C, ...]. Source: Hinton et al. 2015.
    """
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature, dim)
    items = _scaled(_kl(log_p, log_q, dim), temperature, scale_by_t2)
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=student_logits.shape[dim])


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: Temperature = 1.0,
    scale_by_t2: bool,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Reverse KL: KL(q || p) = sum_c q_c (log q_c - log p_c), the student's distribution first.

    Gradient flows through both places of q; it is q (log(q / p) - KL) / T per item, so the student settles on
    modes of the teacher. Logits of equal shape. Source: MiniLLM (Gu et al. 2024), BD-KD.
    """
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature, dim)
    items = _scaled(_kl(log_q, log_p, dim), temperature, scale_by_t2)
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=student_logits.shape[dim])


def symmetric_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    halves: Halves,
    temperature: Temperature = 1.0,
    scale_by_t2: bool,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Both directions: KL(p || q) + KL(q || p) with halves="sum" (Jeffreys; BD-KD), half of it with "mean"
    (R-Drop).

    Symmetric in its two arguments. Logits of equal shape. ValueError if `halves` is neither.
    """
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature, dim)
    # sum p (log p - log q) + sum q (log q - log p) in one pass over the classes.
    both = (log_p.exp() - log_q.exp()) * _log_ratio(log_p, log_q)
    items = _scaled(both.sum(dim) * halves_factor(halves), temperature, scale_by_t2)
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=student_logits.shape[dim])


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: Temperature = 1.0,
    scale_by_t2: bool,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, 0 <
    beta < 1.

    Bounded by the entropy of (beta, 1 - beta), log 2 at 0.5, where it is symmetric. Divided by beta it tends
    to the forward KL as beta goes to 0, divided by 1 - beta to the reverse KL as beta goes to 1. Logits of
    equal shape. Source: GKD (Agarwal et al. 2024), section 2. ValueError if beta is outside (0, 1).
    """
    _check_share(beta, "beta")
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature, dim)
    log_m = _log_mix(log_p, log_q, beta)
    items = beta * _kl(log_p, log_m, dim) + (1 - beta) * _kl(log_q, log_m, dim)
    items = _scaled(items, temperature, scale_by_t2)
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=student_logits.shape[dim])


def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = 0.1,
    temperature: Temperature = 1.0,
    scale_by_t2: bool,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Skew forward KL: KL(p || skew p + (1 - skew) q), 0 < skew < 1; at most -log(skew), so it is always
    finite.

    Tends to the forward KL as skew goes to 0. Logits of equal shape. Source: DistiLLM (Ko et al. 2024),
    section 3.1. ValueError if skew is outside (0, 1).
    """
    _check_share(skew, "skew")
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature, dim)
    items = _scaled(_kl(log_p, _log_mix(log_p, log_q, skew), dim), temperature, scale_by_t2)
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=student_logits.shape[dim])


def skew_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = 0.1,
    temperature: Temperature = 1.0,
    scale_by_t2: bool,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Skew reverse KL: KL(q || skew q + (1 - skew) p), 0 < skew < 1; at most -log(skew), so it is always
    finite.

    Tends to the reverse KL as skew goes to 0. Logits of equal shape. Source: DistiLLM (Ko et al. 2024),
    section 3.1. ValueError if skew is outside (0, 1).
    """
    _check_share(skew, "skew")
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature, dim)
    items = _scaled(_kl(log_q, _log_mix(log_q, log_p, skew), dim), temperature, scale_by_t2)
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=student_logits.shape[dim])


def soft_cross_entropy(
    logits: Tensor,
    target_probabilities: Tensor,
    *,
    temperature: Temperature = 1.0,
    scale_by_t2: bool = False,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Cross-entropy with soft targets: -sum_c t_c log softmax(logits / T)_c; T acts on the logits only.

    logits and target_probabilities of equal shape; the targets' classes normally sum to 1 (not checked). A
    class with target 0 and logit -inf contributes 0. Equals KL(t || q) + H(t). Source: PS-KD, equation 2;
    ALBEF.
    """
    check_same_shape(logits, target_probabilities)
    log_q = _log_softmax(logits, temperature, dim)
    target = upcast(target_probabilities)
    log_q_safe = torch.where((target == 0) & torch.isneginf(log_q), torch.zeros_like(log_q), log_q)
    items = _scaled(-(target * log_q_safe).sum(dim), temperature, scale_by_t2)
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=logits.shape[dim])


def entropy(
    logits: Tensor,
    *,
    temperature: Temperature = 1.0,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Shannon entropy in nats: H(q) = -sum_c q_c log q_c, q = softmax(logits / T); in [0, log C], no T^2
    factor."""
    log_q = _log_softmax(logits, temperature, dim)
    items = -(log_q.exp() * torch.where(torch.isneginf(log_q), torch.zeros_like(log_q), log_q)).sum(dim)
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=logits.shape[dim])


def kl_to_uniform(
    logits: Tensor,
    *,
    temperature: Temperature = 1.0,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """KL(u || q) = -log K - (1 / K) sum_c log q_c, u uniform over the K classes whose logit is not -inf.

    Zero at uniform q. The confidence regulariser of CRST and HIAST; those leave out the constant -log K,
    which has no gradient. The other direction, KL(q || u), is log K - entropy.
    """
    log_q = _log_softmax(logits, temperature, dim)
    left_out = torch.isneginf(log_q)
    classes = (~left_out).sum(dim).to(log_q.dtype)
    items = -torch.where(left_out, torch.zeros_like(log_q), log_q).sum(dim) / classes - classes.log()
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=logits.shape[dim])


def halves_factor(halves: Halves) -> float:
    """1 for "sum", 1/2 for "mean": what the sum of two halves is multiplied by. ValueError for anything
    else."""
    if halves not in ("sum", "mean"):
        raise ValueError(f'halves is {halves!r}: choose "sum" or "mean" of the two directions.')
    return 1.0 if halves == "sum" else 0.5


def _log_distributions(student: Tensor, teacher: Tensor, temperature: Temperature, dim: int) -> tuple[Tensor, Tensor]:
    check_same_shape(student, teacher)
    return _log_softmax(student, temperature, dim), _log_softmax(teacher, temperature, dim)


def _log_softmax(logits: Tensor, temperature: Temperature, dim: int) -> Tensor:
    logits = upcast(logits)
    if isinstance(temperature, Tensor):
        return _divided(logits, upcast(temperature), dim).log_softmax(dim)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be positive.")
    return (logits if temperature == 1 else logits / temperature).log_softmax(dim)


def _divided(logits: Tensor, temperature: Tensor, dim: int) -> Tensor:
    """logits / T with T for all or per item; -inf stays out of the division, or a learned T gets 0 * inf."""
    if temperature.ndim > 0:
        position = dim % logits.ndim
        temperature = per_item(temperature, logits.select(dim, 0), "temperature").unsqueeze(position)
    left_out = torch.isneginf(logits)
    return (logits.masked_fill(left_out, 0.0) / temperature).masked_fill(left_out, -torch.inf)


def _scaled(items: Tensor, temperature: Temperature, scale_by_t2: bool) -> Tensor:
    if not scale_by_t2:
        return items
    if isinstance(temperature, Tensor) and temperature.ndim > 0:
        temperature = per_item(upcast(temperature), items, "temperature")
    return items * temperature**2


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p - log q, and 0 where p = q = 0, or else a class that both leave out makes inf - inf."""
    both_zero = torch.isneginf(log_p) & torch.isneginf(log_q)
    return (log_p - log_q).masked_fill(both_zero, 0.0)


def _kl(log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
    """sum p (log p - log q) over `dim`, with 0 log 0 = 0."""
    # p = 0 contributes nothing whatever q is; masking the ratio also keeps 0 * inf out of the backward pass.
    ratio = (log_p - log_q).masked_fill(torch.isneginf(log_p), 0.0)
    return (log_p.exp() * ratio).sum(dim)


def _log_mix(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    # logaddexp(-inf, -inf) has a NaN gradient: a class that both leave out takes the finite stand-in instead.
    floor_p, floor_q = log_p.clamp(min=EXCLUDED), log_q.clamp(min=EXCLUDED)
    return torch.logaddexp(floor_p + math.log(share), floor_q + math.log1p(-share))


def _check_share(share: float, name: str) -> None:
    if not 0 < share < 1:
        raise ValueError(
            f"{name} is {share}: it must lie strictly between 0 and 1 (at its ends use kl_divergence or reverse_kl)."
        )

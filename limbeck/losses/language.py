"""Losses of language models: the shift, what is reduced over, and divergences token by token.

Letters: B sequences, L places of a sequence, V words of the vocabulary.

A causal model's place i speaks of token i + 1. `shift` is the one place where that is said: every other function here
takes logits and labels that stand side by side, as masked language models give them anyway. A label of -100 leaves its
place out (prompt, padding, tokens that were not masked). With l the loss of a kept place:

| reduction        | value                                                              | used by            |
|------------------|--------------------------------------------------------------------|--------------------|
| "none"           | l, 0 at places left out, [B, L]                                    |                    |
| "token_mean"     | sum of l / number of kept places of the batch                      | TAID, most         |
| "sequence_mean"  | mean over the sequences of the mean of their kept places           | scores of answers  |
| "sequence_sum"   | mean over the sequences of the sum of their kept places            | FIRST              |

`sequence_mean` counts sequences that keep a place, `sequence_sum` all of them. Where nothing is kept the loss is 0 with
zero gradients. Nothing is detached; everything is computed in float32; no value is read back from the device.

These functions take whole logits. For vocabularies of 100,000 words, whose logits are the largest tensors of a step,
`vocabulary.py` computes the same losses from hidden states and output layers; `sparse.py` compares with a teacher of
which the likeliest words are known, and `alignment.py` with one of another vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import divergence as divergences
from .reduction import Reduction, check_same_shape, reduce, upcast

IGNORE = -100
TokenReduction = Literal["none", "token_mean", "sequence_mean", "sequence_sum"]


def shift(logits_BLV: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels of a causal model side by side: `(logits[:, :-1], labels[:, 1:])`, views of the same memory.

    Place i predicts token i + 1; nothing predicts the first token, and what the last place predicts is unknown.
    """
    return logits_BLV[:, :-1], labels_BL[:, 1:]


def reduce_tokens(items_BL: Tensor, labels_BL: Tensor, *, reduction: TokenReduction) -> Tensor:
    """Reduce one loss per place by the table at the top of this file. ValueError for an unknown reduction."""
    if reduction not in get_args(TokenReduction):
        raise ValueError(f"reduction is {reduction!r}: choose one of {', '.join(get_args(TokenReduction))}.")
    kept_BL = labels_BL != IGNORE
    if reduction == "sequence_mean":
        means_B = torch.where(kept_BL, items_BL, 0.0).sum(1) / kept_BL.sum(1).clamp(min=1)
        return reduce(means_B, reduction="mean", mask=kept_BL.any(1))
    room: dict[str, Reduction] = {"none": "none", "token_mean": "mean", "sequence_sum": "batchmean"}
    return reduce(items_BL, reduction=room[reduction], mask=kept_BL)


def token_cross_entropy(
    logits_BLV: Tensor, labels_BL: Tensor, *, reduction: TokenReduction, label_smoothing: float = 0.0
) -> Tensor:
    """-log softmax(logits)[label] at every kept place."""
    items_N = F.cross_entropy(
        upcast(logits_BLV).flatten(0, 1),
        labels_BL.flatten(),
        ignore_index=IGNORE,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return reduce_tokens(items_N.view_as(labels_BL), labels_BL, reduction=reduction)


def token_divergence(
    divergence: Callable[..., Tensor],
    student_logits_BLV: Tensor,
    teacher_logits_BLV: Tensor,
    labels_BL: Tensor,
    *,
    temperature: float = 1.0,
    scale_by_t2: bool = False,
    reduction: TokenReduction,
) -> Tensor:
    """A divergence between two models' distributions of every kept token, summed over the vocabulary.

    divergence: a function of `limbeck.losses.divergence` or `total_variation`, or a partial of one to set its `beta` or
    `skew`: `kl_divergence` (forward), `reverse_kl`, `jensen_shannon`, `skew_kl`, `skew_reverse_kl`, ... It decides what
    logits of -inf mean. ValueError for shapes that differ.
    """
    items_BL = divergence(
        student_logits_BLV, teacher_logits_BLV, temperature=temperature, scale_by_t2=scale_by_t2, reduction="none"
    )
    return reduce_tokens(items_BL, labels_BL, reduction=reduction)


def token_soft_cross_entropy(
    logits_BLV: Tensor, target_probabilities_BLV: Tensor, labels_BL: Tensor, *, reduction: TokenReduction
) -> Tensor:
    """-sum_v t_v log softmax(logits)_v at every kept place: forward KL plus the targets' entropy."""
    items_BL = divergences.soft_cross_entropy(logits_BLV, target_probabilities_BLV, reduction="none")
    return reduce_tokens(items_BL, labels_BL, reduction=reduction)


def token_entropy(logits_BLV: Tensor, labels_BL: Tensor, *, reduction: TokenReduction) -> Tensor:
    """Shannon entropy of softmax(logits) in nats at every kept place."""
    return reduce_tokens(divergences.entropy(logits_BLV, reduction="none"), labels_BL, reduction=reduction)


def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    scale_by_t2: bool,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Total variation distance: 1/2 sum_c |p_c - q_c|, in [0, 1], symmetric; p and q as in `divergence.py`.

    Its gradient into the student's logits is 1/2 q (sign(q - p) - sum_c q_c sign(q_c - p_c)) / T per item: bounded
    wherever the two disagree. Logits of equal shape. Source: f-DISTILL (Wen et al. 2023), section 3.
    """
    check_same_shape(student_logits, teacher_logits)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be positive.")
    q, p = ((upcast(logits) / temperature).softmax(dim) for logits in (student_logits, teacher_logits))
    items = 0.5 * (p - q).abs().sum(dim) * (temperature**2 if scale_by_t2 else 1.0)
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=student_logits.shape[dim])

"""The InfoNCE family.

Letters: B queries of this process, K keys (of all processes), Q keys in the queue, M = K + Q columns, D
width. Keys come in already gathered: K may be larger than B, and `offset` is the column of query 0's positive
(rank * B after a gather in rank order). Gradient flows into queries, keys and temperature alike (keys from an
EMA teacher: detach them); the queue is constant. Computed in float32 (float64 stays), also under autocast.
Reductions are those of `limbeck.losses.reduction`, items [B].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence import Halves, halves_factor, soft_cross_entropy
from .feature import unit
from .reduction import EXCLUDED, Reduction, check_same_shape, reduce, upcast
from .relation import full_precision


@full_precision
def info_nce(
    query_BD: Tensor,
    key_KD: Tensor,
    *,
    temperature: float | Tensor,
    normalize: bool,
    offset: int = 0,
    queue_QD: Tensor | None = None,
    positives_BM: Tensor | None = None,
    soft_targets_BM: Tensor | None = None,
    candidates_BM: Tensor | None = None,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """-sum_j y_ij log softmax_j(query_i . key_j / temperature) over the M columns, keys first and then the
    queue.

    The target y is, in this order of precedence (at most one of the two may be given):
    * soft_targets_BM: any rows that sum to 1, such as a teacher's similarities mixed with one-hot (ALBEF);
    * positives_BM: bool; uniform over a query's positives. A query without any has loss 0 and no part in
      "mean";
    * neither: one-hot at column offset + i (MoCo, CLIP's one direction).
    candidates_BM: bool; the columns that take part in the softmax (hard or restricted negatives). A positive
    column that is no candidate would make the loss about 1e30, so include the positives.
    normalize: scale queries, keys and queue to unit length first. temperature: positive; may be learned.
    Raises ValueError for an offset without room for B positives, both kinds of target, wrong shapes.
    Sources: CPC (van den Oord et al. 2018), MoCo (He et al. 2020), ALBEF (Li et al. 2021).
    """
    _check_offset(query_BD, key_KD, offset)
    columns_MD = key_KD if queue_QD is None else torch.cat([key_KD, queue_QD.detach().to(key_KD.dtype)])
    logits_BM = _logits(query_BD, columns_MD, temperature, normalize)
    if candidates_BM is not None:
        check_same_shape(candidates_BM, logits_BM)
        logits_BM = logits_BM.masked_fill(~candidates_BM.bool(), EXCLUDED)
    if positives_BM is not None and soft_targets_BM is not None:
        raise ValueError("both positives_BM and soft_targets_BM are given: give one kind of target.")
    if soft_targets_BM is not None:
        return soft_cross_entropy(logits_BM, soft_targets_BM, reduction=reduction, weight=weight, mask=mask)
    if positives_BM is not None:
        return _uniform_over(positives_BM, logits_BM, reduction, weight, mask)
    items = -logits_BM.log_softmax(1).diagonal(offset)[: query_BD.shape[0]]
    return reduce(items, reduction=reduction, weight=weight, mask=mask)


@full_precision
def nt_xent(
    first_BD: Tensor,
    second_BD: Tensor,
    *,
    first_keys_KD: Tensor | None = None,
    second_keys_KD: Tensor | None = None,
    offset: int = 0,
    temperature: float | Tensor,
    normalize: bool,
    halves: Halves,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """SimCLR: each view of a sample finds the other among all other views, its own entry excluded.

    l(first_i) = -log exp(f_i . s_i / t) / (sum_j exp(f_i . s_j / t) + sum_{j != i} exp(f_i . f_j / t)), and
    l(second_i) likewise. Item i is l(first_i) + l(second_i) with halves="sum" (SimCLR's TensorFlow code),
    half of it with "mean" (the paper: the mean over 2B anchors). With B = 1 and no other keys the loss is 0.
    Symmetric in the two views. Keys: both views of all processes in the same order, with this process's from
    row `offset`; default the B own. Raises ValueError when only one kind of keys is given, shapes differ, or
    the offset leaves no room for B rows. Source: Chen et al. 2020, equation 1.
    """
    check_same_shape(first_BD, second_BD)
    if (first_keys_KD is None) != (second_keys_KD is None):
        raise ValueError("keys are given for one view only: give both or neither.")
    first_KD = first_BD if first_keys_KD is None else first_keys_KD
    second_KD = second_BD if second_keys_KD is None else second_keys_KD
    check_same_shape(first_KD, second_KD)
    _check_offset(first_BD, first_KD, offset)

    def half(anchor_BD: Tensor, other_KD: Tensor, same_KD: Tensor) -> Tensor:
        logits_B2K = _logits(anchor_BD, torch.cat([other_KD, same_KD]), temperature, normalize)
        count, keys = anchor_BD.shape[0], other_KD.shape[0]
        own = _own_columns(count, 2 * keys, offset + keys, logits_B2K.device)
        return -logits_B2K.masked_fill(own, EXCLUDED).log_softmax(1).diagonal(offset)[:count]

    both = half(first_BD, second_KD, first_KD) + half(second_BD, first_KD, second_KD)
    return reduce(both * halves_factor(halves), reduction=reduction, weight=weight, mask=mask)


@full_precision
def supervised_contrastive(
    query_BD: Tensor,
    key_KD: Tensor,
    query_labels_B: Tensor,
    key_labels_K: Tensor,
    *,
    own_offset: int | None,
    temperature: float | Tensor,
    normalize: bool,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """-1 / |P_i| sum_{p in P_i} log softmax_p(query_i . key / temperature) over all keys but the query
    itself.

    P_i: keys with the query's label, the query itself excluded. own_offset: the column where query 0 itself
    stands among the keys; None when the keys hold other views or a queue only. A query without a positive has
    loss 0 and no part in "mean". Raises ValueError when labels and vectors differ in number or the offset
    leaves no room. Source: Khosla et al. 2020, equation 2 (L_out).
    """
    if len(query_labels_B) != len(query_BD) or len(key_labels_K) != len(key_KD):
        raise ValueError(
            f"{len(query_labels_B)} and {len(key_labels_K)} labels came with {len(query_BD)} queries and "
            f"{len(key_KD)} keys: give one label per vector."
        )
    logits_BK = _logits(query_BD, key_KD, temperature, normalize)
    positives_BK = query_labels_B[:, None] == key_labels_K[None, :]
    if own_offset is not None:
        _check_offset(query_BD, key_KD, own_offset)
        own_BK = _own_columns(len(query_BD), len(key_KD), own_offset, logits_BK.device)
        logits_BK, positives_BK = logits_BK.masked_fill(own_BK, EXCLUDED), positives_BK & ~own_BK
    return _uniform_over(positives_BK, logits_BK, reduction, weight, mask)


def _logits(query_BD: Tensor, column_MD: Tensor, temperature: float | Tensor, normalize: bool) -> Tensor:
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be positive.")
    query_BD, column_MD = upcast(query_BD), upcast(column_MD)
    if normalize:
        query_BD, column_MD = unit(query_BD), unit(column_MD)
    return query_BD @ column_MD.mT / temperature


def _uniform_over(
    positives_BM: Tensor, logits_BM: Tensor, reduction: Reduction, weight: Tensor | None, mask: Tensor | None
) -> Tensor:
    positives_BM = positives_BM.bool()
    count_B1 = positives_BM.sum(1, keepdim=True)
    has_positive = count_B1.squeeze(1) > 0
    kept = has_positive if mask is None else has_positive & mask.bool()
    target_BM = positives_BM / count_B1.clamp(min=1)
    return soft_cross_entropy(logits_BM, target_BM, reduction=reduction, weight=weight, mask=kept)


def _own_columns(rows: int, columns: int, offset: int, device: torch.device) -> Tensor:
    """Bool [rows, columns], True at (i, offset + i)."""
    row = torch.arange(rows, device=device)
    return torch.arange(columns, device=device) == (row + offset)[:, None]


def _check_offset(query_BD: Tensor, key_KD: Tensor, offset: int) -> None:
    if not 0 <= offset <= len(key_KD) - len(query_BD):
        raise ValueError(
            f"{len(query_BD)} queries at offset {offset} do not fit {len(key_KD)} keys: "
            f"the positive of query i is key offset + i."
        )

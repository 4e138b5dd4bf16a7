"""Teacher and student with different vocabularies: what can be compared, and what is lost.

Letters: B sequences, L and M places of the student's and the teacher's sequence, A answer places, V words of the
student, W words of the teacher, K words that both have.

Two tokenizers differ twice: in their words, and in where they cut a text, so that the i-th token of one is not the i-th
of the other. Each way here bridges the words only:

* `shared_tokens` and `shared_divergence` compare the words that both have, by name, and all others as one class.
  Nothing is learned of how the teacher's mass splits among words that only one of them has, and tokens that are
  written differently ("the" after a space is "Ġthe" in one tokenizer and "▁the" in another) count as different:
  rewrite the names of one vocabulary first.
* `universal_logit_distance` compares the sorted probabilities and forgets which word is which: a student that is as
  sure as the teacher, of another word, has distance 0. It is a regulariser beside the labels, which name the word.

Both take logits whose places stand side by side. Where the two texts are cut differently they do not, and no loss
here repairs that: `answer_places` pairs the i-th answer token of one with the i-th of the other, as ULD's code does,
which is right only as long as both cut alike. Everything in float32; nothing is detached.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .language import IGNORE
from .reduction import Reduction, reduce, upcast
from .sparse import SparseDivergence, check_sparse_divergence, divergence_named


def shared_tokens(
    student_vocabulary: Mapping[str, int], teacher_vocabulary: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """The ids of the words that both have, (student's [K], teacher's [K]), in the order of the student's ids.

    The mappings are those of a tokenizer's `get_vocab()`. Words are the same where their strings are. ValueError where
    there is none.
    """
    words = sorted(student_vocabulary.keys() & teacher_vocabulary.keys(), key=student_vocabulary.__getitem__)
    if not words:
        raise ValueError(
            f"vocabularies of {len(student_vocabulary)} and {len(teacher_vocabulary)} words share none: do both write "
            "spaces and bytes the same way?"
        )
    student_ids = torch.tensor([student_vocabulary[word] for word in words])
    return student_ids, torch.tensor([teacher_vocabulary[word] for word in words])


def shared_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_ids_K: Tensor,
    teacher_ids_K: Tensor,
    *,
    divergence: SparseDivergence,
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    scale_by_t2: bool,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """A divergence over K + 1 classes: each shared word, and all other words of each side together.

    student_logits [..., V], teacher_logits [..., W], side by side; ids from `shared_tokens`. Where one side has no
    other words (V = K or W = K) both are renormalised over the shared ones. The gradient into the student's other
    words only moves their mass as a whole. ValueError for items that differ.
    """
    _check_items(student_logits, teacher_logits)
    check_sparse_divergence(divergence, "spread", temperature)
    bucket = min(student_logits.shape[-1], teacher_logits.shape[-1]) > len(student_ids_K)
    student = _classes(upcast(student_logits) / temperature, student_ids_K, bucket)
    teacher = _classes(upcast(teacher_logits) / temperature, teacher_ids_K, bucket)
    items = divergence_named(divergence, beta, skew)(student, teacher, scale_by_t2=False, reduction="none")
    items = items * temperature**2 if scale_by_t2 else items
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=student.shape[-1])


def _classes(logits: Tensor, ids_K: Tensor, bucket: bool) -> Tensor:
    shared = logits.index_select(-1, ids_K)
    if not bucket:
        return shared
    return torch.cat([shared, logits.index_fill(-1, ids_K, -torch.inf).logsumexp(-1, keepdim=True)], -1)


def universal_logit_distance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Universal logit distance (ULD): sum_i |q_(i) - p_(i)| of the probabilities in falling order, in [0, 2].

    The shorter list is filled up with zeros. student_logits [..., V], teacher_logits [..., W], side by side: see the
    limits at the top of this file. The official code averages over a sequence's places and then over sequences:
    `reduce_tokens(items, labels, reduction="sequence_mean")` of `reduction="none"`. Source: Boizard et al. 2024 (arXiv
    2402.12030), section 4; `models/distillation_model.py` of the authors' code. ValueError for items that differ, a
    temperature that is not positive.
    """
    _check_items(student_logits, teacher_logits)
    if not min(student_temperature, teacher_temperature) > 0:
        raise ValueError(f"temperatures are {student_temperature} and {teacher_temperature}: they must be positive.")
    q = (upcast(student_logits) / student_temperature).softmax(-1).sort(-1, descending=True).values
    p = (upcast(teacher_logits) / teacher_temperature).softmax(-1).sort(-1, descending=True).values
    words = max(q.shape[-1], p.shape[-1])
    items = (F.pad(q, (0, words - q.shape[-1])) - F.pad(p, (0, words - p.shape[-1]))).abs().sum(-1)
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=words)


def answer_places(student_labels_BL: Tensor, teacher_labels_BM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pair the i-th scored place of each of the student's sequences with the teacher's i-th.

    Returns (places in the student's sequence [B, A], in the teacher's [B, A], which of them are pairs, bool [B, A]),
    A = min(L, M): `torch.take_along_dim(logits_BLV, places_BA[..., None], 1)` puts the logits side by side, and the
    last is the `mask`. What the longer answer has more is left out. Labels beside their logits (`shift`), -100 left
    out.
    """
    length = min(student_labels_BL.shape[1], teacher_labels_BM.shape[1])
    orders, counts = [], []
    for labels in (student_labels_BL, teacher_labels_BM):
        kept = labels != IGNORE
        orders.append(kept.byte().argsort(dim=1, descending=True, stable=True)[:, :length])
        counts.append(kept.sum(1, keepdim=True))
    rank = torch.arange(length, device=student_labels_BL.device)
    return orders[0], orders[1], rank < torch.minimum(*counts)


def _check_items(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"the student's items have shape {tuple(student_logits.shape[:-1])} and the teacher's "
            f"{tuple(teacher_logits.shape[:-1])}: put them side by side first (`answer_places`)."
        )

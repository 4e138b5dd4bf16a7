"""Losses at the size of a vocabulary: from hidden states and output layers, a chunk of places at a time.

Letters: N items (kept places), M some rows of a chunk, V words, W some words, D and E widths of hidden states, K words
that are known of a teacher, C classes that are compared.

Whole logits of 8,192 places and 128,256 words are 4 GB in float32, and a divergence makes half a dozen tensors of that
size. Here the student's logits are made for `chunk` places at a time, turned in place into the gradient of the loss by
the logits, and multiplied into the gradients of hidden states and weights at once: four matrix products in all
(student's logits, teacher's logits, gradient of the hidden states, gradient of the weights), as many as without chunks,
and no more than a chunk of logits at any time. `backward` only scales what is there and hands it on, without a copy of
gradients as large as the weights: it can be gone through ONCE (`retain_graph` does not change that; a second time is an
error).

What holds for every function here, with q the student's distribution and p the teacher's, both at temperature T:

* student logits = student_hidden @ student_weight_VD^T + student_bias_V. Hidden states [..., D]; the leading dimensions
  are the items. Gradient flows into the student's three tensors, those of them that require it, and into NOTHING
  else: the teacher's tensors, `t` and `weight` are constants. Without gradients (`no_grad`) only the value is computed.
* Left out are places whose label is -100 or whose `mask` is 0 (give one of the two). On a CPU they cost nothing; on an
  accelerator as much as the others, for counting them would wait for the device: cut them out beforehand there.
* `weight` multiplies a place's loss and is never part of a divisor.
* `reduction` is said beforehand, because the gradients are made on the way forward; "none" is refused:

  | reduction            | value, with k = 1 for a kept place and 0 for others                                     |
  |----------------------|-----------------------------------------------------------------------------------------|
  | "sum"                | sum of k w l                                                                            |
  | "mean", "token_mean" | sum of k w l / sum of k                                                                 |
  | "sequence_mean"      | items [B, L]: mean over the sequences that keep a place of the mean of their kept places |
  | "sequence_sum"       | items [B, ...]: mean over all sequences of the sum over their kept places               |

* `scale_by_t2`: multiply by T^2 (Hinton et al. 2015). `chunk`: places at a time; None chooses by the vocabulary.
* The products run in the dtype of the tensors, or autocast's; everything else in float32 (float64 stays). Weights in
  half precision gather their gradient in their own dtype, rounded once a chunk; under autocast in float32.
* A bias of -inf rules a word out: q or p is exactly 0 there, with the meaning of `divergence.py` (0 log 0 = 0; inf only
  where the divergence is).
* ValueError: shapes that do not fit, an unknown name, a number out of its range.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .language import IGNORE
from .reduction import EXCLUDED, per_item, upcast
from .rows import RULED_OUT, DivergenceName, Rule, normalised_, rule_named
from .sparse import Rest, SparseDivergence, check_sparse, check_sparse_divergence, log_mass

VocabularyReduction = Literal["sum", "mean", "token_mean", "sequence_mean", "sequence_sum"]


def linear_divergence(
    student_hidden: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden: Tensor,
    teacher_weight_VE: Tensor,
    *,
    divergence: DivergenceName,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    beta: float = 0.5,
    skew: float = 0.1,
    t: float | Tensor = 1.0,
    temperature: float = 1.0,
    scale_by_t2: bool,
    reduction: VocabularyReduction,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """A divergence between the distributions of two output layers over one vocabulary, reduced to a scalar.

    | divergence          | loss of a place                                                                       |
    |---------------------|---------------------------------------------------------------------------------------|
    | "forward"           | KL(p, q)                                                                              |
    | "reverse"           | KL(q, p)                                                                              |
    | "jensen_shannon"    | beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q (GKD)                  |
    | "skew"              | KL(p, skew p + (1 - skew) q) (DistiLLM)                                               |
    | "skew_reverse"      | KL(q, skew q + (1 - skew) p)                                                          |
    | "total_variation"   | 1/2 sum |p - q| (f-DISTILL)                                                           |
    | "taid"              | -sum p_t log q, p_t = softmax((1 - t) sg(z_S) + t z_T) without gradient (TAID, eq. 3) |

    Value and gradients are those of the function of that name in `divergence.py` or `language.py` on whole logits. For
    "taid", `t` in [0, 1] is a number or a scalar tensor that is not read back, and words that the student rules out
    contribute 0. Shapes: student_hidden [..., D], teacher_hidden [..., E].
    """
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden has items {tuple(student_hidden.shape[:-1])} but teacher_hidden has "
            f"{tuple(teacher_hidden.shape[:-1])}: both must come from the same tokens."
        )
    if student_weight_VD.shape[0] != teacher_weight_VE.shape[0]:
        raise ValueError(
            f"the student has {student_weight_VD.shape[0]} words but the teacher has {teacher_weight_VE.shape[0]}: "
            f"cut both output layers to the vocabulary that they share."
        )
    rule = rule_named(divergence, beta, skew, t, ruled_out=student_bias_V is not None or teacher_bias_V is not None)
    rows = _Rows(student_hidden, student_weight_VD, reduction, labels, mask, weight, chunk)
    layer = _Layer(rows.of(teacher_hidden.detach()), teacher_weight_VE, teacher_bias_V, temperature, rows.chunk)
    teacher = _OutputLayer(layer, rule)
    return _reduced(rows, student_hidden, student_weight_VD, student_bias_V, teacher, temperature, scale_by_t2)


def linear_sparse_divergence(
    student_hidden: Tensor,
    student_weight_VD: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    rest_mass: Tensor,
    *,
    divergence: SparseDivergence,
    rest: Rest,
    student_bias_V: Tensor | None = None,
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    scale_by_t2: bool,
    reduction: VocabularyReduction,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """A divergence from a teacher of which only the K likeliest words are known, reduced to a scalar.

    The losses of `limbeck.losses.sparse.sparse_divergence`, which says what `rest` does; here the student's logits
    exist a chunk at a time and the teacher's distribution never does. student_hidden [..., D]; ids (valid words at
    every place, also where left out) and log_probs [..., K]; rest_mass [...].
    """
    check_sparse(student_hidden.shape[:-1], student_weight_VD.shape[0], ids, log_probs, rest_mass)
    check_sparse_divergence(divergence, rest, temperature)
    rule = rule_named(divergence, beta, skew, 1.0, ruled_out=True)
    rows = _Rows(student_hidden, student_weight_VD, reduction, labels, mask, weight, chunk)
    known = (rows.of(ids), rows.of(upcast(log_probs.detach())), rows.of(upcast(rest_mass.detach())[..., None]))
    teacher = _Sparse(*known, student_weight_VD.shape[0], rest, temperature, rule)
    return _reduced(rows, student_hidden, student_weight_VD, student_bias_V, teacher, temperature, scale_by_t2)


def linear_cross_entropy(
    student_hidden: Tensor,
    student_weight_VD: Tensor,
    labels: Tensor,
    *,
    student_bias_V: Tensor | None = None,
    reduction: VocabularyReduction,
    weight: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """-log q at the label of every place, reduced to a scalar; a label of -100 leaves its place out.

    Three matrix products. student_hidden [..., D], labels int64 [...].
    """
    rows = _Rows(student_hidden, student_weight_VD, reduction, labels, None, weight, chunk)
    teacher = _Labels(rows.of(labels[..., None]).clamp(min=0))
    return _reduced(rows, student_hidden, student_weight_VD, student_bias_V, teacher, 1.0, scale_by_t2=False)


# ---------------------------------------------------------------- which rows, and what each is multiplied by


class _Rows:
    """The kept items as rows, the factor that the reduction gives to the loss of each, and their chunks."""

    def __init__(
        self,
        hidden: Tensor,
        weight_VD: Tensor,
        reduction: VocabularyReduction,
        labels: Tensor | None,
        mask: Tensor | None,
        weight: Tensor | None,
        chunk: int | None,
    ) -> None:
        items = hidden.shape[:-1]
        if hidden.shape[-1] != weight_VD.shape[1]:
            raise ValueError(
                f"student_hidden has width {hidden.shape[-1]} but student_weight_VD has {weight_VD.shape[1]}."
            )
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}: it must be at least 1 item.")
        if reduction not in get_args(VocabularyReduction):
            raise ValueError(
                f"reduction is {reduction!r}: choose one of {', '.join(get_args(VocabularyReduction))} (the gradients "
                "are made on the way forward, so it must be a scalar; for a loss per item use whole logits)."
            )
        if labels is not None and mask is not None:
            raise ValueError("both labels and mask were given: say only once which places are left out.")
        if labels is not None and labels.shape != items:
            raise ValueError(f"labels have shape {tuple(labels.shape)} but the items have shape {tuple(items)}.")
        if reduction == "sequence_mean" and len(items) != 2:
            raise ValueError(f'reduction is "sequence_mean" but the items have shape {tuple(items)}, not [B, L].')
        ones = torch.ones(items, dtype=upcast(hidden[:0]).dtype, device=hidden.device)
        kept = ones
        if labels is not None:
            kept = (labels != IGNORE).to(ones)
        elif mask is not None:
            kept = per_item(mask.bool(), ones, "mask").expand(items).to(ones)
        factor = _shares(kept, reduction)
        if weight is not None:
            factor = factor * per_item(weight.detach().to(ones), ones, "weight")
        self.chosen: Tensor | None = None
        self.factor_N = factor.flatten()
        if hidden.device.type == "cpu" and (labels is not None or mask is not None):
            self.chosen = self.factor_N.nonzero().squeeze(1)
            self.factor_N = self.factor_N[self.chosen]
        self.parts = _parts(len(self.factor_N), chunk or default_chunk(len(weight_VD), hidden.device))
        self.chunk = max((last - first for first, last in self.parts), default=0)

    def of(self, values: Tensor) -> Tensor:
        """[..., D] as rows [N, D]; a host may look at the mask and drop what is left out."""
        values_ND = values.reshape(-1, values.shape[-1])
        return values_ND if self.chosen is None else values_ND[self.chosen]


def _shares(kept: Tensor, reduction: VocabularyReduction) -> Tensor:
    """What the loss of each item is multiplied by, from 1 for kept items and 0 for others."""
    if reduction == "sum":
        return kept
    if reduction == "sequence_sum":
        return kept / max(kept.shape[0], 1)
    if reduction == "sequence_mean":
        return kept / kept.sum(1, keepdim=True).clamp(min=1) / kept.amax(1).sum().clamp(min=1)
    return kept / kept.sum().clamp(min=1)


# ---------------------------------------------------------------- the four products


def _reduced(
    rows: _Rows,
    hidden: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    teacher: _Teacher,
    temperature: float,
    scale_by_t2: bool,
) -> Tensor:
    hidden_ND = rows.of(hidden)
    wanted = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden_ND, weight_VD, bias_V)
    )
    loss: Tensor = _Chunked.apply(hidden_ND, weight_VD, bias_V, rows, teacher, temperature, wanted)
    return loss * temperature**2 if scale_by_t2 else loss


def default_chunk(words: int, device: torch.device) -> int:
    """Places at a time: about 32 MB of float32 logits on a CPU, 512 MB elsewhere; at least 16."""
    return max(16, (2**27 if device.type != "cpu" else 2**23) // words)


class _Chunked(torch.autograd.Function):
    """sum of factor_N * teacher's loss of each row; the gradients are made here and only scaled in `backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        rows: _Rows,
        teacher: _Teacher,
        temperature: float,
        wanted: tuple[bool, bool, bool],
    ) -> Tensor:
        factor_N = rows.factor_N
        layer = _Layer(hidden_ND, weight_VD, bias_V, temperature, rows.chunk)
        with _without_autocast(hidden_ND.device):
            # Factors near 1 here and the rest in `backward`: 1 / tokens would vanish in half precision.
            scale = factor_N.abs().amax() if len(factor_N) else factor_N.new_ones(())
            scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)
            gradients = _Gradients(layer, weight_VD, factor_N / scale, wanted)
            items_N = torch.empty_like(factor_N)
            for first, last in rows.parts:
                logits_MV = layer.logits(first, last)
                teacher.open(first, last)
                for start, stop in _blocks(logits_MV):
                    items_N[first + start : first + stop] = teacher.compare(
                        logits_MV[start:stop], first + start, first + stop, any(wanted)
                    )
                if any(wanted):
                    gradients.add(logits_MV, first, last)
            # A place that is left out may be inf, and inf * 0 is not 0.
            total = torch.where(factor_N == 0, 0.0, items_N * factor_N).sum()
        ctx.scale = scale / temperature
        ctx.gradients = gradients.hidden_ND, gradients.weight_VD, gradients.bias_V
        ctx.dtypes = [None if each is None else each.dtype for each in (hidden_ND, weight_VD, bias_V)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError(
                "this loss was gone back through already, and its gradients were handed on without a copy; compute it "
                "again, or add up all that it is part of and go back once"
            )
        gradients, ctx.gradients = ctx.gradients, None
        by = grad_outputs[0] * ctx.scale
        return (*(_scaled_(each, by, dtype) for each, dtype in zip(gradients, ctx.dtypes, strict=True)), *[None] * 4)


def _scaled_(gradient: Tensor | None, by: Tensor, dtype: torch.dtype) -> Tensor | None:
    """gradient * by, in place and rounded once; in `dtype`."""
    if gradient is None:
        return None
    # In pieces: in float32 the gradient of weights in half precision would be twice as large as they are.
    for part in gradient.split(len(gradient) if gradient.dtype == by.dtype else 4096):
        part.mul_(by) if part.dtype == by.dtype else part.copy_(part.to(by.dtype) * by)
    return gradient.to(dtype)


class _Layer:
    """Logits of an output layer over T, a chunk at a time, always in the same memory."""

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float, chunk: int
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}: it must be positive.")
        device = hidden_ND.device.type
        dtype = hidden_ND.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        self.hidden_ND, self.weight_VD = hidden_ND.detach().to(dtype), weight_VD.detach().to(dtype)
        self.exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.slope = 1 / temperature
        self.bias_V = None if bias_V is None else (bias_V.detach().to(self.exact) * self.slope).clamp(min=EXCLUDED)
        # On a CPU a product of few rows and many words is a tenth faster in pieces whose result stays in the cache.
        self.words = 2048 if device == "cpu" else len(weight_VD)
        shape = (chunk, len(weight_VD))
        self.logits_MV = hidden_ND.new_empty(shape, dtype=self.exact)
        self.product_MV = self.logits_MV if dtype == self.exact else hidden_ND.new_empty(shape, dtype=dtype)

    def logits(self, first: int, last: int) -> Tensor:
        """[last - first, V] in float32 (float64); overwritten by the next chunk's."""
        product, hidden_MD = self.product_MV[: last - first], self.hidden_ND[first:last]
        for part_MW, weight_WD in zip(product.split(self.words, 1), self.weight_VD.split(self.words), strict=True):
            torch.addmm(part_MW, hidden_MD, weight_WD.t(), beta=0, alpha=self.slope, out=part_MW)
        logits = self.logits_MV[: last - first]
        if product.dtype != logits.dtype:
            logits.copy_(product)
        return logits if self.bias_V is None else logits.add_(self.bias_V)


class _Gradients:
    """The gradients of one output layer's tensors, gathered chunk by chunk; None where not wanted."""

    def __init__(self, layer: _Layer, weight_VD: Tensor, factor_N: Tensor, wanted: tuple[bool, bool, bool]) -> None:
        self.layer, self.factor_N = layer, factor_N
        hidden_ND, exact = layer.hidden_ND, layer.exact
        empty = len(hidden_ND) == 0
        self.hidden_ND = torch.empty_like(hidden_ND, dtype=exact) if wanted[0] else None
        self.weight_VD = torch.empty_like(weight_VD) if wanted[1] else None
        self.bias_V = hidden_ND.new_zeros(len(weight_VD), dtype=exact) if wanted[2] else None
        if empty and self.weight_VD is not None:
            self.weight_VD.zero_()

    def add(self, slopes_MV: Tensor, first: int, last: int) -> None:
        """slopes_MV: the gradient of each row's loss by its logits, without the row's factor."""
        factor_M1 = self.factor_N[first:last, None]
        if self.bias_V is not None:
            self.bias_V.addmv_(slopes_MV.t(), factor_M1[:, 0])
        product_MV = slopes_MV
        if self.layer.product_MV.dtype != slopes_MV.dtype:
            product_MV = self.layer.product_MV[: last - first].copy_(slopes_MV)
        if self.hidden_ND is not None:
            torch.mul(product_MV @ self.layer.weight_VD, factor_M1, out=self.hidden_ND[first:last])
        if self.weight_VD is not None:
            # The factor goes into the narrow side of each product, not into rows of V.
            weighted_MD = (self.layer.hidden_ND[first:last] * factor_M1).to(product_MV.dtype)
            if self.weight_VD.dtype == product_MV.dtype:
                sum_VD = self.weight_VD
                torch.addmm(sum_VD, product_MV.t(), weighted_MD, beta=int(first > 0), out=sum_VD)
            else:
                part_VD = product_MV.t() @ weighted_MD
                self.weight_VD.copy_(part_VD) if first == 0 else self.weight_VD.add_(part_VD)


def _parts(items: int, chunk: int) -> list[tuple[int, int]]:
    """(first, last) of chunks of about equal size, none larger than `chunk`."""
    count = math.ceil(items / chunk)
    return [(items * i // count, items * (i + 1) // count) for i in range(count)]


def _blocks(logits_MV: Tensor) -> list[tuple[int, int]]:
    """Rows that are compared at a time: on a CPU as many as stay in its caches, elsewhere all."""
    rows, words = logits_MV.shape
    if logits_MV.device.type != "cpu":
        return [(0, rows)]
    return _parts(rows, max(4 * torch.get_num_threads(), 2**18 // words))


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The dtypes below are chosen already, and dot products would be rounded."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


# ---------------------------------------------------------------- teachers


class _Teacher(Protocol):
    """What a block of the student's rows is compared with."""

    def open(self, first: int, last: int) -> None:
        """Make ready for the items first..last, a chunk."""

    def compare(self, student_MV: Tensor, start: int, stop: int, gradient: bool) -> Tensor:
        """The loss of the items start..stop of that chunk; their gradients instead of the student's logits."""


class _OutputLayer:
    """A teacher of which hidden states and output layer are known."""

    def __init__(self, layer: _Layer, rule: Rule) -> None:
        self.layer, self.rule = layer, rule

    def open(self, first: int, last: int) -> None:
        self.first = first
        self.logits_MV = self.layer.logits(first, last)

    def compare(self, student_MV: Tensor, start: int, stop: int, gradient: bool) -> Tensor:
        teacher_MV = self.logits_MV[start - self.first : stop - self.first]
        return self.rule(student_MV, teacher_MV.to(student_MV.dtype), gradient)


class _Sparse:
    """A teacher of which K words of each item and the mass of the others are known."""

    def __init__(
        self,
        ids_NK: Tensor,
        log_probs_NK: Tensor,
        rest_N1: Tensor,
        words: int,
        rest: Rest,
        temperature: float,
        rule: Rule,
    ) -> None:
        kept = ids_NK.shape[1]
        self.rest: Rest = rest if kept < words else "ignore"
        self.ids_NK, self.rule = ids_NK, rule
        self.logits_NK = (log_probs_NK / temperature).clamp(min=EXCLUDED)
        share_N1 = rest_N1 / (words - kept) if self.rest == "spread" else rest_N1
        self.others_N1 = log_mass(share_N1) / temperature

    def open(self, first: int, last: int) -> None:
        pass

    def compare(self, student_MV: Tensor, start: int, stop: int, gradient: bool) -> Tensor:
        ids_MK, teacher_MK = self.ids_NK[start:stop], self.logits_NK[start:stop].to(student_MV.dtype)
        others_M1 = self.others_N1[start:stop].to(student_MV.dtype)
        if self.rest == "spread":
            teacher_MV = others_M1.expand_as(student_MV).scatter(-1, ids_MK, teacher_MK)
            return self.rule(student_MV, teacher_MV, gradient)
        student_MK = student_MV.gather(-1, ids_MK)
        if self.rest == "ignore":
            items_M = self.rule(student_MK, teacher_MK.clone(), gradient)
            if gradient:
                student_MV.zero_().scatter_(-1, ids_MK, student_MK)
            return items_M
        student_MV.scatter_(-1, ids_MK, EXCLUDED)
        largest_M1 = student_MV.amax(-1, keepdim=True)
        among_others_MV, log_sum_M = normalised_(student_MV)
        student_MC = torch.cat([student_MK, largest_M1 + log_sum_M[:, None]], -1)
        items_M = self.rule(student_MC, torch.cat([teacher_MK, others_M1], -1), gradient)
        if gradient:
            torch.mul(among_others_MV, student_MC[:, -1:], out=student_MV).scatter_(-1, ids_MK, student_MC[:, :-1])
        return items_M


class _Labels:
    """A teacher that names one word."""

    def __init__(self, labels_N1: Tensor) -> None:
        self.labels_N1 = labels_N1

    def open(self, first: int, last: int) -> None:
        pass

    def compare(self, student_MV: Tensor, start: int, stop: int, gradient: bool) -> Tensor:
        labels_M1 = self.labels_N1[start:stop]
        q_MV, log_sum_M = normalised_(student_MV)
        items_M = log_sum_M - student_MV.gather(-1, labels_M1)[:, 0]
        if gradient:
            student_MV.copy_(q_MV).scatter_add_(-1, labels_M1, torch.full_like(q_MV[:, :1], -1.0))
        return items_M.masked_fill(items_M > -RULED_OUT, torch.inf)

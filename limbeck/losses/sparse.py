"""Divergences from a teacher of which only the K likeliest words (classes) of each item are known.

Letters: V words, K of them kept, C classes that are compared.

The teacher's answer is kept as `ids` int64 [..., K], `log_probs` [..., K], the log-probabilities of these words among
all V, and `rest_mass` [...], what is left of the probability. `rest` says what becomes of it:

| rest     | classes that are compared                           | assumption                                        |
|----------|-----------------------------------------------------|---------------------------------------------------|
| "ignore" | the K words, both sides renormalised over them      | the student's mass on other words does not matter |
| "spread" | all V words, rest_mass / (V - K) on each other word | the teacher finds all other words equally likely  |
| "bucket" | the K words and one more for all others together    | how the mass splits among others does not matter  |

Where K = V nothing is left, and all three are the plain divergence. A mass of 0 counts as the smallest float32, which
keeps every divergence finite. Everything else as in `divergence.py`: nothing is detached, float32 inside, explicit
reductions. For hidden states and an output layer instead of logits see `vocabulary.linear_sparse_divergence`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from . import divergence as divergences
from .language import total_variation
from .reduction import Reduction, reduce, upcast

Rest = Literal["ignore", "spread", "bucket"]
SparseDivergence = Literal["forward", "reverse", "jensen_shannon", "skew", "skew_reverse", "total_variation"]


def sparse_divergence(
    student_logits: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    rest_mass: Tensor,
    *,
    divergence: SparseDivergence,
    rest: Rest,
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    scale_by_t2: bool,
    reduction: Reduction,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """A divergence between softmax(student_logits / T) and a teacher known by its K likeliest words.

    student_logits [..., V]; `divergence` by the names of `vocabulary.linear_divergence`. The teacher's kept numbers at
    temperature T are those of its recovered distribution. "forward" with "spread" is computed from the K words and
    sums over the student's logits; the other divergences with "spread" recover a teacher as large as the logits.

    Raises ValueError for shapes that do not fit, an unknown name, and T other than 1 with "bucket": the bucket's mass
    at T depends on how it splits among its words.
    """
    check_sparse(student_logits.shape[:-1], student_logits.shape[-1], ids, log_probs, rest_mass)
    check_sparse_divergence(divergence, rest, temperature)
    compare = partial(
        divergence_named(divergence, beta, skew), temperature=temperature, scale_by_t2=scale_by_t2, reduction="none"
    )
    student, log_probs, rest_mass = upcast(student_logits), upcast(log_probs), upcast(rest_mass)[..., None]
    words, others = student.shape[-1], student.shape[-1] - ids.shape[-1]
    if rest == "ignore" or others == 0:
        items = compare(student.gather(-1, ids), log_probs)
    elif rest == "bucket":
        of_others = student.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        student_classes = torch.cat([student.gather(-1, ids), of_others], -1)
        items = compare(student_classes, torch.cat([log_probs, log_mass(rest_mass)], -1))
    elif divergence == "forward":
        log_other = log_mass(rest_mass / others)
        items = _forward_spread(student / temperature, ids, log_probs / temperature, log_other / temperature)
        items = items * temperature**2 if scale_by_t2 else items
    else:
        items = compare(student, log_mass(rest_mass / others).expand_as(student).scatter(-1, ids, log_probs))
    return reduce(items, reduction=reduction, weight=weight, mask=mask, elements=words)


def check_sparse(items: torch.Size, words: int, ids: Tensor, log_probs: Tensor, rest_mass: Tensor) -> None:
    """ValueError unless K ids and log-probabilities, and one mass, belong to each item."""
    if ids.shape != log_probs.shape or ids.shape[:-1] != items or rest_mass.shape != items:
        raise ValueError(
            f"the items have shape {tuple(items)}, but ids {tuple(ids.shape)}, log_probs {tuple(log_probs.shape)} and "
            f"rest_mass {tuple(rest_mass.shape)}: give [..., K], [..., K] and [...]."
        )
    if not 1 <= ids.shape[-1] <= words:
        raise ValueError(f"{ids.shape[-1]} words of each item are kept: of {words} it must be 1 at least.")


def check_sparse_divergence(divergence: str, rest: str, temperature: float) -> None:
    """ValueError for a name, or a pair of settings, that has no meaning for a teacher known by K words."""
    if divergence not in get_args(SparseDivergence):
        raise ValueError(f"divergence is {divergence!r}: choose one of {', '.join(get_args(SparseDivergence))}.")
    if rest not in get_args(Rest):
        raise ValueError(f"rest is {rest!r}: choose one of {', '.join(get_args(Rest))}.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be positive.")
    if rest == "bucket" and temperature != 1:
        raise ValueError(
            f'temperature is {temperature} with rest="bucket": the bucket\'s mass at a temperature is unknown; take 1, '
            '"spread" or "ignore".'
        )


def log_mass(mass: Tensor) -> Tensor:
    """log of a probability mass, finite where rounding has left nothing."""
    return mass.clamp(min=torch.finfo(torch.float32).tiny).log()


def divergence_named(name: SparseDivergence, beta: float, skew: float) -> Callable[..., Tensor]:
    """The function of logits of that name, with its share set."""
    functions: dict[str, Callable[..., Tensor]] = {
        "forward": divergences.kl_divergence,
        "reverse": divergences.reverse_kl,
        "jensen_shannon": partial(divergences.jensen_shannon, beta=beta),
        "skew": partial(divergences.skew_kl, skew=skew),
        "skew_reverse": partial(divergences.skew_reverse_kl, skew=skew),
        "total_variation": total_variation,
    }
    return functions[name]


def _forward_spread(student: Tensor, ids: Tensor, log_probs: Tensor, log_other: Tensor) -> Tensor:
    """KL(p, q) with p given by the logits of K words and one logit of every other word, [..., K] and [..., 1]."""
    others = student.shape[-1] - ids.shape[-1]
    log_norm = torch.cat([log_probs, log_other + math.log(others)], -1).logsumexp(-1, keepdim=True)
    log_p, log_u = log_probs - log_norm, (log_other - log_norm)[..., 0]
    log_q = student.log_softmax(-1)
    of_kept = (log_p.exp() * (log_p - log_q.gather(-1, ids)).masked_fill(torch.isneginf(log_p), 0.0)).sum(-1)
    return of_kept + log_u.exp() * (others * log_u - log_q.scatter(-1, ids, 0.0).sum(-1))

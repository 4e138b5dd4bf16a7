"""Divergences of rows of logits that also leave the gradient, written over the logits: what `vocabulary.py` runs on.

Letters: M rows, C classes. q = softmax(student), p = softmax(teacher), both at the temperature already.

Few passes over memory are the whole point, so everything here overwrites its arguments, runs without autograd and takes
blocks that fit a processor's caches. Words ruled out have the logit `EXCLUDED`, not -inf, which keeps 0 * log 0 finite.
The values are those of the functions in `divergence.py` and `language.py`; the slopes by the student's logits s are

    forward           q - p                          skew          q (a - sum q a),  a = -(1 - skew) p / m
    reverse           q (log q/p - KL)               skew_reverse  q (a - sum q a),  a = log q/m - skew q / m
    jensen_shannon    (1 - beta) q (log q/m - KL(q, m))   total_variation  q (a - sum q a),  a = sign(q - p) / 2
    taid              q - p_t
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .reduction import EXCLUDED

RULED_OUT = EXCLUDED / 10  # a logit below this is that of a word ruled out, whatever its row was shifted by

DivergenceName = Literal["forward", "reverse", "jensen_shannon", "skew", "skew_reverse", "total_variation", "taid"]

# (student's logits, teacher's logits, whether slopes are wanted) -> a loss per row. Both are overwritten, the student's
# by the slopes of its row's loss.
Rule = Callable[[Tensor, Tensor, bool], Tensor]


def normalised_(logits_MC: Tensor) -> tuple[Tensor, Tensor]:
    """Take each row's largest logit from it, in place; (softmax [M, C], log of the sum of exponentials left [M])."""
    logits_MC.sub_(logits_MC.amax(-1, keepdim=True))
    probabilities_MC = logits_MC.softmax(-1)
    return probabilities_MC, -probabilities_MC.amax(-1).log()


def rule_named(name: DivergenceName, beta: float, skew: float, t: float | Tensor, ruled_out: bool) -> Rule:
    """The divergence of that name. `ruled_out`: some logits may be those of words ruled out."""
    shares = {"jensen_shannon": ("beta", beta), "skew": ("skew", skew), "skew_reverse": ("skew", skew)}
    setting, share = shares.get(name, ("", 0.5))
    if not 0 < share < 1:
        raise ValueError(f"{setting} is {share}: it must lie strictly between 0 and 1.")
    rules: dict[str, Rule] = {
        "forward": partial(_forward, ruled_out=ruled_out),
        "reverse": partial(_reverse, ruled_out=ruled_out),
        "jensen_shannon": partial(_jensen_shannon, beta=beta),
        "skew": partial(_skew, skew=skew),
        "skew_reverse": partial(_skew_reverse, skew=skew),
        "total_variation": _total_variation,
        "taid": partial(_taid, t=t, ruled_out=ruled_out),
    }
    if name not in rules:
        raise ValueError(f"divergence is {name!r}: choose one of {', '.join(rules)}.")
    return rules[name]


def _slopes_(student_MC: Tensor, q_MC: Tensor, by_q_MC: Tensor) -> None:
    """From the slopes of a loss by q to those by the student's logits: q (s - sum q s), into `student_MC`."""
    mean_M = torch.linalg.vecdot(q_MC, by_q_MC)
    torch.sub(by_q_MC, mean_M[:, None], out=student_MC).mul_(q_MC)


def _mixture(first_MC: Tensor, second_MC: Tensor, share: float) -> Tensor:
    """share first + (1 - share) second, not quite 0 where both are: every use of it is multiplied by one of them."""
    return torch.lerp(second_MC, first_MC, share).clamp_(min=torch.finfo(first_MC.dtype).tiny)


def _forward(student_MC: Tensor, teacher_MC: Tensor, gradient: bool, *, ruled_out: bool) -> Tensor:
    q_MC, q_sum_M = normalised_(student_MC)
    p_MC, p_sum_M = normalised_(teacher_MC)
    items_M = torch.linalg.vecdot(p_MC, teacher_MC.sub_(student_MC)) + q_sum_M - p_sum_M
    if ruled_out:
        items_M = items_M.masked_fill(((student_MC < RULED_OUT) & (p_MC > 0)).any(-1), torch.inf)
    if gradient:
        torch.sub(q_MC, p_MC, out=student_MC)
    return items_M


def _reverse(student_MC: Tensor, teacher_MC: Tensor, gradient: bool, *, ruled_out: bool) -> Tensor:
    q_MC, q_sum_M = normalised_(student_MC)
    p_sum_M = normalised_(teacher_MC)[1]
    infinite_M = ((teacher_MC < RULED_OUT) & (q_MC > 0)).any(-1) if ruled_out else None
    torch.sub(student_MC, teacher_MC, out=teacher_MC)
    items_M = torch.linalg.vecdot(q_MC, teacher_MC)
    if gradient:
        torch.sub(teacher_MC, items_M[:, None], out=student_MC).mul_(q_MC)
    items_M = items_M + p_sum_M - q_sum_M
    return items_M if infinite_M is None else items_M.masked_fill(infinite_M, torch.inf)


def _jensen_shannon(student_MC: Tensor, teacher_MC: Tensor, gradient: bool, *, beta: float) -> Tensor:
    q_MC, q_sum_M = normalised_(student_MC)
    p_MC, p_sum_M = normalised_(teacher_MC)
    log_m_MC = _mixture(p_MC, q_MC, beta).log_()
    of_teacher_M = torch.linalg.vecdot(p_MC, teacher_MC.sub_(log_m_MC)) - p_sum_M
    student_MC.sub_(log_m_MC)
    of_student_M = torch.linalg.vecdot(q_MC, student_MC)
    if gradient:
        student_MC.sub_(of_student_M[:, None]).mul_(q_MC.mul_(1 - beta))
    return beta * of_teacher_M + (1 - beta) * (of_student_M - q_sum_M)


def _skew(student_MC: Tensor, teacher_MC: Tensor, gradient: bool, *, skew: float) -> Tensor:
    q_MC, _ = normalised_(student_MC)
    p_MC, p_sum_M = normalised_(teacher_MC)
    mixture_MC = _mixture(p_MC, q_MC, skew)
    if gradient:
        ratio_MC = p_MC / mixture_MC
        _slopes_(student_MC, q_MC, ratio_MC.mul_(skew - 1))
    return torch.linalg.vecdot(p_MC, teacher_MC.sub_(mixture_MC.log_())) - p_sum_M


def _skew_reverse(student_MC: Tensor, teacher_MC: Tensor, gradient: bool, *, skew: float) -> Tensor:
    q_MC, q_sum_M = normalised_(student_MC)
    p_MC, _ = normalised_(teacher_MC)
    mixture_MC = _mixture(q_MC, p_MC, skew)
    ratio_MC = q_MC / mixture_MC if gradient else None
    student_MC.sub_(mixture_MC.log_())
    items_M = torch.linalg.vecdot(q_MC, student_MC) - q_sum_M
    if ratio_MC is not None:
        _slopes_(student_MC, q_MC, student_MC.sub_(ratio_MC, alpha=skew))
    return items_M


def _total_variation(student_MC: Tensor, teacher_MC: Tensor, gradient: bool) -> Tensor:
    q_MC, p_MC = student_MC.softmax(-1), teacher_MC.softmax(-1)
    difference_MC = torch.sub(q_MC, p_MC, out=teacher_MC)
    items_M = 0.5 * torch.linalg.vector_norm(difference_MC, 1, dim=-1)
    if gradient:
        _slopes_(student_MC, q_MC, difference_MC.sign_().mul_(0.5))
    return items_M


def _taid(student_MC: Tensor, teacher_MC: Tensor, gradient: bool, *, t: float | Tensor, ruled_out: bool) -> Tensor:
    q_MC, q_sum_M = normalised_(student_MC)
    p_MC = torch.lerp(student_MC, teacher_MC, t.to(student_MC) if isinstance(t, Tensor) else t).softmax(-1)
    if ruled_out:
        p_MC.masked_fill_(student_MC < RULED_OUT, 0.0)
        mass_M1 = p_MC.sum(-1, keepdim=True)
        q_MC, q_sum_M = q_MC * mass_M1, q_sum_M * mass_M1[:, 0]
    items_M = q_sum_M - torch.linalg.vecdot(p_MC, student_MC)
    if gradient:
        torch.sub(q_MC, p_MC, out=student_MC)
    return items_M

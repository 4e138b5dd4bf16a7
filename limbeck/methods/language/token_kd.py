"""Token KD: the student matches the teacher's distribution of every next token.

Hinton et al. 2015 (arXiv 1503.02531) token by token; Kim and Rush 2016 call it word-level distillation. With p and q
the distributions of teacher and student for a scored token, n of them in the batch, D a divergence:

    L = (1 - ratio) CE(q, y) + ratio (1 / n) sum D(p, q)

    forward  KL(p || q): the student spreads over all that the teacher finds possible
    reverse  KL(q || p): it settles on what the teacher finds likely (MiniLLM, Gu et al. 2024)
    others   Jensen-Shannon (GKD), skewed KLs (DistiLLM), total variation (f-DISTILL)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn

from limbeck.errors import UserError, require_positive, require_share
from limbeck.losses import (
    jensen_shannon,
    kl_divergence,
    reverse_kl,
    shift,
    skew_kl,
    skew_reverse_kl,
    token_cross_entropy,
    token_divergence,
    total_variation,
)
from limbeck.models import require_same_vocabulary
from limbeck.teachers import Teacher
from limbeck.train import Batch, Losses, Method

Divergence = Literal["forward", "reverse", "jensen_shannon", "skew", "skew_reverse", "total_variation"]


def divergence_named(name: Divergence, beta: float, skew: float) -> Callable[..., Tensor]:
    """The function of that name, with its mixing share set."""
    functions: dict[str, Callable[..., Tensor]] = {
        "forward": kl_divergence,
        "reverse": reverse_kl,
        "jensen_shannon": partial(jensen_shannon, beta=beta),
        "skew": partial(skew_kl, skew=skew),
        "skew_reverse": partial(skew_reverse_kl, skew=skew),
        "total_variation": total_variation,
    }
    if name not in functions:
        raise UserError(f"divergence is '{name}'; choose one of {', '.join(functions)}")
    return functions[name]


class TokenKD(Method):
    """A divergence between teacher and student for every scored token, beside the labels where `ratio` is below 1.

    Args:
        student: `tokens -> logits_BLV`, causal.
        teacher: gives logits of the same vocabulary.
        divergence: `forward`, `reverse`, `jensen_shannon`, `skew`, `skew_reverse`, `total_variation`.
        temperature: of both distributions, > 0; the divergence is multiplied by its square.
        ratio: share of the divergence in [0, 1]; the labels have the rest. At 0 the teacher only measures.
        beta: of `jensen_shannon`, the teacher's share in the mixture. skew: of the skewed divergences. In (0, 1).

    Raises:
        UserError: a setting is out of its range, or the vocabularies differ.
    """

    streams = {"labelled": ("tokens", "labels")}

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        *,
        divergence: Divergence = "forward",
        temperature: float = 1.0,
        ratio: float = 1.0,
        beta: float = 0.5,
        skew: float = 0.1,
    ) -> None:
        super().__init__()
        require_positive(temperature=temperature)
        require_share(ratio=ratio, beta=beta, skew=skew)
        require_same_vocabulary(student, teacher)
        self.student, self.teacher = student, teacher
        self.divergence, self.temperature = divergence_named(divergence, beta, skew), temperature
        self.weights = {term: share for term, share in (("ce", 1 - ratio), ("kd", ratio)) if share > 0}

    def training_step(self, batch: Batch) -> Losses:
        labelled = batch["labelled"]
        student_BLV, labels_BL = shift(self.student(labelled["tokens"]), labelled["labels"])
        losses = {}
        if "ce" in self.weights:
            losses["ce"] = token_cross_entropy(student_BLV, labels_BL, reduction="token_mean")
        if "kd" in self.weights:
            teacher_BLV, _ = shift(self.teacher.logits(labelled, "tokens"), labelled["labels"])
            losses["kd"] = token_divergence(
                self.divergence,
                student_BLV,
                teacher_BLV,
                labels_BL,
                temperature=self.temperature,
                scale_by_t2=True,
                reduction="token_mean",
            )
        return losses

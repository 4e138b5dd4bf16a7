"""Token KD: the student matches the teacher's distribution of every next token.

Hinton et al. 2015 (arXiv 1503.02531) token by token; Kim and Rush 2016 call it word-level distillation. With p and q
the distributions of teacher and student for a scored token, n of them in the batch, D a divergence:

    L = (1 - ratio) CE(q, y) + ratio (1 / n) sum D(p, q)

    forward  KL(p || q): the student spreads over all that the teacher finds possible
    reverse  KL(q || p): it settles on what the teacher finds likely (MiniLLM, Gu et al. 2024)
    others   Jensen-Shannon (GKD), skewed KLs (DistiLLM), total variation (f-DISTILL)

The logits of a vocabulary of 100,000 words are the largest tensors of such a step. `chunk` computes both losses from
hidden states, that many tokens at a time; `top_k` compares with the teacher's K likeliest words and the mass it leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from limbeck.errors import UserError, require_positive, require_share
from limbeck.losses import (
    Rest,
    SparseDivergence,
    divergence_named,
    linear_cross_entropy,
    linear_divergence,
    linear_sparse_divergence,
    reduce_tokens,
    shift,
    sparse_divergence,
    token_cross_entropy,
    token_divergence,
)
from limbeck.models import CausalLM, require_output_layer, require_same_vocabulary, vocabulary_size
from limbeck.teachers import Frozen, Teacher
from limbeck.train import Batch, Losses, Method

Fields = Mapping[str, Any]


class TokenKD(Method):
    """A divergence between teacher and student for every scored token, beside the labels where `ratio` is below 1.

    Args:
        student: `tokens -> logits_BLV`, causal.
        teacher: gives logits of the same vocabulary.
        divergence: `forward`, `reverse`, `jensen_shannon`, `skew`, `skew_reverse`, `total_variation`.
        temperature: of both distributions, > 0; the divergence is multiplied by its square.
        ratio: share of the divergence in [0, 1]; the labels have the rest. At 0 the teacher only measures.
        beta: of `jensen_shannon`, the teacher's share in the mixture. skew: of the skewed divergences. In (0, 1).
        chunk: None computes whole logits; a number that many tokens at a time from hidden states, for vocabularies of
            100,000 words. The same losses; student and teacher must be causal transformers models in memory.
        top_k: compare with the teacher's so many likeliest words of each token; None with all. With it the teacher
            may be one that knows no more, and only the student is computed in chunks.
        rest: what becomes of the teacher's other words under `top_k`: `spread` its mass evenly over them, `ignore` them
            on both sides, or one `bucket` for all (temperature 1 only).

    Raises:
        UserError: a setting is out of its range, the vocabularies differ, or `chunk` is asked of other networks.
    """

    streams = {"labelled": ("tokens", "labels")}

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        *,
        divergence: SparseDivergence = "forward",
        temperature: float = 1.0,
        ratio: float = 1.0,
        beta: float = 0.5,
        skew: float = 0.1,
        chunk: int | None = None,
        top_k: int | None = None,
        rest: Rest = "spread",
    ) -> None:
        super().__init__()
        require_positive(
            temperature=temperature, chunk=1 if chunk is None else chunk, top_k=1 if top_k is None else top_k
        )
        require_share(ratio=ratio, beta=beta, skew=skew)
        require_same_vocabulary(student, teacher)
        for setting, value, known in (("divergence", divergence, SparseDivergence), ("rest", rest, Rest)):
            if value not in get_args(known):
                raise UserError(f"{setting} is '{value}'; choose one of {', '.join(get_args(known))}")
        if top_k is not None and top_k > (vocabulary_size(student) or top_k):
            raise UserError(f"top_k is {top_k} and the vocabulary has {vocabulary_size(student)} words; lower it")
        if top_k is not None and rest == "bucket" and temperature != 1:
            raise UserError(f"rest 'bucket' needs temperature 1, not {temperature}; take 'spread' or 'ignore'")
        if chunk is not None:
            require_output_layer(student, "student")
            if ratio > 0 and top_k is None:
                require_output_layer(getattr(teacher, "model", None), "teacher")
        self.student, self.teacher = student, teacher
        self.divergence, self.beta, self.skew, self.temperature = divergence, beta, skew, temperature
        self.chunk, self.top_k, self.rest = chunk, top_k, rest
        self.weights = {term: share for term, share in (("ce", 1 - ratio), ("kd", ratio)) if share > 0}

    def training_step(self, batch: Batch) -> Losses:
        return self._whole(batch["labelled"]) if self.chunk is None else self._in_chunks(batch["labelled"], self.chunk)

    def _whole(self, labelled: Fields) -> Losses:
        """From whole logits."""
        student_BLV, labels_BL = shift(self.student(labelled["tokens"]), labelled["labels"])
        settings: dict[str, Any] = {"temperature": self.temperature, "scale_by_t2": True}
        losses = {}
        if "ce" in self.weights:
            losses["ce"] = token_cross_entropy(student_BLV, labels_BL, reduction="token_mean")
        if "kd" in self.weights and self.top_k is None:
            teacher_BLV, _ = shift(self.teacher.logits(labelled, "tokens"), labelled["labels"])
            compare = divergence_named(self.divergence, self.beta, self.skew)
            losses["kd"] = token_divergence(
                compare, student_BLV, teacher_BLV, labels_BL, reduction="token_mean", **settings
            )
        elif "kd" in self.weights:
            settings |= {"rest": self.rest, "reduction": "none", **self._named()}
            items_BL = sparse_divergence(student_BLV, *self._known(labelled), **settings)
            losses["kd"] = reduce_tokens(items_BL, labels_BL, reduction="token_mean")
        return losses

    def _in_chunks(self, labelled: Fields, chunk: int) -> Losses:
        """The same from hidden states, `chunk` tokens at a time."""
        student = cast(CausalLM, self.student)
        hidden_BLD, labels_BL = shift(student.hidden(labelled["tokens"]), labelled["labels"])
        weight_VD, bias_V = student.head()
        settings: dict[str, Any] = {"student_bias_V": bias_V, "labels": labels_BL, "reduction": "token_mean"}
        losses = {}
        if "ce" in self.weights:
            losses["ce"] = linear_cross_entropy(hidden_BLD, weight_VD, chunk=chunk, **settings)
        if "kd" in self.weights:
            settings |= {"temperature": self.temperature, "scale_by_t2": True, "chunk": chunk, **self._named()}
            if self.top_k is None:
                teacher = cast(CausalLM, cast(Frozen, self.teacher).model)
                with torch.no_grad():
                    teacher_BLE, _ = shift(teacher.hidden(labelled["tokens"]), labelled["labels"])
                teacher_VE, teacher_V = teacher.head()
                losses["kd"] = linear_divergence(
                    hidden_BLD, weight_VD, teacher_BLE, teacher_VE, teacher_bias_V=teacher_V, **settings
                )
            else:
                losses["kd"] = linear_sparse_divergence(
                    hidden_BLD, weight_VD, *self._known(labelled), rest=self.rest, **settings
                )
        return losses

    def _named(self) -> dict[str, Any]:
        return {"divergence": self.divergence, "beta": self.beta, "skew": self.skew}

    def _known(self, labelled: Fields) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's likeliest words beside the student's places: ids, log-probabilities, the mass left."""
        top = self.teacher.top_k(labelled, "tokens", cast(int, self.top_k))
        return top.ids[:, :-1], top.log_probs[:, :-1], top.rest[:, :-1]

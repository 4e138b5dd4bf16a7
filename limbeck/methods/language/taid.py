"""TAID: the student learns from a target that drifts from itself to the teacher, at a pace set by its own loss.

Shing et al.: TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models,
ICLR 2025 (arXiv 2501.16937).

With z_S, z_T the logits of student and teacher for a scored token, sg no gradient, n such tokens in the batch:

    p_t = softmax((1 - t) sg(z_S) + t z_T)                     mixed in logits: p_t ~ q^(1-t) p^t
    L   = (1 / n) sum_i - sum_v p_t(v) log softmax(z_S)_v      (a cross-entropy: the target's entropy stays in)

After each optimiser step, with L detached, k steps taken before it and N planned:

    r = (L_prev - L) / (L_prev + 1e-15)        m <- beta m + (1 - beta) r
    t <- min(t_end, max(t_start + (t_end - t_start) k / N,  t + alpha sigmoid(m) (1 - t)))

The first step only sets L_prev. A student that learns fast is led to the teacher faster than the straight line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from limbeck.distributed import mean_across
from limbeck.errors import UserError, require_positive, require_share
from limbeck.losses import (
    linear_cross_entropy,
    linear_divergence,
    shift,
    token_cross_entropy,
    token_soft_cross_entropy,
    upcast,
)
from limbeck.models import CausalLM, require_output_layer, require_same_vocabulary
from limbeck.teachers import Frozen, Teacher
from limbeck.train import Batch, Losses, Method


def interpolate(student_logits_BLV: Tensor, teacher_logits_BLV: Tensor, t: Tensor) -> Tensor:
    """p_t = softmax((1 - t) sg(z_S) + t z_T), without gradient, in float32; t a scalar tensor in [0, 1].

    At t = 0 and t = 1 the other model is not looked at, so that its logits of -inf (words ruled out) make no NaN.
    Source: equation 3; the logits are mixed, not the probabilities.
    """
    student_BLV, teacher_BLV = upcast(student_logits_BLV.detach()), upcast(teacher_logits_BLV.detach())
    mixed_BLV = (1 - t) * student_BLV + t * teacher_BLV
    mixed_BLV = torch.where(t >= 1, teacher_BLV, torch.where(t <= 0, student_BLV, mixed_BLV))
    return mixed_BLV.softmax(-1)


def interpolated_loss(student_logits_BLV: Tensor, teacher_logits_BLV: Tensor, labels_BL: Tensor, t: Tensor) -> Tensor:
    """L of the file's top, over the labels that are not -100; logits and labels stand side by side (`shift`).

    The gradient into z_S is (q - p_t) / n, for the target has none. Words that the student rules out by a logit of -inf
    contribute 0, as in the official code.
    """
    target_BLV = interpolate(student_logits_BLV, teacher_logits_BLV, t)
    target_BLV = target_BLV.masked_fill(torch.isneginf(student_logits_BLV.detach()), 0.0)
    return token_soft_cross_entropy(student_logits_BLV, target_BLV, labels_BL, reduction="token_mean")


class Controller(nn.Module):
    """t, and what moves it: three scalars that stay on the device and in the checkpoint.

    Args:
        start, end: t_start <= t_end, in [0, 1].
        alpha, beta: step and momentum of the adaptive rule, in [0, 1].
        adaptive: False takes the straight line alone, the paper's ablation.
    """

    t: Tensor
    previous_loss: Tensor
    momentum: Tensor

    def __init__(self, start: float, end: float, alpha: float, beta: float, adaptive: bool = True) -> None:
        super().__init__()
        require_share(t_start=start, t_end=end, alpha=alpha, beta=beta)
        if start > end:
            raise UserError(f"t_start is {start} and t_end {end}; t goes from the student (0) to the teacher (1)")
        self.start, self.end, self.alpha, self.beta, self.adaptive = start, end, alpha, beta, adaptive
        self.register_buffer("t", torch.tensor(float(start)))
        self.register_buffer("previous_loss", torch.tensor(float("inf")))
        self.register_buffer("momentum", torch.tensor(0.0))

    @torch.no_grad()
    def update(self, loss: Tensor, step: int, steps: int) -> None:
        """Move t after the optimiser step number `step` (from 0) of `steps`, by that step's loss."""
        linear = self.start + (self.end - self.start) * step / steps
        first = self.previous_loss.isinf()
        relative = (self.previous_loss - loss) / (self.previous_loss + 1e-15)
        momentum = torch.where(first, self.momentum, self.beta * self.momentum + (1 - self.beta) * relative)
        if self.adaptive:
            moved = self.t + self.alpha * momentum.sigmoid() * (1 - self.t)
            moved = moved.clamp(min=linear, max=self.end)
        else:
            moved = torch.full_like(self.t, linear)
        self.t.copy_(torch.where(first, self.t, moved))
        self.momentum.copy_(momentum)
        self.previous_loss.copy_(loss)


class TAID(Method):
    """Distillation of a causal model into a smaller one of the same vocabulary.

    The controller moves once an optimiser step, by the mean loss of its accumulated batches over all processes; the
    official code moves it in every call of the loss, in validation too.

    Args:
        student: `tokens -> logits_BLV`, causal.
        teacher: gives logits of the same vocabulary.
        t_start, t_end: first and last share of the teacher in the target (the paper's t_start is 0.4 for Phi-3-mini to
            TinyLlama, 0.2 for its other pairs).
        alpha, beta: step and momentum of the adaptive rule.
        adaptive: False moves t along the straight line.
        ratio: share of this loss in [0, 1]; the labels have the rest.
        chunk: None computes whole logits; a number that many tokens at a time from hidden states, for vocabularies of
            100,000 words. The same losses; student and teacher must be causal transformers models in memory.

    Raises:
        UserError: a setting is out of its range, the vocabularies differ, or `chunk` is asked of other networks.
    """

    streams = {"labelled": ("tokens", "labels")}

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        *,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float = 5e-4,
        beta: float = 0.99,
        adaptive: bool = True,
        ratio: float = 1.0,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        require_share(ratio=ratio)
        require_same_vocabulary(student, teacher)
        if chunk is not None:
            require_positive(chunk=chunk)
            require_output_layer(student, "student")
            require_output_layer(getattr(teacher, "model", None), "teacher")
        self.student, self.teacher, self.chunk = student, teacher, chunk
        self.controller = Controller(t_start, t_end, alpha, beta, adaptive)
        self.weights = {"ce": 1 - ratio, "taid": ratio} if ratio < 1 else {"taid": 1.0}
        self.step_losses: list[Tensor] = []  # of the accumulated batches of one optimiser step

    def networks(self) -> list[nn.Module]:
        return [self.student]

    def training_step(self, batch: Batch) -> Losses:
        labelled = batch["labelled"]
        losses = self._whole(labelled) if self.chunk is None else self._in_chunks(labelled, self.chunk)
        self.step_losses.append(losses["taid"].detach())
        self.log(t=self.controller.t.clone())  # a copy: after the step the buffer holds the next t
        return losses

    def _whole(self, labelled: Mapping[str, Any]) -> Losses:
        """From whole logits."""
        teacher_BLV, _ = shift(self.teacher.logits(labelled, "tokens"), labelled["labels"])
        student_BLV, labels_BL = shift(self.student(labelled["tokens"]), labelled["labels"])
        losses = {"taid": interpolated_loss(student_BLV, teacher_BLV, labels_BL, self.controller.t)}
        if "ce" in self.weights:
            losses["ce"] = token_cross_entropy(student_BLV, labels_BL, reduction="token_mean")
        return losses

    def _in_chunks(self, labelled: Mapping[str, Any], chunk: int) -> Losses:
        """The same from hidden states, `chunk` tokens at a time."""
        student, teacher = cast(CausalLM, self.student), cast(CausalLM, cast(Frozen, self.teacher).model)
        with torch.no_grad():
            teacher_BLE, _ = shift(teacher.hidden(labelled["tokens"]), labelled["labels"])
        student_BLD, labels_BL = shift(student.hidden(labelled["tokens"]), labelled["labels"])
        (student_VD, student_V), (teacher_VE, teacher_V) = student.head(), teacher.head()
        settings: dict[str, Any] = {"student_bias_V": student_V, "reduction": "token_mean", "chunk": chunk}
        losses = {
            "taid": linear_divergence(
                student_BLD,
                student_VD,
                teacher_BLE,
                teacher_VE,
                divergence="taid",
                t=self.controller.t,
                teacher_bias_V=teacher_V,
                scale_by_t2=False,
                labels=labels_BL,
                **settings,
            )
        }
        if "ce" in self.weights:
            losses["ce"] = linear_cross_entropy(student_BLD, student_VD, labels_BL, **settings)
        return losses

    def after_step(self) -> None:
        loss = mean_across(torch.stack(self.step_losses).mean())
        self.step_losses.clear()
        self.controller.update(loss, self.clock.step, self.clock.steps)

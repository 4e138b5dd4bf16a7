"""FIRST: a student learns the teacher's five likeliest tokens, made honest by one number first.

Shum et al.: FIRST: Teach A Reliable Large Language Model Through Efficient Trustworthy Distillation, EMNLP 2024
(arXiv 2408.12168); SHUMKASHUN/FIRST.

    1. I_t, P_T(1..K): ids and probabilities of the teacher's K = 5 likeliest tokens at each place t whose next token
       belongs to the response, kept on disk.
    2. Trustworthy maximisation, with the c of the lowest calibration error on the validation split:
           P^(i) = exp(P_T(i) / c) / sum_{j <= K} exp(P_T(j) / c)
    3. Knowledge matching, with s_i = softmax(z_S)[I_t(i)] renormalised over the K:
           L = (1 / B) sum_samples sum_t sum_i P^(i) (log P^(i) - log s^(i))

No label is learned from; the validation split's choose c.

Shapes: B samples, L places, V words, K kept tokens, M = K or K + 1 entries that are matched, N places of the
validation split.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from limbeck.data import Data, Samples, Stream
from limbeck.data.language import IGNORE
from limbeck.errors import UserError, require_positive
from limbeck.labels import expected_calibration_error, grid_search
from limbeck.losses import reduce_tokens, upcast
from limbeck.models import TopK, require_same_vocabulary
from limbeck.teachers import Teacher
from limbeck.train import Bars, Batch, Losses, Method, Stage, Workspace

Norm = Literal["linear", "softmax", "other_token"]
EPSILON = 1e-6  # keeps logarithms finite


def first(
    ws: Workspace,
    data: Data,
    student: nn.Module,
    teacher: Teacher,
    *,
    validation_teacher: Teacher | None = None,
    train: Stage,
    top_k: int = 5,
    norm: Norm = "linear",
    recalibrate: bool = True,
    label_smoothing: float | None = None,
    mask: Literal["response", "text"] = "response",
) -> nn.Module:
    """Store the teacher's answers, find c, train the student.

    Args:
        student: `tokens -> logits_BLV`, causal. The linear and softmax norms say nothing of the K tokens' total mass:
            start from a model that can write, as the paper does, and train it gently, or take `other_token`.
        teacher: fine-tuned on the task, with the student's vocabulary; it is run once over each split.
        validation_teacher: where `teacher` is a store of the training split, the same teacher's store of the validation
            split.
        train: stream `labelled` of token rows.
        top_k: K.
        norm: how the student's K probabilities become a distribution (`student_log_probs`).
        recalibrate: False matches the probabilities as the teacher gave them.
        label_smoothing: the paper's rejected alternative to c (`smoothed`), with `recalibrate=False`.
        mask: `response` matches places that predict a response token; `text` those that predict the prompt too.

    Raises:
        UserError: an argument out of range, no validation split to find c on, or a store that answers for other
            samples.
    """
    if recalibrate and label_smoothing is not None:
        raise UserError("label_smoothing stands in place of the temperature; set recalibrate: false with it")
    check(top_k, norm, label_smoothing)
    samples = data.train if mask == "response" else _all_text(data.train)
    temperature = None
    if recalibrate:
        if data.validation is None:
            raise UserError(
                "first chooses its temperature on validation samples and the data have none; set "
                "data.validation_fraction, or recalibrate: false"
            )
        judge = ws.store(
            "cache-validation", validation_teacher or teacher, data.validation, field="tokens", top_k=top_k
        )
        temperature = calibrate(ws, judge, data.validation, top_k)
    stored = ws.store("cache", teacher, samples, field="tokens", top_k=top_k)
    method = FIRST(student, stored, temperature=temperature, top_k=top_k, norm=norm, label_smoothing=label_smoothing)
    return ws.fit("train", method, train.on(labelled=samples), train.trainer, validation=data.validation).student


# ---------------------------------------------------------------- trustworthy maximisation


def trustworthy(probabilities_K: Tensor, temperature: float) -> Tensor:
    """P^ = softmax(P / c) over the last dimension, P PROBABILITIES (not their logarithms) of the kept tokens.

    As P lies in [0, 1], two entries differ by a factor of e^(1/c) at most: c = 1 flattens already. c to infinity gives
    1/K each, c to 0 the likeliest alone; their order stays.
    """
    return (probabilities_K / temperature).softmax(-1)


def smoothed(probabilities_K: Tensor, amount: float) -> Tensor:
    """`amount` taken from the first (likeliest) entry and shared out evenly to the others: the same for every token."""
    others = probabilities_K.shape[-1] - 1
    share_K = torch.full_like(probabilities_K, amount / others)
    share_K[..., 0] = -amount
    return probabilities_K + share_K


def search_temperature(probabilities_NK: Tensor, correct_N: Tensor) -> tuple[Tensor, Tensor]:
    """The calibration error of P^'s first entry for every c of the two-stage grid: `(c_M, ece_M)`.

    correct_N: whether the teacher's likeliest token was right; no c changes which it is.
    """
    return grid_search(lambda c: expected_calibration_error(trustworthy(probabilities_NK, c)[:, 0], correct_N))


def calibrate(ws: Workspace, teacher: Teacher, validation: Samples, top_k: int) -> float:
    """c, found once; the report shows the search."""

    def search() -> dict[str, Tensor]:
        probabilities_NK, correct_N = judged(teacher, validation, top_k)
        c_M, ece_M = search_temperature(probabilities_NK, correct_N)
        return {"c": c_M, "ece": ece_M, "raw": expected_calibration_error(probabilities_NK[:, 0], correct_N)}

    found = ws.compute("calibration", search)
    best = int(found["ece"].argmin())
    c, ece = float(found["c"][best]), float(found["ece"][best])
    ws.measure("temperature", lambda: {"c": c, "ece": ece, "raw_ece": float(found["raw"])})
    errors = zip(found["c"].tolist(), found["ece"].tolist(), strict=True)
    ws.show(
        f"The teacher's calibration error on the validation split is lowest at c = {c:.2f}",
        Bars({"as it is": float(found["raw"]), **{f"c = {value:.2f}": error for value, error in errors}}),
    )
    return c


def judged(teacher: Teacher, samples: Samples, top_k: int, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """At all scored places: the teacher's K highest probabilities [N, K], and whether the first was right [N].

    Raises `UserError` where a stored teacher answered for other samples than these.
    """
    stream = Stream(samples, batch_size, shuffle=False, drop_last=False)
    stream.open("validation", seed=0)
    teacher.join({"validation": stream})
    probabilities, correct = [], []
    with torch.no_grad():
        for _ in range(stream.steps_per_epoch):
            fields = stream.render(stream.next())
            top, next_BL = teacher.top_k(fields, "tokens", top_k), fields["labels"][:, 1:]
            kept_BL = next_BL != IGNORE
            probabilities.append(top.log_probs[:, :-1][kept_BL].exp())
            correct.append(top.ids[:, :-1, 0][kept_BL] == next_BL[kept_BL])
    return torch.cat(probabilities), torch.cat(correct)


def _all_text(samples: Samples) -> Samples:
    """The samples with every token that is there scored, those of the prompt too."""
    tokens = samples.fields["tokens"]
    return samples.with_fields({"labels": tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORE)})


# ---------------------------------------------------------------- knowledge matching


def teacher_target(
    top: TopK, *, norm: Norm, temperature: float | None, label_smoothing: float | None = None, epsilon: float = EPSILON
) -> Tensor:
    """What the student is to match, float32 [..., M].

    With a temperature P^ (`trustworthy`), whatever the norm; without one the kept probabilities by the norm itself
    (`softmax` is then c = 1). `other_token` scales them to the kept mass and appends the rest, 1 - sum_K P, so that M
    is K + 1: P^ itself sums to 1 and would leave none.
    """
    probabilities = top.log_probs.exp()
    mass = probabilities.sum(-1, keepdim=True)
    if temperature is not None or norm == "softmax":
        target = trustworthy(probabilities, 1.0 if temperature is None else temperature)
    elif norm == "linear":
        target = (probabilities + epsilon) / (mass + epsilon * probabilities.shape[-1])
    else:
        target = probabilities / mass
    if label_smoothing is not None:
        target = smoothed(target, label_smoothing)
    return torch.cat([target * mass, top.rest[..., None]], -1) if norm == "other_token" else target


def student_log_probs(logits_BLV: Tensor, ids_BLK: Tensor, *, norm: Norm, epsilon: float = EPSILON) -> Tensor:
    """log s^, float32 [B, L, M]: the student's probabilities of the tokens that the teacher named, by the norm

    - `linear`: (s + epsilon) / sum_K (s + epsilon). Blind to the mass that the K have together: words outside of them
      get no gradient but for epsilon's.
    - `softmax`: softmax(s) of the probabilities; its entries differ by a factor of e at most, so that a target which is
      more peaked is never reached.
    - `other_token`: s, with 1 - sum_K s as entry K + 1, in the logarithm epsilon at least.
    """
    logits_BLV = upcast(logits_BLV)
    log_s_BLK = logits_BLV.gather(-1, ids_BLK) - logits_BLV.logsumexp(-1, keepdim=True)
    s_BLK = log_s_BLK.exp()
    if norm == "softmax":
        return s_BLK.log_softmax(-1)
    if norm == "linear":
        raised_BLK = s_BLK + epsilon
        return raised_BLK.log() - raised_BLK.sum(-1, keepdim=True).log()
    rest_BL1 = (1 - s_BLK.sum(-1, keepdim=True)).clamp(min=epsilon)
    return torch.cat([log_s_BLK, rest_BL1.log()], -1)


def matching_loss(log_s_BLM: Tensor, target_BLM: Tensor, next_BL: Tensor) -> Tensor:
    """KL(target || s), summed over the entries and the places of a sample whose `next` is no -100, averaged over ALL
    samples of the batch (the official code divides by the nominal batch size, and needs that many rows).

    A sample without a response counts as 0. Long responses weigh more than short ones, as in the paper.
    """
    items_BL = (torch.xlogy(target_BLM, target_BLM) - target_BLM * log_s_BLM).sum(-1)
    return reduce_tokens(items_BL, next_BL, reduction="sequence_sum")


class FIRST(Method):
    """The student on the teacher's kept tokens.

    Args:
        student: `tokens -> logits_BLV`, causal.
        teacher: stored or live, of the same vocabulary.
        temperature: c; None for the teacher's probabilities as they are.
        top_k, norm, label_smoothing: as in `first`.

    Raises:
        UserError: an argument is out of its range, or the vocabularies differ.
    """

    streams = {"labelled": ("tokens", "labels")}

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        *,
        temperature: float | None = None,
        top_k: int = 5,
        norm: Norm = "linear",
        label_smoothing: float | None = None,
    ) -> None:
        super().__init__()
        check(top_k, norm, label_smoothing)
        if temperature is not None:
            require_positive(temperature=temperature)
        require_same_vocabulary(student, teacher)
        self.student, self.teacher = student, teacher
        self.temperature, self.top_k, self.norm, self.label_smoothing = temperature, top_k, norm, label_smoothing

    def training_step(self, batch: Batch) -> Losses:
        labelled = batch["labelled"]
        top = self.teacher.top_k(labelled, "tokens", self.top_k)
        target_BLM = teacher_target(
            top, norm=self.norm, temperature=self.temperature, label_smoothing=self.label_smoothing
        )
        log_s_BLM = student_log_probs(self.student(labelled["tokens"]), top.ids, norm=self.norm)
        # Both speak at place t of token t + 1: no shift between them, the labels alone move.
        return {"match": matching_loss(log_s_BLM[:, :-1], target_BLM[:, :-1], labelled["labels"][:, 1:])}


def check(top_k: int, norm: str, label_smoothing: float | None) -> None:
    """Refuse what has no meaning, before the teacher is asked."""
    if norm not in get_args(Norm):
        raise UserError(f"norm is '{norm}'; choose one of {', '.join(get_args(Norm))}")
    if top_k < 2:
        raise UserError(f"top_k is {top_k}; the student learns how the teacher shares its mass, so give 2 or more")
    if label_smoothing is not None and not 0 <= label_smoothing <= 1 / top_k:
        raise UserError(  # the likeliest of K has 1 / K at least, and keeps what it does not share out
            f"label_smoothing is {label_smoothing}; with top_k={top_k} give a number from 0 to {1 / top_k:.3g}"
        )

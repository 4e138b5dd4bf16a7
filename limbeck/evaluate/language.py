"""How well a causal language model predicts text, and how far it is from a teacher.

Shapes: B rows, L tokens of a row, V words of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.data import Samples
from limbeck.data.language import IGNORE
from limbeck.errors import UserError
from limbeck.labels import expected_calibration_error
from limbeck.losses import kl_divergence, reduce_tokens, shift, token_cross_entropy, token_divergence, token_entropy
from limbeck.models import evaluating


@dataclass(frozen=True)
class LanguageEvaluator:
    """`evaluator(model, samples)`: the metrics of `language_metrics`, with this teacher where there is one."""

    teacher: nn.Module | None = None
    batch_size: int = 32

    def __call__(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        return language_metrics(model, samples, teacher=self.teacher, batch_size=self.batch_size)


def language_metrics(
    model: nn.Module, samples: Samples, *, teacher: nn.Module | None = None, batch_size: int = 32
) -> dict[str, float]:
    """Means over the scored tokens of all samples, each token counting once; q is the model's distribution of a token.

    - `nll`: -log q(token), in nats; `perplexity`: exp(nll); `accuracy`: share of tokens that q finds likeliest.
    - `bits_per_character`: sum of -log2 q(token) / characters that the tokens stand for; comparable over tokenizers.
    - `entropy`: of q, in nats. Low with a high nll means that the model is sure of the wrong things.
    - with a `teacher` (distribution p): `teacher_kl`, KL(p || q), and `teacher_nll`.
    - of classes that were put into words (a field `label`), where the first token of a response is the answer:
      `accuracy`, the share of rows whose answer q finds likeliest of all V; `ece`, the expected calibration error of
      its probability in 10 bins; `trust`, accuracy - ece (FIRST, Shum et al. 2024).

    The model runs in eval mode without gradients where its parameters are, batch by batch, so that the logits of all
    samples never lie in memory. `samples` have the fields that `load_language` gives.

    Raises:
        UserError: there are no samples, no scored tokens, or the samples lack a field.
    """
    missing = [field for field in ("tokens", "labels") if field not in samples.fields]
    if missing or not len(samples):
        got = f"no field '{missing[0]}', only {', '.join(samples.fields)}" if missing else "no rows"
        raise UserError(f"language models are evaluated on rows of tokens, and these samples have {got}")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    teacher = None if teacher is None else teacher.to(device)
    sums: dict[str, Tensor] = {}
    answers: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode(), evaluating(model):
        for rows in torch.arange(len(samples)).split(batch_size):
            batch = samples.batch(rows)
            tokens = {name: part.to(device) for name, part in batch["tokens"].items()}
            logits_BLV, labels_BL = shift(model(tokens), batch["labels"].to(device))
            for name, value in _sums(logits_BLV, labels_BL, teacher, tokens).items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()
            if "label" in samples.fields:
                answers.append(_answers(logits_BLV, labels_BL))
    count = float(sums.pop("tokens"))
    if count == 0:
        raise UserError("these samples have no scored tokens (all labels are -100); give text behind the prompts")
    means = {name: float(value) / count for name, value in sums.items()}
    metrics = {"nll": means["nll"], "perplexity": math.exp(min(means["nll"], 700.0))}
    if "characters" in samples.fields:
        characters = int(samples.fields["characters"].sum())
        metrics["bits_per_character"] = means["nll"] * count / math.log(2) / max(characters, 1)
    return metrics | means | (_trust(answers) if answers else {})


def _answers(logits_BLV: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Of the first scored place of each row: the top probability, and whether it is the right token's; both [B]."""
    row_B = torch.arange(len(labels_BL), device=labels_BL.device)
    first_B = (labels_BL != IGNORE).int().argmax(1)
    confidence_B, answer_B = logits_BLV[row_B, first_B].float().softmax(-1).max(-1)
    return confidence_B, (answer_B == labels_BL[row_B, first_B]).float()


def _trust(answers: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    confidence_N, correct_N = (torch.cat(parts) for parts in zip(*answers, strict=True))
    accuracy, ece = float(correct_N.mean()), float(expected_calibration_error(confidence_N, correct_N))
    return {"accuracy": accuracy, "ece": ece, "trust": accuracy - ece}


def _sums(
    logits_BLV: Tensor, labels_BL: Tensor, teacher: nn.Module | None, tokens: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Sums over the scored tokens of one batch, and how many these are; logits and labels stand side by side."""
    items_BL = {
        "nll": token_cross_entropy(logits_BLV, labels_BL, reduction="none"),
        "accuracy": (logits_BLV.argmax(-1) == labels_BL).float(),
        "entropy": token_entropy(logits_BLV, labels_BL, reduction="none"),
        "tokens": torch.ones_like(labels_BL, dtype=torch.float32),
    }
    if teacher is not None:
        with evaluating(teacher):
            teacher_BLV = teacher(tokens)[:, :-1]
        items_BL["teacher_nll"] = token_cross_entropy(teacher_BLV, labels_BL, reduction="none")
        items_BL["teacher_kl"] = token_divergence(kl_divergence, logits_BLV, teacher_BLV, labels_BL, reduction="none")
    return {name: reduce_tokens(items, labels_BL, reduction="none").sum() for name, items in items_BL.items()}

"""How well a causal language model predicts text, and how far it is from a teacher.

Shapes: B rows, L tokens of a row, V words of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.data import Samples
from limbeck.errors import UserError
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
    with torch.inference_mode(), evaluating(model):
        for rows in torch.arange(len(samples)).split(batch_size):
            batch = samples.batch(rows)
            tokens = {name: part.to(device) for name, part in batch["tokens"].items()}
            for name, value in _sums(model, teacher, tokens, batch["labels"].to(device)).items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()
    count = float(sums.pop("tokens"))
    if count == 0:
        raise UserError("these samples have no scored tokens (all labels are -100); give text behind the prompts")
    means = {name: float(value) / count for name, value in sums.items()}
    metrics = {"nll": means["nll"], "perplexity": math.exp(min(means["nll"], 700.0))}
    if "characters" in samples.fields:
        characters = int(samples.fields["characters"].sum())
        metrics["bits_per_character"] = means["nll"] * count / math.log(2) / max(characters, 1)
    return metrics | means


def _sums(model: nn.Module, teacher: nn.Module | None, tokens: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Sums over the scored tokens of one batch, and how many these are."""
    logits_BLV, labels_BL = shift(model(tokens), labels)
    items_BL = {
        "nll": token_cross_entropy(logits_BLV, labels_BL, reduction="none"),
        "accuracy": (logits_BLV.argmax(-1) == labels_BL).float(),
        "entropy": token_entropy(logits_BLV, labels_BL, reduction="none"),
        "tokens": torch.ones_like(labels_BL, dtype=torch.float32),
    }
    if teacher is not None:
        with evaluating(teacher):
            teacher_BLV, _ = shift(teacher(tokens), labels)
        items_BL["teacher_nll"] = token_cross_entropy(teacher_BLV, labels_BL, reduction="none")
        items_BL["teacher_kl"] = token_divergence(kl_divergence, logits_BLV, teacher_BLV, labels_BL, reduction="none")
    return {name: reduce_tokens(items, labels_BL, reduction="none").sum() for name, items in items_BL.items()}

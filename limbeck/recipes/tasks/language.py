"""Language modelling: text in, the next token out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from limbeck.data import Data, LanguageData, Samples, load_language
from limbeck.data.language import IGNORE
from limbeck.errors import UserError
from limbeck.evaluate import LanguageEvaluator
from limbeck.models import CausalLM, generate, load_language_model, vocabulary_size
from limbeck.recipes.tasks.task import Evaluator, Task
from limbeck.report import texts_figure
from limbeck.teachers import Frozen

SHOWN, NEW = 3, 160  # prompts in a report, and most new tokens after each


class Language(Task):
    """How well a causal model predicts held-out text, and how far it is from its teacher."""

    name = "language-modelling"
    columns = (
        "nll", "accuracy", "ece", "trust", "perplexity", "bits_per_character", "teacher_kl", "entropy", "parameters",
        "latency_ms", "seconds",
    )  # fmt: skip
    load_data = staticmethod(load_language)
    load_model = staticmethod(load_language_model)

    def shape(self, data: Data, section: str) -> dict[str, Any]:
        data = cast(LanguageData, data)
        return {
            "vocab_size": data.vocab_size, "max_length": data.max_length, "eos_id": data.tokenizer.eos_token_id,
        }  # fmt: skip

    def attach(self, data: Data, networks: Mapping[str, Any]) -> Data:
        """Checks the networks' vocabularies, and keeps the teacher, whom students are compared with."""
        data = cast(LanguageData, data)
        teacher = networks.get("teacher")
        frozen = teacher.model if isinstance(teacher, Frozen) else None
        for section, network in {**networks, "teacher": frozen}.items():
            words = vocabulary_size(network) if isinstance(network, nn.Module) else None
            if words is not None and words < data.vocab_size:
                raise UserError(
                    f"the {section} knows {words} tokens and the data's tokenizer gives {data.vocab_size}; set "
                    "data.tokenizer to that model's own"
                )
        return replace(data, teacher=frozen)

    def save_beside(self, data: Data, folder: Path) -> None:
        """The tokenizer, for `AutoTokenizer.from_pretrained`."""
        cast(LanguageData, data).tokenizer.save_pretrained(folder)

    def view_field(self, samples: Samples) -> str:
        return "tokens"

    def example(self, data: Data, rows: int = 1) -> dict[str, Tensor]:
        return {"input_ids": data.test.batch(torch.arange(rows))["tokens"]["input_ids"]}

    def evaluator(self, data: Data) -> Evaluator:
        return LanguageEvaluator(teacher=cast(LanguageData, data).teacher)

    def exhibits(self, model: nn.Module, data: Data) -> dict[str, Figure]:
        data = cast(LanguageData, data)
        writers = {"student": model, **({} if data.teacher is None else {"teacher": data.teacher})}
        if not all(isinstance(writer, CausalLM) for writer in writers.values()):
            return {}
        prompts = _prompts(data)
        new = min(NEW, data.max_length - prompts["input_ids"].shape[1])
        written = {
            name: data.decode(_responses(writer, prompts, new, data.tokenizer)) for name, writer in writers.items()
        }
        shown = data.decode(prompts["input_ids"])
        return {"What the models write after the beginnings of test rows": texts_figure(shown, written)}


TASK = Language()


def _prompts(data: LanguageData) -> dict[str, Tensor]:
    """The prompts of the first test rows as models read them, or the first quarter of rows that have none."""
    rows = data.test.batch(torch.arange(min(SHOWN, len(data.test))))
    if "prompt" not in rows:
        return {name: part[:, : max(1, part.shape[1] // 4)] for name, part in rows["tokens"].items()}
    lengths = (rows["labels"] != IGNORE).int().argmax(1).tolist()
    ids = [ids_L[:length] for ids_L, length in zip(rows["tokens"]["input_ids"], lengths, strict=True)]
    padded = {"input_ids": (ids, data.tokenizer.pad_token_id), "attention_mask": ([torch.ones_like(i) for i in ids], 0)}
    return {  # padding on the left: the models go on at the end
        name: torch.stack([F.pad(part, (max(lengths) - len(part), 0), value=filler) for part in parts])
        for name, (parts, filler) in padded.items()
    }


def _responses(model: nn.Module, prompts: Mapping[str, Tensor], new: int, tokenizer: Any) -> Tensor:
    """The new tokens, the prompt's places filled with padding."""
    drawn = generate(
        model.cpu(), prompts, max_new_tokens=new, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return drawn.labels.masked_fill(drawn.labels < 0, tokenizer.pad_token_id)

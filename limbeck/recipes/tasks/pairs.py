"""Sentence pairs: two sentences in, how alike they are out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from limbeck.data import Data, Pairs, Samples, load_pairs
from limbeck.evaluate import PairEvaluator, predict_pairs
from limbeck.models import BiEncoder, CrossEncoder, load_encoder, measure_cost
from limbeck.models.encoders import check_fit
from limbeck.recipes.tasks.task import Evaluator, Task
from limbeck.report import draw, extreme_rows, retrieval_rows, score_plot

QUERIES, SENTENCES = 5, 300  # of the retrieval table in a report


class SentencePairs(Task):
    """Rank correlation of a bi- or cross-encoder's scores with the labels; costs are those of one text or pair."""

    name = "sentence-pairs"
    columns = ("spearman", "pearson", "auc", "parameters", "latency_ms", "seconds")
    load_data = staticmethod(load_pairs)
    load_model = staticmethod(load_encoder)

    def shape(self, data: Data, section: str) -> dict[str, Any]:
        data = cast(Pairs, data)
        # Committees may read by several tokenizers; one with another vocabulary gives its own size in the recipe.
        return {"vocab_size": max(len(reader) for reader in data.tokenizers), "max_length": data.max_length}

    def attach(self, data: Data, networks: Mapping[str, Any]) -> Data:
        """Checks that every encoder has the words and positions of the texts that it will read."""
        data = cast(Pairs, data)
        for section, network in networks.items():
            if isinstance(network, BiEncoder | CrossEncoder):
                reader = data.tokenizers[-1 if section.startswith("peer") else 0]
                check_fit(section, network.model, len(reader), data.max_length)
        return data

    def save_beside(self, data: Data, folder: Path) -> None:
        """The tokenizer, for `AutoTokenizer.from_pretrained`."""
        cast(Pairs, data).tokenizers[0].save_pretrained(folder)

    def view_field(self, samples: Samples) -> str:
        return "tokens"

    def example(self, data: Data, rows: int = 1) -> dict[str, Tensor]:
        return data.test.batch(torch.arange(rows))["tokens_a"]

    def evaluator(self, data: Data) -> Evaluator:
        return PairEvaluator()

    def metrics(self, model: nn.Module, data: Data) -> dict[str, float]:
        found = super().metrics(model, data)
        if isinstance(model, BiEncoder):
            return found
        cost = measure_cost(model, data.test.batch(torch.arange(1))["tokens"])
        return {**found, "flops": cost.flops, "latency_ms": cost.latency_ms}

    def exhibits(self, model: nn.Module, data: Data) -> dict[str, Figure]:
        test = data.test.select(torch.arange(min(len(data.test), 1000)))
        scores_N = predict_pairs(model, test)
        shown = {}
        if "score" in test.fields:
            shown["Scores of the test pairs against their labels"] = score_plot(scores_N, test.fields["score"])
        if isinstance(model, BiEncoder):
            shown["Test sentences and their nearest neighbours"] = draw(_neighbours(model, test))
        else:
            rows = extreme_rows(test.fields["text_a"], test.fields["text_b"], scores_N)
            shown["The test pairs with the highest and lowest scores"] = draw(rows)
        return shown


def _neighbours(model: BiEncoder, test: Samples) -> Any:
    queries = _distinct(test.fields["text_a"], QUERIES)
    sentences = _distinct(test.fields["text_b"], SENTENCES)
    with torch.no_grad():
        query_embeddings = model(test.batch(torch.tensor(queries))["tokens_a"])
        embeddings = model(test.batch(torch.tensor(sentences))["tokens_b"])
    texts_a, texts_b = test.fields["text_a"], test.fields["text_b"]
    return retrieval_rows([texts_a[q] for q in queries], query_embeddings, [texts_b[s] for s in sentences], embeddings)


def _distinct(texts: list[str], count: int) -> list[int]:
    """The rows of the first `count` texts that differ from all before them."""
    first: dict[str, int] = {}
    for row, text in enumerate(texts):
        first.setdefault(text, row)
    return list(first.values())[:count]


TASK = SentencePairs()

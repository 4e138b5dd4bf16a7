"""Sentence pairs: with a score or a class, as both forms of encoder read them, and pools of them without labels.

Shapes: N pairs, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.data.samples import Data, Samples
from limbeck.data.sources import load_data
from limbeck.data.text import tokenize
from limbeck.data.tokenizers import WORDPIECE, check_length, load_tokenizer
from limbeck.errors import UserError

FIRST = ("text_a", "sentence1", "premise", "question1", "question")
SECOND = ("text_b", "sentence2", "hypothesis", "question2", "sentence")
SCORE = ("score", "relatedness", "similarity")
LABEL = ("label", "entailment")
TOKENS = ("tokens_a", "tokens_b", "tokens", "tokens_swapped")
SWAPPED = {
    "text_a": "text_b", "text_b": "text_a", "tokens_a": "tokens_b", "tokens_b": "tokens_a",
    "tokens": "tokens_swapped", "tokens_swapped": "tokens",
}  # fmt: skip

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Pairs(Data):
    """A data set of sentence pairs. `unlabelled` is the pool; `sentences` are its distinct sentences, with the field
    `tokens`; `tokenizers` are those that the fields were read by, one a reader; `max_length` is the most tokens."""

    sentences: Samples | None = None
    tokenizers: tuple[Any, ...] = ()
    max_length: int = 64


def load_pairs(
    name_or_path: str | Path | Mapping[str, Any],
    *,
    pool: Sequence[str] | None = None,
    pool_splits: Sequence[Split] = ("train", "validation", "test"),
    tokenizer: str | Sequence[str] = WORDPIECE,
    vocab_size: int = 4000,
    max_length: int = 32,
    pair_max_length: int = 64,
    score_range: tuple[float, float] | None = None,
    limit: int | Mapping[str, int] | None = None,
    seed: int = 0,
) -> Pairs:
    """Sentence pairs of this name, path or content (see `load_data`), tokenised for both forms of encoder.

    The samples have the texts `text_a` and `text_b`; the tokens `tokens_a`, `tokens_b` (each sentence by itself),
    `tokens` (the joint pair a, b) and `tokens_swapped` (b, a); the `score`, scaled to [0, 1]; and the class `label`,
    where the set has them. Usual column names are known (sentence1, premise, relatedness, entailment, ...).

    The pool `unlabelled` is the union of the pairs of several sets without score and label, a pair that occurs again
    (in either order) only once. With the default splits it holds the pairs of the test split too: the system is
    transductive, sees the test's sentences but none of its labels, and a benchmark must say so;
    `pool_splits: [train]` keeps the test unseen.

    Args:
        pool: names or paths of the sets that make the pool; by default this set alone.
        pool_splits: the splits that go into the pool.
        tokenizer: `hf:<hub id or folder>`, a folder, `package:<package>`, or `wordpiece`, one trained on the pool's
            sentences before `limit`. A list has one for each reader, for committees of models with different
            vocabularies: the fields of the second are `tokens.1` and so on, see `read_by`.
        vocab_size: of a trained tokenizer.
        max_length, pair_max_length: most tokens of a sentence and of a pair; the longer sentence is cut first.
        score_range: what becomes 0 and 1; by default the smallest and largest score of all splits.
        limit: most samples of each split (`unlabelled` is the pool, `sentences` its sentences), or of those named,
            drawn by `seed`.

    Raises:
        UserError: no columns of sentences, or neither score nor class; more tokens than the tokenizer's model reads.
    """
    data = load_data(name_or_path, seed=seed)
    splits = _scaled(_splits_of(data), score_range)
    sets = [splits] if pool is None else [_splits_of(load_data(name, seed=seed)) for name in pool]
    union = distinct_pairs([each[split] for each in sets for split in pool_splits if split in each])
    names = [tokenizer] if isinstance(tokenizer, str) else list(tokenizer)
    sentences = sorted({*union.fields["text_a"], *union.fields["text_b"]})
    readers = [load_tokenizer(name, texts=sentences, vocab_size=vocab_size) for name in names]
    for reader in readers:
        check_length(reader, max_length, "max_length")
        check_length(reader, pair_max_length, "pair_max_length")
    every = {**splits, "unlabelled": union, "sentences": Samples({"text": sentences})}
    every = {name: _limited(samples, name, limit, seed) for name, samples in every.items()}
    alone = every.pop("sentences")
    every = {name: tokenize_pairs(samples, readers, max_length, pair_max_length) for name, samples in every.items()}
    for number, reader in enumerate(readers):
        alone = tokenize(alone, reader, max_length, into=_field("tokens", number))
    longest = max(max_length, pair_max_length)
    return Pairs(**every, name=data.name, sentences=alone, tokenizers=tuple(readers), max_length=longest)


def tokenize_pairs(samples: Samples, tokenizers: Sequence[Any], max_length: int, pair_max_length: int) -> Samples:
    """The samples with the fields `tokens_a`, `tokens_b`, `tokens` and `tokens_swapped` of every tokenizer."""
    for number, reader in enumerate(tokenizers):
        for into, first, second, length in (
            ("tokens_a", "text_a", None, max_length),
            ("tokens_b", "text_b", None, max_length),
            ("tokens", "text_a", "text_b", pair_max_length),
            ("tokens_swapped", "text_b", "text_a", pair_max_length),
        ):
            samples = tokenize(samples, reader, length, field=first, pair=second, into=_field(into, number))
    return samples


def distinct_pairs(sets: Sequence[Samples]) -> Samples:
    """The union of several sets of pairs without score and label, each pair once; (b, a) is the pair (a, b) again.

    The first occurrence stays; `index` counts anew.
    """
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for samples in sets:
        for a, b in zip(samples.fields["text_a"], samples.fields["text_b"], strict=True):
            found.setdefault((min(a, b), max(a, b)), (a, b))
    if not found:
        raise UserError("the pool has no pairs; name sets and splits that have some")
    first, second = zip(*found.values(), strict=True)
    return Samples({"text_a": list(first), "text_b": list(second)})


def both_orders(samples: Samples) -> Samples:
    """Every pair as (a, b) and, in the rows N to 2N - 1, as (b, a), with all its other fields the same.

    A cross-encoder that is trained on both has no reason to prefer an order. Not for tasks whose order matters.
    """

    def source(name: str) -> str:
        base, dot, reader = name.partition(".")
        return f"{SWAPPED.get(base, base)}{dot}{reader}"

    fields = {name: _joined(value, samples.fields[source(name)]) for name, value in samples.fields.items()}
    return Samples(fields, samples.classes)


def read_by(samples: Samples, reader: int) -> Samples:
    """The samples with the tokens of this reader under the plain names; all readers share a single tokenizer."""
    own = {name: _field(name, reader) for name in TOKENS if _field(name, reader) in samples.fields}
    return samples.with_fields({name: samples.fields[source] for name, source in own.items()}) if reader else samples


def _field(name: str, reader: int) -> str:
    return f"{name}.{reader}" if reader else name


def _splits_of(data: Data) -> dict[str, Samples]:
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: _named(samples, name) for name, samples in splits.items() if samples is not None}


def _named(samples: Samples, split: str) -> Samples:
    """The columns under our names."""
    fields = dict(samples.fields)
    for ours, known in (("text_a", FIRST), ("text_b", SECOND), ("score", SCORE), ("label", LABEL)):
        there = next((name for name in known if name in fields), None)
        if there is not None:
            fields[ours] = fields.pop(there)
    if "score" not in fields and isinstance(fields.get("label"), Tensor) and fields["label"].is_floating_point():
        fields["score"] = fields.pop("label")
    for ours, known in (("text_a", FIRST), ("text_b", SECOND)):
        if not isinstance(fields.get(ours), list):
            raise UserError(
                f"the split '{split}' has no column of sentences named {', '.join(known)}, it has "
                f"{', '.join(samples.fields)}; rename one"
            )
    return Samples(fields, samples.classes)


def _scaled(splits: dict[str, Samples], score_range: tuple[float, float] | None) -> dict[str, Samples]:
    """Scores from 0 to 1."""
    scores = [samples.fields["score"] for samples in splits.values() if "score" in samples.fields]
    if not scores:
        if all("label" in samples.fields for samples in splits.values()):
            return splits
        raise UserError(
            f"the pairs have no column named {', '.join(SCORE)} or {', '.join(LABEL)} to measure models on; rename one"
        )
    low, high = score_range or (min(float(s.min()) for s in scores), max(float(s.max()) for s in scores))
    if not low < high:
        raise UserError(f"the scores go from {low} to {high}; give a score_range with the smaller number first")

    def scaled(samples: Samples) -> Samples:
        if "score" not in samples.fields:
            return samples
        return samples.with_fields({"score": (samples.fields["score"].float() - low) / (high - low)})

    return {name: scaled(samples) for name, samples in splits.items()}


def _limited(samples: Samples, split: str, limit: int | Mapping[str, int] | None, seed: int) -> Samples:
    count = limit.get(split) if isinstance(limit, Mapping) else limit
    if count is None or count >= len(samples):
        return samples
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return samples.select(order[:count].sort().values)


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, dict):  # of different widths: zeros that the attention mask covers
        width = max(next(iter(part.values())).shape[1] for part in (first, second))
        wide = [{name: F.pad(t, (0, width - t.shape[1])) for name, t in part.items()} for part in (first, second)]
        return {name: torch.cat([wide[0][name], wide[1][name]]) for name in first}
    return [*first, *second]

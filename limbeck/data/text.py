"""Texts to tokens. Shapes: N samples, L tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from limbeck.data.samples import Samples
from limbeck.errors import UserError

BLOCK = 10_000  # texts a call of the tokenizer: bounds what its Python lists take


def tokenize(
    samples: Samples,
    tokenizer: Callable[..., Mapping],
    max_length: int,
    *,
    field: str = "text",
    pair: str | None = None,
    into: str = "tokens",
) -> Samples:
    """The samples with a field `into`: the dict of int64 [N,L] tensors that the tokenizer gives for `field`.

    L is the longest text's length, at most `max_length` (what is beyond is cut off). `pair` names a second
    field of texts for tasks on pairs. `tokenizer` is called as those of transformers are: `tokenizer(texts,
    padding="max_length", truncation=True, max_length=...)`; padding beyond the longest text is cut off again,
    on the side where the tokenizer puts it.

    Raises `UserError` where a field of texts is missing.
    """
    columns = []
    for name in [field] if pair is None else [field, pair]:
        texts = samples.fields.get(name)
        if not isinstance(texts, list):
            raise UserError(f"There is no field of texts {name!r}: the samples have {', '.join(samples.fields)}.")
        columns.append(texts)
    blocks: list[Mapping] = []
    for start in range(0, len(samples), BLOCK):
        texts = [column[start : start + BLOCK] for column in columns]
        blocks.append(tokenizer(*texts, padding="max_length", truncation=True, max_length=max_length))
    tokens = {name: torch.cat([torch.as_tensor(block[name]) for block in blocks]) for name in blocks[0]}
    if "attention_mask" in tokens:
        used = tokens["attention_mask"].any(0)
        tokens = {name: part[:, used].contiguous() for name, part in tokens.items()}
    return samples.with_fields({into: tokens})  # type: ignore[dict-item]

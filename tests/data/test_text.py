import pytest
import torch

from limbeck.data import Samples, text, tokenize
from limbeck.errors import UserError


class Letters:
    """A tokenizer with one token a letter, called as those of transformers are."""

    def __init__(self, side="right"):
        self.side = side

    def __call__(self, texts, pairs=None, *, padding, truncation, max_length):
        rows = [
            [ord(letter) for letter in a + b][:max_length]
            for a, b in zip(texts, pairs or [""] * len(texts), strict=True)
        ]
        empty = [[0] * (max_length - len(row)) for row in rows]
        joined = [e + r if self.side == "left" else r + e for e, r in zip(empty, rows, strict=True)]
        return {"input_ids": joined, "attention_mask": [[int(i > 0) for i in row] for row in joined]}


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_are_as_long_as_the_longest_text_and_no_longer_than_allowed(side, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 2)  # the blocks must fit together
    samples = Samples({"text": ["a", "abc", "ab"]})
    tokens = tokenize(samples, Letters(side), 8).fields["tokens"]
    assert tokens["input_ids"].shape == (3, 3) and tokens["input_ids"].dtype == torch.int64
    assert tokens["attention_mask"].sum(1).tolist() == [1, 3, 2]
    assert tokens["attention_mask"][0].tolist() == ([0, 0, 1] if side == "left" else [1, 0, 0])
    assert tokenize(samples, Letters(side), 2).fields["tokens"]["input_ids"].shape == (3, 2)


def test_pairs_are_joined_and_a_missing_field_is_named():
    samples = Samples({"first": ["a", "b"], "second": ["x", "yz"]})
    tokens = tokenize(samples, Letters(), 8, field="first", pair="second").fields["tokens"]
    assert tokens["input_ids"].tolist() == [[97, 120, 0], [98, 121, 122]]
    with pytest.raises(UserError, match="no field of texts 'text': the samples have first, second"):
        tokenize(samples, Letters(), 8)

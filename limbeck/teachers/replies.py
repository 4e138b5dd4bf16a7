"""What servers reply: log-probabilities of given tokens in two dialects, texts, and the numbers and rankings in texts.

The readers take a server's JSON and return the part that is kept; they raise ValueError for another shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from limbeck.errors import UserError

_FLOOR = -9999.0  # what servers send for minus infinity, which JSON lacks
_CEILING = 1e-3  # a log-probability above it is none
_TOKEN_ID = "token_id:"


# ---------------------------------------------------------------- log-probabilities of given tokens


def vllm_places(reply: Any, length: int) -> dict[str, list[list]]:
    """From a reply with `prompt_logprobs`: `{"tokens": ids by place, "log_probs": likewise}`, the likeliest first.

    The server's entry of place i is the distribution of token i given those before it; it has none for token 0. So
    `length` prompt tokens and one written token give `length` places, each the distribution AFTER a prompt token; one
    fewer where the server does not report the written one.
    """
    choice = reply["choices"][0]
    prompt = choice.get("prompt_logprobs")
    if not isinstance(prompt, list) or len(prompt) != length:
        raise ValueError(f"without prompt_logprobs of its {length} tokens (are they of this server's dialect?)")
    places = [{int(token): entry["logprob"] for token, entry in place.items()} for place in prompt[1:]]
    for place in _written(choice):
        places.append({_token_id(token): value for token, value in place.items()})
    return _kept(places)


def openai_places(reply: Any, length: int) -> dict[str, list[list]]:
    """From a reply with `echo` and `logprobs`: as `vllm_places`, with the tokens' texts in the place of their ids."""
    places = reply["choices"][0]["logprobs"]["top_logprobs"]
    if not length <= len(places):
        raise ValueError(
            f"log-probabilities of {len(places)} places, not of the {length} that were given (does this server give "
            "those of prompts?)"
        )
    return _kept([*places[1:length], *(place for place in places[length : length + 1] if place)])


def _written(choice: Mapping[str, Any]) -> list[dict[str, float]]:
    """The first written token's distribution, where it is reported."""
    places = (choice.get("logprobs") or {}).get("top_logprobs") or []
    return [place for place in places[:1] if place]


def _token_id(text: str) -> int:
    if not text.startswith(_TOKEN_ID):
        raise ValueError("tokens by their text, not by their id (does the server know return_tokens_as_token_ids?)")
    return int(text.removeprefix(_TOKEN_ID))


def _kept(places: list[dict]) -> dict[str, list[list]]:
    tokens: list[list] = []
    log_probs: list[list] = []
    for place in places:
        if not place:
            raise ValueError("a place without any log-probability")
        entries = sorted(((float(value), token) for token, value in place.items()), key=lambda entry: -entry[0])
        if not all(value <= _CEILING for value, _ in entries):
            raise ValueError("log-probabilities above 0")
        tokens.append([token for _, token in entries])
        log_probs.append([min(max(value, _FLOOR), 0.0) for value, _ in entries])
    return {"tokens": tokens, "log_probs": log_probs}


def ids_by_text(tokenizer: Any) -> dict[str, int]:
    """The token ids of a transformers tokenizer by what servers may call a token: its text, or its vocabulary's name.

    What several tokens may be called names none of them (halves of characters, mostly). A token's text is taken in the
    middle of a sentence, so that a space before a word belongs to it.
    """
    names = tokenizer.get_vocab()
    ids = sorted(names.values())
    anchor = next((i for i in ids if tokenizer.decode([i]).strip().isalnum()), ids[0])
    before = tokenizer.decode([anchor], clean_up_tokenization_spaces=False)
    texts = tokenizer.batch_decode([[anchor, i] for i in ids], clean_up_tokenization_spaces=False)
    called: dict[str, set[int]] = {name: {i} for name, i in names.items()}
    for i, text in zip(ids, texts, strict=True):
        called.setdefault(text.removeprefix(before), set()).add(i)
    return {text: next(iter(found)) for text, found in called.items() if text and "�" not in text and len(found) == 1}


def id_of(token: int | str, ids: Mapping[str, int] | None) -> int | None:
    """The id of a token that a server named; None for one that cannot be told.

    Raises `UserError` for a text where there is no tokenizer to look it up.
    """
    if isinstance(token, int):
        return token
    if token.startswith(_TOKEN_ID) and token[len(_TOKEN_ID) :].isdecimal():
        return int(token[len(_TOKEN_ID) :])
    if ids is None:
        raise UserError(
            f"the server names tokens by their texts ({token!r}); give the model's tokenizer, or serve it by vLLM and "
            "say dialect: vllm"
        )
    return ids.get(token)


# ---------------------------------------------------------------- texts


def texts(reply: Any, count: int, chat: bool) -> list[str]:
    """The texts of a completion's or a chat's choices, in order. A message without content is the empty text."""
    choices = sorted(reply["choices"], key=lambda choice: choice.get("index", 0))
    if len(choices) != count:
        raise ValueError(f"{len(choices)} texts, not {count}")
    found = [choice["message"].get("content") or "" if chat else choice["text"] for choice in choices]
    if not all(isinstance(text, str) for text in found):
        raise ValueError("texts that are none")
    return found


_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_LONE = re.compile(rf"(?<![\w.])({_NUMBER})(?!\w|\.\d)")
_LABELLED = re.compile(rf"\b(?:score|rating|grade)\b\W*?(?:is|of)?\W*?({_NUMBER})(?!\w|\.\d)", re.IGNORECASE)


def number_in(text: str, low: float, high: float) -> float | None:
    """The number that a text gives as its score between `low` and `high`; None where there is none or no telling which.

    Mentions of the scale are dropped first (`/10`, `out of 10`, `from 1 to 10`, `1-10`). Then: the last number that
    follows the word score, rating or grade; without such a word, the one number of the text that lies in the range
    (repeated or not).
    """
    lowest, highest = (rf"{re.escape(f'{bound:g}')}(?:\.0+)?(?!\.?\d)" for bound in (low, high))
    text = re.sub(rf"(?<![\w.]){lowest}\s*(?:-|–|to|and)\s*{highest}", " ", text)
    text = re.sub(rf"(?:/|\bof\b)\s*{highest}", " ", text)
    labelled = _LABELLED.findall(text)
    found = labelled[-1:] or _LONE.findall(text)
    inside = {float(number) for number in found if low <= float(number) <= high}
    return inside.pop() if len(inside) == 1 else None


def ranking_in(text: str, count: int) -> list[int] | None:
    """The order of `count` candidates in a text, the best first, from 0; None where the text holds no permutation.

    Candidates are called 1, 2, 3, ... or A, B, C, ..., with whatever between them (`2 > 1 > 3`, `[2, 1, 3]`,
    `B, A, C`, one a line behind the line's number). The last line that names each exactly once counts, or else the
    text as a whole.
    """
    lines = [_without_line_number(line) for line in text.splitlines()]
    for part in [*reversed(lines), "\n".join(lines)]:
        numbers = [int(number) - 1 for number in re.findall(r"(?<![\w.])\d+(?!\w|\.\d)", part)]
        letters = [ord(letter) - ord("A") for letter in re.findall(r"(?<!\w)[A-Z](?!\w)", part)]
        for order in (numbers, letters):
            if sorted(order) == list(range(count)):
                return order
    return None


def _without_line_number(line: str) -> str:
    """`1. B` and `1) [2]` without the number of the line; a line of nothing else stays."""
    numbered = re.match(r"\s*\d+[.)]\s+(.*(?:\d|\b[A-Z]\b).*)", line)
    return numbered[1] if numbered else line

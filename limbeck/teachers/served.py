"""A teacher behind HTTP: log-probabilities of given tokens, texts, scores and rankings of an OpenAI-compatible server.

Whatever is answered is kept in a folder and never asked again, see `limbeck.teachers.answers`.

Shapes: B rows, L tokens of a row, K words kept of the V words of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from limbeck.data.tokenizers import load_tokenizer
from limbeck.errors import UserError, require_positive
from limbeck.models import Outputs, TopK
from limbeck.teachers.asking import Asker, Request, Summary
from limbeck.teachers.endpoint import Endpoint
from limbeck.teachers.replies import id_of, ids_by_text, number_in, openai_places, ranking_in, texts, vllm_places
from limbeck.teachers.teacher import Teacher

T = TypeVar("T")

_AGAIN_TEMPERATURE = 0.7  # of questions put once more because the text could not be used: at 0 it would come again
_CHAT_OVERHEAD = 64  # tokens that a chat template may add to a prompt: for the budget's estimate alone


class Served(Teacher):
    """A language model behind an OpenAI-compatible endpoint.

    As a teacher it answers for `fields[view] = {"input_ids", "attention_mask"}` [B, L], padding on the right. The
    tokens are sent as ids: the server's model must have the student's tokenizer, and room for L + 1 tokens.

    Args:
        endpoint: the server, or its settings as a mapping.
        folder: where answers are kept; runs that name the same folder share them, and its budget.
        vocabulary: V, the words that `logits` are given for. Mass on ids beyond it (a padded output layer) counts as
            the rest.
        tokenizer: the model's, for servers that name tokens by their texts (dialect `openai`): a transformers
            tokenizer or what `load_tokenizer` takes. Tokens whose text names no single id are left in the rest.
        top_k: how many words are asked for at each place. Servers limit it: OpenAI to 5,
            vLLM to its `--max-logprobs` (20 by default).
        progress: show a bar while questions are under way.

    Raises `UserError` for settings that an endpoint does not have and for a top_k outside 1..vocabulary.
    """

    sparse = True

    def __init__(
        self,
        endpoint: Endpoint | Mapping[str, Any],
        folder: str | Path,
        *,
        vocabulary: int,
        tokenizer: Any = None,
        top_k: int = 5,
        progress: bool = False,
    ) -> None:
        if not 1 <= top_k <= vocabulary:
            raise UserError(f"top_k is {top_k}; give 1 to {vocabulary}, the vocabulary")
        self.endpoint = endpoint if isinstance(endpoint, Endpoint) else Endpoint.of(endpoint)
        self.vocabulary = vocabulary
        self.kept = top_k
        self._tokenizer = tokenizer
        self._asker = Asker(self.endpoint, folder, progress=progress)

    @property
    def summary(self) -> Summary:
        """What was asked, answered from the folder, retried and spent by this object."""
        return self._asker.summary

    def fingerprint(self) -> str:
        """SHA-256 of the model's name and the endpoint's `extra`; other weights behind the same name go unnoticed."""
        asked = {"model": self.endpoint.model, "extra": self.endpoint.extra}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    # ------------------------------------------------------------ log-probabilities of given tokens

    def __call__(self, fields: Mapping[str, Any], view: str) -> Outputs:
        """`logits` [B, L, V]: log-probabilities of the word after each token, see `top_k`."""
        return Outputs(logits=self.top_k(fields, view, self.kept).dense("spread"))

    def top_k(self, fields: Mapping[str, Any], view: str, k: int) -> TopK:
        """The k likeliest words after each token: `TopK` [B, L, k], row t the distribution after reading token t.

        Where the server gave fewer than k, the smallest ids that are left follow, each with an equal share of the mass
        that is left; `dense("spread")` is the same with or without them. Places of padding get the uniform
        distribution.

        Raises `UserError` for k above the `top_k` that is asked for, for padding on the left, and where `Asker.ask`
        does.
        """
        if k > self.kept:
            raise UserError(
                f"{k} words of each place are wanted and {self.kept} are asked for; raise the teacher's top_k"
            )
        ids_BL, lengths = _rows(fields, view)
        rows = [row[:length] for row, length in zip(ids_BL.tolist(), lengths, strict=True)]
        answers = iter(self._places([row for row in rows if row]))
        padding = self._place([], [], k)
        places = []
        for row in rows:
            answer = next(answers) if row else {"tokens": [], "log_probs": []}
            pairs = zip(answer["tokens"], answer["log_probs"], strict=True)
            given = [self._place(tokens, log_probs, k) for tokens, log_probs in pairs]
            places += given + [padding] * (ids_BL.shape[1] - len(row))
        shape, device = (*ids_BL.shape, k), ids_BL.device
        ids_BLK = torch.tensor([ids for ids, _ in places], dtype=torch.int64).view(shape)
        log_probs_BLK = torch.tensor([log_probs for _, log_probs in places], dtype=torch.float64).view(shape)
        rest_BL = (1 - log_probs_BLK.exp().sum(-1)).clamp(0, 1)
        return TopK(ids_BLK.to(device), log_probs_BLK.float().to(device), rest_BL.float().to(device), self.vocabulary)

    def _places(self, rows: list[list[int]]) -> list[dict[str, list[list]]]:
        """What the server said of each row: tokens and log-probabilities of len(row) places."""
        answers = self._asker.ask([self._given(row) for row in rows])
        # A server that stops at the end token may report no distribution for it: any one token more brings it.
        short = [i for i, row in enumerate(rows) if len(answers[i]["tokens"]) < len(row)]
        longer = self._asker.ask([self._given([*rows[i], rows[i][-1]]) for i in short])
        for i, answer in zip(short, longer, strict=True):
            answers[i] = {name: places[: len(rows[i])] for name, places in answer.items()}
        return answers

    def _given(self, row: list[int]) -> Request:
        """The request for log-probabilities after each token of a row."""
        # Some servers apply the temperature before they take log-probabilities: 1 leaves them as they are.
        body: dict[str, Any] = {"prompt": row, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "logprobs": self.kept}
        if self.endpoint.dialect == "vllm":
            body |= {"prompt_logprobs": self.kept, "return_tokens_as_token_ids": True}
            return self._request("completions", body, partial(vllm_places, length=len(row)), len(row), 1)
        body |= {"echo": True}
        return self._request("completions", body, partial(openai_places, length=len(row)), len(row), 1)

    def _place(self, tokens: list, log_probs: list[float], k: int) -> tuple[list[int], list[float]]:
        """Exactly k ids of the vocabulary and their log-probabilities, the likeliest first, of one place."""
        if len(tokens) >= k and all(type(token) is int and token < self.vocabulary for token in tokens[:k]):
            return tokens[:k], log_probs[:k]
        named = zip([id_of(token, self._ids) for token in tokens], log_probs, strict=True)
        found = {i: value for i, value in named if i is not None and 0 <= i < self.vocabulary}
        if len(found) < k:
            rest = max(1 - sum(map(math.exp, found.values())), torch.finfo(torch.float32).tiny)
            share = math.log(rest / (self.vocabulary - len(found)))
            others = (i for i in range(self.vocabulary) if i not in found)
            found |= {next(others): share for _ in range(k - len(found))}
        best = sorted(found.items(), key=lambda item: -item[1])[:k]
        return [i for i, _ in best], [value for _, value in best]

    @cached_property
    def _ids(self) -> dict[str, int] | None:
        if self._tokenizer is None:
            return None
        return ids_by_text(load_tokenizer(self._tokenizer) if isinstance(self._tokenizer, str) else self._tokenizer)

    # ------------------------------------------------------------ texts

    def complete(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        n: int = 1,
        seed: int | None = None,
    ) -> list[list[str]]:
        """`n` texts for each prompt, by `/chat/completions` where the endpoint says `chat`, else by `/completions`.

        The same question always gets the answer that is kept; other texts for it come with another `seed`.

        Raises `UserError` for prompts that are no texts, and where `Asker.ask` does.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError("complete() takes a list of texts, one a prompt")
        require_positive(max_tokens=max_tokens, n=n)
        settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "n": n}
        settings |= {"stop": list(stop)} if stop else {}
        settings |= {"seed": seed} if seed is not None else {}
        return self._asker.ask([self._text_request(prompt, settings) for prompt in prompts])

    def _text_request(self, prompt: str, settings: Mapping[str, Any]) -> Request:
        chat, n = self.endpoint.chat, settings["n"]
        asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        # No token of a byte-level vocabulary is shorter than a byte.
        most = len(prompt.encode("utf-8", "replace")) + (_CHAT_OVERHEAD if chat else 1)
        kind = "chat/completions" if chat else "completions"
        read = partial(texts, count=n, chat=chat)
        return self._request(kind, {**asked, **settings}, read, most, settings["max_tokens"] * n)

    def score(
        self,
        prompts: Sequence[str],
        low: float,
        high: float,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        attempts: int = 3,
    ) -> list[float | None]:
        """The score in low..high that the text for each prompt gives, by `number_in`'s rule.

        A prompt whose text gives none is asked again, up to `attempts` times in all, at temperature 0.7 or more and
        with another seed; None where none of the texts gives one.
        """
        read = partial(number_in, low=low, high=high)
        return self._parsed(prompts, read, max_tokens, temperature, attempts)

    def rank(
        self,
        prompts: Sequence[str],
        candidates_count: int,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        attempts: int = 3,
    ) -> list[list[int] | None]:
        """The order of the candidates 0..candidates_count-1, best first, that the text for each prompt gives.

        The prompts call them 1, 2, 3, ... or A, B, C, ...; the text is read by `ranking_in`'s rule, and asked for again
        as `score` does; None where none of the texts is a permutation.
        """
        read = partial(ranking_in, count=candidates_count)
        return self._parsed(prompts, read, max_tokens, temperature, attempts)

    def _parsed(
        self,
        prompts: Sequence[str],
        read: Callable[[str], T | None],
        max_tokens: int,
        temperature: float,
        attempts: int,
    ) -> list[T | None]:
        require_positive(attempts=attempts)
        found: list[T | None] = [None] * len(prompts)
        left = list(range(len(prompts)))
        for attempt in range(attempts):
            hot = temperature if attempt == 0 else max(temperature, _AGAIN_TEMPERATURE)
            asked = [prompts[i] for i in left]
            answers = self.complete(asked, max_tokens=max_tokens, temperature=hot, seed=attempt)
            for i, (text,) in zip(left, answers, strict=True):
                found[i] = read(text)
            left = [i for i in left if found[i] is None]
            if not left:
                break
        return found

    def _request(
        self, kind: str, body: Mapping[str, Any], read: Callable[[Any], Any], prompt_tokens: int, written_tokens: int
    ) -> Request:
        asked = {"model": self.endpoint.model, **body, **self.endpoint.extra}
        asked = {name: value for name, value in asked.items() if value is not None}
        return Request(kind, asked, read, prompt_tokens, written_tokens)


def _rows(fields: Mapping[str, Any], view: str) -> tuple[Tensor, list[int]]:
    """The token ids [B, L] of a view and the length of each row without its padding."""
    tokens = fields.get(view)
    if not isinstance(tokens, Mapping) or "input_ids" not in tokens:
        raise UserError(f"a served teacher reads tokens ({{'input_ids', 'attention_mask'}}); '{view}' holds none")
    ids_BL = tokens["input_ids"]
    mask_BL = tokens.get("attention_mask", torch.ones_like(ids_BL)).bool()
    if bool((mask_BL[:, 1:] & ~mask_BL[:, :-1]).any()):
        raise UserError("a served teacher reads rows with their padding on the right; these have it on the left")
    return ids_BL, mask_BL.sum(1).tolist()

"""An OpenAI-compatible endpoint: where it is, what may be spent there, and one request sent to it.

The key is read from the environment while a request is being sent, and lives nowhere else: no attribute, no local of
a frame that a traceback can show, no message.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from limbeck.errors import UserError, require_positive

Dialect = Literal["openai", "vllm"]

_RETRIED = {408, 429}  # and every 5xx
_SHORTEST_KEY = 8  # characters; fewer are a placeholder that could occur in any text
_LONGEST_MESSAGE = 300  # characters of a server's message that an error repeats


@dataclass(frozen=True)
class Endpoint:
    """A served model: plain settings that fit into YAML, without any secret.

    Attributes:
        url: the address up to its version, as in `http://localhost:8000/v1`.
        model: the name that the server knows it by.
        key_variable: NAME of the environment variable that holds the key; None sends none.
        dialect: how log-probabilities of given tokens are asked for: `vllm` by `prompt_logprobs`, answered by token
            ids; `openai` by `echo` and `logprobs`, answered by the tokens' texts.
        chat: completions are asked for as chats of one message (`/chat/completions`), not as bare prompts.
        extra: further fields of every request's body; a field that is None is left out of it, as in
            `{max_tokens: null, max_completion_tokens: 512}`.
        concurrency: requests that are under way at once.
        timeout: seconds without a byte after which an attempt is given up.
        attempts: how often one request is sent before its failure is an error.
        backoff: seconds before the second attempt; they double with each, and a random half of them is taken off.
        longest_wait: seconds between two attempts at most; a server that asks for more (`Retry-After`) ends the run.
        price_in, price_out: money for a million tokens of prompts, and of what is written.
        budget_tokens, budget_cost: what one folder of answers may spend in all runs together; None is no limit.

    Raises `UserError` for settings that cannot work or that would put a secret into them.
    """

    url: str
    model: str
    key_variable: str | None = None
    dialect: Dialect = "openai"
    chat: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    timeout: float = 120.0
    attempts: int = 6
    backoff: float = 1.0
    longest_wait: float = 120.0
    price_in: float = 0.0
    price_out: float = 0.0
    budget_tokens: int | None = None
    budget_cost: float | None = None

    def __post_init__(self) -> None:
        # Neither message repeats the setting: whoever mistakes it may have put the key itself there.
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc or parts.query:
            raise UserError(
                "an endpoint's url is http(s)://<host>/v1 without user name, password or query; a key belongs into an "
                "environment variable that key_variable names"
            )
        if self.key_variable is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_variable):
            raise UserError(
                "key_variable is not the name of an environment variable (capitals, digits and _); give its name, "
                "never the key itself"
            )
        if self.dialect not in ("openai", "vllm"):
            raise UserError(f"dialect is '{self.dialect}'; give 'openai' or 'vllm'")
        require_positive(
            concurrency=self.concurrency, timeout=self.timeout, attempts=self.attempts, longest_wait=self.longest_wait
        )
        for name in ("backoff", "price_in", "price_out"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.budget_cost is not None and not (self.price_in or self.price_out):
            raise UserError("budget_cost limits what tokens cost; give price_in and price_out, or limit budget_tokens")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Endpoint:
        """From a recipe's mapping. Raises `UserError` for a setting that is unknown (with the nearest) or missing."""
        known = [setting.name for setting in fields(cls)]
        for name in settings:
            if name not in known:
                near = get_close_matches(str(name), known, 1)
                raise UserError(
                    f"an endpoint has no setting '{name}'{f' (did you mean {near[0]}?)' if near else ''}; it has "
                    f"{', '.join(known)}"
                )
        for name in ("url", "model"):
            if name not in settings:
                raise UserError(f"an endpoint needs its {name}; add {name}: ...")
        return cls(**settings)

    def cost(self, prompt_tokens: int, written_tokens: int) -> float:
        """Money for so many tokens read and written."""
        return (prompt_tokens * self.price_in + written_tokens * self.price_out) / 1e6

    def wait_before(self, attempt: int) -> float:
        """Seconds to wait before that attempt (the second is 2): doubling, jittered so that threads do not march."""
        return min(self.backoff * 2.0 ** (attempt - 2), self.longest_wait) * random.uniform(0.5, 1.0)


class Unanswered(Exception):
    """One attempt that brought nothing and may be made again.

    Attributes:
        wait: seconds that the server asked for, None where it asked for none.
        billed: the server may have done the work and counted it, although nothing usable came back.
    """

    def __init__(self, reason: str, *, wait: float | None = None, billed: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.billed = billed


@dataclass(frozen=True)
class _Response:
    """What came back, freed from the request, whose headers hold the key."""

    status: int | None
    content: str = ""
    retry_after: str | None = None
    failure: str | None = None
    timed_out: bool = False


class Client:
    """Sends requests to an endpoint, from any number of threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._http = httpx.Client(
            base_url=endpoint.url.rstrip("/") + "/",
            auth=_Key(endpoint.key_variable) if endpoint.key_variable else None,
            timeout=endpoint.timeout,
            limits=httpx.Limits(max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency),
        )

    def post(self, path: str, body: bytes) -> Any:
        """The JSON that the server answers to one POST of JSON.

        Raises:
            Unanswered: 408, 429, 5xx, a time-out, a lost connection, a body that is not whole or not JSON.
            UserError: any other status (asking again would not help), no key in the environment, or a server that
                asks to wait for longer than `longest_wait`.
        """
        # The errors are raised out here and not from within `except`: httpx's own hold the request and its headers.
        response = self._exchange(path, body)
        if response.failure is not None:
            raise Unanswered(response.failure, billed=response.status == 200 or response.timed_out)
        status = response.status or 0
        if status in _RETRIED or status >= 500:
            raise Unanswered(f"{status} {self._message(response.content)}", wait=self._asked_wait(response.retry_after))
        if status != 200:
            raise UserError(
                f"{self.endpoint.url} answered {status} to /{path} for the model '{self.endpoint.model}': "
                f"{self._message(response.content)}{self._hint(status)}"
            )
        try:
            return json.loads(response.content)
        except ValueError:
            pass
        raise Unanswered("an answer that is not JSON", billed=True)

    def scrubbed(self, text: str) -> str:
        """The text without the key, should the server have repeated it. A key as short as `EMPTY` is no secret."""
        if len(os.environ.get(self.endpoint.key_variable or "", "").strip()) < _SHORTEST_KEY:
            return text
        return text.replace(os.environ[self.endpoint.key_variable or ""].strip(), "[key]")

    def _exchange(self, path: str, body: bytes) -> _Response:
        status = None
        try:
            with self._http.stream("POST", path, content=body, headers={"Content-Type": "application/json"}) as got:
                status = got.status_code
                content = self.scrubbed(got.read().decode("utf-8", "replace"))
                return _Response(status, content, got.headers.get("Retry-After"))
        except httpx.TimeoutException as error:
            late = not isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout)
            failure = f"no answer within {self.endpoint.timeout:g} seconds"
            return _Response(status, failure=failure, timed_out=late)
        except httpx.RequestError as error:
            return _Response(status, failure=f"{type(error).__name__}: {error}".strip(": "))

    def _message(self, text: str) -> str:
        """What the server says of an error, in one line: OpenAI's, FastAPI's or older servers' field, or the text."""
        try:
            said = json.loads(text)
        except ValueError:
            said = None
        if isinstance(said, dict):
            said = said.get("error", said)
            said = said.get("message", said.get("detail", said)) if isinstance(said, dict) else said
            text = said if isinstance(said, str) else json.dumps(said)
        return " ".join(text.split())[:_LONGEST_MESSAGE] or "no message"

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            variable = self.endpoint.key_variable
            return f"; put a valid key into {variable}" if variable else "; name the key's variable by key_variable"
        if status in (404, 405) or 300 <= status < 400:
            return "; check url (it ends in /v1) and model"
        return ""

    def _asked_wait(self, retry_after: str | None) -> float | None:
        """Seconds of a `Retry-After` header, which gives seconds or a date."""
        if retry_after is None:
            return None
        try:
            wait = float(retry_after)
        except ValueError:
            try:
                wait = parsedate_to_datetime(retry_after).timestamp() - time.time()
            except ValueError:
                return None
        if wait > self.endpoint.longest_wait:
            raise UserError(
                f"{self.endpoint.url} asks to wait for {wait:.0f} seconds, and longest_wait is "
                f"{self.endpoint.longest_wait:g}; run again later (everything answered so far is kept)"
            )
        return max(wait, 0.0)


class _Key(httpx.Auth):
    """Puts the key from the environment into the header of a request that is on its way."""

    def __init__(self, variable: str) -> None:
        self.variable = variable

    def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:  # type: ignore[override]
        if not os.environ.get(self.variable, "").strip():
            raise UserError(f"the environment variable {self.variable} is not set; put the endpoint's key into it")
        # httpx would repeat a header that it cannot send in its error.
        if not re.fullmatch(r"[!-~]+", os.environ[self.variable].strip()):
            raise UserError(
                f"the environment variable {self.variable} holds no key: a key is printable ASCII, one word"
            )
        request.headers["Authorization"] = f"Bearer {os.environ[self.variable].strip()}"
        yield request

"""A real HTTP server over a small causal model that speaks as OpenAI-compatible ones do, and fails on demand."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from limbeck.data.language import char_tokenizer
from limbeck.models import load_language_model

LETTERS = "abcdefghijklmnopqrstuvwxyz .,:"
KINDS = (
    "429", "429 Retry-After", "500", "503", "time-out", "closed", "broken JSON", "truncated", "wrong shape",
)  # fmt: skip
ALWAYS_WELL_AFTER = 3  # failures of one request


class ModelServer:
    """`with ModelServer(...) as server:` serves at `server.url` until the block ends.

    `fault_seed`: each attempt at each request fails with 10 % of each of KINDS, by this seed; None is a well server.
    `hang` is how long a time-out hangs, `delay` how long each answer takes. `key`: the only bearer token that is let
    in; `leaks` repeats it in messages and texts. `stops`: no distribution is reported for the written token.
    `reply` makes a chat's text from its prompt and seed. `status`: every request gets this one.
    """

    def __init__(
        self,
        fault_seed: int | None = None,
        *,
        hang: float = 1.0,
        delay: float = 0.0,
        key: str | None = None,
        leaks: bool = False,
        stops: bool = False,
        retry_after: str | None = None,
        status: int | None = None,
        echoes: bool = True,
        reply: Any = lambda prompt, seed: f"you said: {prompt}",
    ) -> None:
        self.fault_seed, self.hang, self.delay, self.key = fault_seed, hang, delay, key
        self.leaks, self.stops, self.reply = leaks, stops, reply
        self.retry_after, self.status, self.echoes = retry_after, status, echoes
        self.tokenizer = char_tokenizer([LETTERS])
        self.attempts: Counter[str] = Counter()  # by request
        self.answered: Counter[str] = Counter()  # whole answers sent, by request
        self.faults: Counter[str] = Counter()  # by kind
        self.tokens = 0
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()

    @cached_property
    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        settings = {"n_layer": 2, "n_head": 2, "n_embd": 16, "initializer_range": 0.6}
        return load_language_model(
            "hf-config:gpt2", vocab_size=len(self.tokenizer), max_length=32, eos_id=2, config=settings
        ).eval()

    def log_probs(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """The live model's log-probabilities [B, L, V]."""
        with torch.no_grad():
            return self.model({"input_ids": ids_BL}).float().log_softmax(-1)

    def __enter__(self) -> ModelServer:
        assert self.model is not None
        served = self

        class Handler(_Handler):
            server_of_model = served

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fault(self, request: str) -> str | None:
        with self.lock:
            attempt = self.attempts[request]
            self.attempts[request] += 1
            if self.fault_seed is None or attempt >= ALWAYS_WELL_AFTER:
                return None
            drawn = random.Random(f"{self.fault_seed}:{request}:{attempt}").random()
            kind = KINDS[int(drawn * 10)] if drawn * 10 < len(KINDS) else None
            if kind:
                self.faults[kind] += 1
            return kind

    # ------------------------------------------------------------ what is answered

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        if isinstance(prompt, str):
            return self.texts([f"{prompt} and so on {i}" for i in range(body.get("n", 1))], len(ids), chat=False)
        log_probs = self.log_probs(torch.tensor([ids]))[0]
        written = int(log_probs[-1].argmax())
        last = [] if self.stops else [log_probs[-1]]
        choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": "length"}
        if body.get("prompt_logprobs"):
            k, chosen = body["prompt_logprobs"], [None, *ids[1:]]
            tops = [None] + [self.top(row, k, token) for row, token in zip(log_probs[:-1], chosen[1:], strict=True)]
            choice["prompt_logprobs"] = [
                top and {str(i): {"logprob": value, "rank": 1, "decoded_token": "?"} for i, value in top.items()}
                for top in tops
            ]
            written_tops = [self.top(row, body["logprobs"], written) for row in last]
            choice["logprobs"] = {
                "top_logprobs": [{f"token_id:{i}": value for i, value in top.items()} for top in written_tops]
            }
        else:
            rows = [*log_probs[:-1], *last] if body.get("echo") and self.echoes else last
            tops = [self.top(row, body["logprobs"], None) for row in rows]
            named = [{self.tokenizer.decode([i]): value for i, value in top.items()} for top in tops]
            choice["logprobs"] = {"top_logprobs": [None, *named] if body.get("echo") and self.echoes else named}
        return self.counted({"object": "text_completion", "choices": [choice]}, len(ids), 1)

    @staticmethod
    def top(row: torch.Tensor, k: int, token: int | None) -> dict[int, float]:
        """The k likeliest, and the token itself, as vLLM gives it, wherever it stands."""
        values, ids = row.topk(k)
        found = dict(zip(ids.tolist(), values.tolist(), strict=True))
        return {token: float(row[token]), **found} if token is not None else found

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["messages"][-1]["content"]
        count = body.get("n", 1)
        return self.texts([self.reply(prompt, body.get("seed"))] * count, len(prompt), chat=True)

    def texts(self, texts: list[str], read: int, chat: bool) -> dict[str, Any]:
        if self.leaks:
            texts = [f"{text} {self.key}" for text in texts]
        choices = [
            {"index": i, "message": {"role": "assistant", "content": text}} if chat else {"index": i, "text": text}
            for i, text in enumerate(texts)
        ]
        return self.counted({"choices": choices[::-1]}, read, sum(map(len, texts)))

    def counted(self, reply: dict[str, Any], read: int, written: int) -> dict[str, Any]:
        with self.lock:
            self.tokens += read + written
        return reply | {"usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_model: ModelServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        mine = self.server_of_model
        with mine.lock:
            mine.at_once += 1
            mine.most_at_once = max(mine.most_at_once, mine.at_once)
        try:
            with suppress(BrokenPipeError, ConnectionResetError):
                self.answer(mine)
        finally:
            with mine.lock:
                mine.at_once -= 1

    def answer(self, mine: ModelServer) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"])).decode()
        body = json.loads(content)
        with mine.lock:
            mine.headers.append(dict(self.headers))
            mine.bodies.append(body)
        if mine.key is not None and self.headers.get("Authorization") != f"Bearer {mine.key}":
            said = f"no such key: {self.headers.get('Authorization')}" if mine.leaks else "no such key"
            return self.send(401, {"error": {"message": said, "type": "invalid_request_error"}})
        if mine.status is not None:
            return self.send(mine.status, {"error": {"message": "told to"}}, retry_after=mine.retry_after)
        path = self.path.removeprefix("/v1/")
        request = f"{path} {content}"
        fault = mine.fault(request)
        if fault == "429":
            return self.send(429, {"error": {"message": "slow down"}})
        if fault == "429 Retry-After":
            return self.send(429, {"error": {"message": "slow down"}}, retry_after="0")
        if fault in ("500", "503"):
            return self.send(int(fault), {"detail": "out of order"})
        if fault == "closed":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault == "wrong shape":
            return self.send(200, random.Random(request).choice([{"choices": []}, [1], {"choices": [{"index": 0}]}]))
        time.sleep(mine.hang if fault == "time-out" else mine.delay)
        reply = json.dumps({"completions": mine.completions, "chat/completions": mine.chat}[path](body)).encode()
        if fault == "broken JSON":
            return self.send_bytes(200, reply[: len(reply) // 2])
        if fault == "truncated":
            self.send_bytes(200, reply[: len(reply) // 2], length=len(reply))
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault is None:
            with mine.lock:
                mine.answered[request] += 1
        self.send_bytes(200, reply)

    def send(self, status: int, reply: Any, retry_after: str | None = None) -> None:
        self.send_bytes(status, json.dumps(reply).encode(), retry_after=retry_after)

    def send_bytes(
        self, status: int, content: bytes, length: int | None = None, retry_after: str | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

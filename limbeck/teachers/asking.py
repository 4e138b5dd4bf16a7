"""Questions to an endpoint, many at once, each asked until it is answered and never again once it is."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limbeck.errors import UserError
from limbeck.teachers.answers import Claim, KeptAnswers
from limbeck.teachers.endpoint import Client, Endpoint, Unanswered

_POLL = 0.05  # seconds between two looks at what others have under way
_MARGIN = 10.0  # seconds that a claim outlives the longest attempt


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        kind: the path below the endpoint's url, `completions` or `chat/completions`.
        body: the JSON object that is sent.
        read: from the server's JSON to the part that is kept; raises ValueError, saying what is wrong, for an answer
            of another shape.
        prompt_tokens, written_tokens: how many there are at most, reserved in the budget before it is sent.
    """

    kind: str
    body: Mapping[str, Any]
    read: Callable[[Any], Any]
    prompt_tokens: int
    written_tokens: int

    @property
    def content(self) -> str:
        """The body as canonical JSON: sorted, without spaces, ASCII."""
        return json.dumps(self.body, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def key(self) -> str:
        """What tells it from other questions: SHA-256 of kind and body (with the model), whatever the url."""
        return hashlib.sha256(f"{self.kind}\n{self.content}".encode()).hexdigest()


@dataclass(frozen=True)
class Summary:
    """What a teacher has done so far.

    Attributes:
        asked: questions that were sent and answered.
        stored: questions whose answers were in the folder, or came there from another process.
        retried: attempts after the first.
        tokens, cost: what the questions asked here took, failed attempts included.
    """

    asked: int = 0
    stored: int = 0
    retried: int = 0
    tokens: int = 0
    cost: float = 0.0


class Asker:
    """Asks an endpoint and keeps the answers in a folder. `progress` shows a bar while it does."""

    def __init__(self, endpoint: Endpoint, folder: str | Path, *, progress: bool = False) -> None:
        self.endpoint = endpoint
        self.answers = KeptAnswers(folder)
        self.summary = Summary()
        self._progress = progress
        self._client = Client(endpoint)
        self._counting = threading.Lock()

    def ask(self, requests: Sequence[Request]) -> list[Any]:
        """What is kept of the answer to each request, in order. Equal requests are asked once.

        Raises:
            UserError: a request was refused, or failed in all of its attempts.
            BudgetSpent: the next one could exceed the budget.

        Before either is raised, what is under way is waited for, and every answer is kept.
        """
        keys = [request.key for request in requests]
        by_key = dict(zip(keys, requests, strict=True))
        found = self.answers.read(by_key)
        missing = {key: request for key, request in by_key.items() if key not in found}
        self._count(stored=len(found))
        if missing:
            self._ask_missing(missing)
            found |= self.answers.read(missing)
        return [found[key] for key in keys]

    def _ask_missing(self, missing: dict[str, Request]) -> None:
        stop = threading.Event()
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool, self._bar(len(missing)) as advance:
            try:
                while missing:
                    tasks = {pool.submit(self._ask_one, *item, stop): item for item in missing.items()}
                    missing = {}
                    for task in as_completed(tasks):
                        if task.result():
                            advance()
                        else:  # another process asks it now: look again when the rest is done
                            key, request = tasks[task]
                            missing[key] = request
                    if missing:
                        stop.wait(_POLL)
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask_one(self, key: str, request: Request, stop: threading.Event) -> bool:
        """Whether the question has its answer now; False while another process asks it, or when told to stop."""
        try:
            claim = self._claim(key, request, stop)
            if claim != "mine":
                self._count(stored=int(claim == "answered"))
                return claim == "answered"
            answered = False
            try:
                answered = self._attempt(key, request, stop)
            finally:
                if not answered:
                    self.answers.release(key)
            return answered
        except BaseException:
            stop.set()  # before this thread takes the next question
            raise

    def _claim(self, key: str, request: Request, stop: threading.Event) -> Claim:
        """Claim a question, waiting while the budget depends on what is under way. `wait` when told to stop."""
        tokens = request.prompt_tokens + request.written_tokens
        cost = self.endpoint.cost(request.prompt_tokens, request.written_tokens)
        limits = self.endpoint.budget_tokens, self.endpoint.budget_cost
        claim: Claim = "wait"
        while claim == "wait" and not stop.is_set():
            claim = self.answers.claim(key, tokens, cost, self._attempt_seconds, *limits)
            if claim == "wait":
                stop.wait(_POLL)
        return claim

    def _attempt(self, key: str, request: Request, stop: threading.Event) -> bool:
        """Send a request until it is answered, and keep the answer. False when told to stop between two attempts."""
        body = request.content.encode()
        for attempt in range(1, self.endpoint.attempts + 1):
            try:
                reply = self._client.post(request.kind, body)
                prompt_tokens, written_tokens = _usage(reply, request)
                kept = self._read(request, reply)
            except Unanswered as failure:
                if failure.billed:
                    self._lose(request)
                reason, wait = str(failure), failure.wait
            except _WrongShape as failure:
                self._lose(request, prompt_tokens, written_tokens)
                reason, wait = str(failure), None
            else:
                cost = self.endpoint.cost(prompt_tokens, written_tokens)
                self.answers.keep(key, request.kind, self.endpoint.model, kept, prompt_tokens, written_tokens, cost)
                self._count(asked=1, tokens=prompt_tokens + written_tokens, cost=cost)
                return True
            if attempt < self.endpoint.attempts:
                wait = self.endpoint.wait_before(attempt + 1) if wait is None else wait
                self.answers.renew(key, wait + self._attempt_seconds)
                self._count(retried=1)
                if stop.wait(wait):
                    return False
        raise UserError(
            f"{self.endpoint.url} gave no answer in {self.endpoint.attempts} attempts (the last: {reason}); everything "
            f"answered so far is kept in {self.answers.folder}: run again to go on"
        )

    def _read(self, request: Request, reply: Any) -> str:
        """What is kept of a reply, as JSON without the key, should the server have repeated it."""
        try:
            kept = request.read(reply)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            problem = str(error) if type(error) is ValueError else "fields are missing or of another type"
            raise _WrongShape(f"an answer of the wrong shape, {problem}") from error
        return self._client.scrubbed(json.dumps(kept, separators=(",", ":")))

    def _lose(self, request: Request, prompt_tokens: int | None = None, written_tokens: int | None = None) -> None:
        """Count an attempt without an answer: by what the server said, or else by the estimate."""
        read = request.prompt_tokens if prompt_tokens is None else prompt_tokens
        written = request.written_tokens if written_tokens is None else written_tokens
        cost = self.endpoint.cost(read, written)
        self.answers.lose(read + written, cost)
        self._count(tokens=read + written, cost=cost)

    @property
    def _attempt_seconds(self) -> float:
        """How long one attempt lasts at most: reaching the server, sending and reading each have `timeout`."""
        return 3 * self.endpoint.timeout + _MARGIN

    def _count(self, **more: float) -> None:
        with self._counting:
            self.summary = replace(
                self.summary, **{name: getattr(self.summary, name) + value for name, value in more.items()}
            )

    @contextmanager
    def _bar(self, total: int) -> Iterator[Callable[[], None]]:
        if not self._progress:
            yield lambda: None
            return
        from rich.progress import Progress

        with Progress() as bar:
            task = bar.add_task(f"asking {self.endpoint.model}", total=total)
            yield lambda: bar.advance(task)


class _WrongShape(Exception):
    """JSON that is not what was asked for."""


def _usage(reply: Any, request: Request) -> tuple[int, int]:
    """Tokens read and written by the server's count, the estimate where it gives none."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    read, written = (count if type(count) is int and count >= 0 else None for count in counts)
    return (
        request.prompt_tokens if read is None else read,
        request.written_tokens if written is None else written,
    )

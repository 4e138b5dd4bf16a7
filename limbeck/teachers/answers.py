"""Everything that a served teacher has answered, in one SQLite file of a folder, and what it cost.

An answer is written by a transaction of its own the moment it is there, so that neither an error nor a killed process
loses one that was paid for. Processes may share the folder: before a request is sent its key is claimed, and the claim
also reserves its estimated tokens and money.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from limbeck.errors import UserError

Claim = Literal["mine", "answered", "taken", "wait"]

_VERSION = 1
_BLOCK = 500  # keys in one query; older SQLite allows 999
_SCHEMA = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, model TEXT NOT NULL, answer TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, written_tokens INTEGER NOT NULL, cost REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE claims (
    key TEXT PRIMARY KEY, owner TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL,
    expires REAL NOT NULL, tokens INTEGER NOT NULL, cost REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE spent (answers INTEGER, tokens INTEGER, cost REAL, lost_tokens INTEGER, lost_cost REAL);
INSERT INTO spent VALUES (0, 0, 0, 0, 0);
"""


@dataclass(frozen=True)
class Spent:
    """What a folder has spent in all runs.

    Attributes:
        answers: how many are kept.
        tokens, cost: all tokens read and written, and their money, those of `lost_*` included.
        lost_tokens, lost_cost: of attempts that brought nothing and that the server may have counted all the same
            (time-outs, broken answers, killed processes), by their estimate where the server gave no number.
    """

    answers: int
    tokens: int
    cost: float
    lost_tokens: int
    lost_cost: float


class BudgetSpent(UserError):
    """The next request could exceed the budget. `spent` says what was used; the limits are None where there is none."""

    def __init__(self, message: str, spent: Spent, limit_tokens: int | None, limit_cost: float | None) -> None:
        super().__init__(message)
        self.spent = spent
        self.limit_tokens = limit_tokens
        self.limit_cost = limit_cost


class KeptAnswers:
    """The answers in `folder`, by key. Usable from many threads and from many processes of one machine.

    SQLite's write-ahead log asks for a disk of this machine, not for a network folder.

    Raises `UserError` where the file is none of ours, or the disk does not take it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "answers.sqlite"
        self._owner = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"there can be no folder of answers at {folder} ({error}); give another") from error
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and not db.execute("SELECT name FROM sqlite_master").fetchone():
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise UserError(f"{self.path} holds no answers of this version of Limbeck; give another folder")

    def read(self, keys: Iterable[str]) -> dict[str, Any]:
        """The answers to those of the keys that have one."""
        wanted = list(keys)
        found: dict[str, Any] = {}
        for start in range(0, len(wanted), _BLOCK):
            block = wanted[start : start + _BLOCK]
            marks = ",".join("?" * len(block))
            with self._transaction(write=False) as db:
                rows = db.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", block).fetchall()
            found.update((key, json.loads(answer)) for key, answer in rows)
        return found

    def claim(
        self,
        key: str,
        tokens: int,
        cost: float,
        seconds: float,
        limit_tokens: int | None = None,
        limit_cost: float | None = None,
    ) -> Claim:
        """Ask for the right to send the request of that key, and reserve its estimated tokens and cost.

        Returns `mine` (send it, then `keep` or `release`; it lapses after `seconds`), `answered`, `taken` (another
        asks it now), or `wait`: what is under way may use up the budget, or leave enough of it.

        Raises `BudgetSpent` where what is spent already leaves too little for this request.
        """
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM answers WHERE key = ?", [key]).fetchone():
                return "answered"
            self._drop_dead_claims(db)
            if db.execute("SELECT 1 FROM claims WHERE key = ?", [key]).fetchone():
                return "taken"
            if limit_tokens is not None or limit_cost is not None:
                spent = _spent(db)
                most_tokens = float("inf") if limit_tokens is None else limit_tokens
                most_cost = float("inf") if limit_cost is None else limit_cost
                if spent.tokens + tokens > most_tokens or spent.cost + cost > most_cost:
                    raise self._budget_spent(spent, tokens, cost, limit_tokens, limit_cost)
                reserved = db.execute("SELECT total(tokens), total(cost) FROM claims").fetchone()
                if spent.tokens + reserved[0] + tokens > most_tokens or spent.cost + reserved[1] + cost > most_cost:
                    return "wait"
            claim = [key, self._owner, socket.gethostname(), os.getpid(), time.time() + seconds, tokens, cost]
            db.execute("INSERT INTO claims VALUES (?, ?, ?, ?, ?, ?, ?)", claim)
            return "mine"

    def renew(self, key: str, seconds: float) -> None:
        """Hold one's claim for `seconds` from now."""
        with self._transaction() as db:
            expires = time.time() + seconds
            db.execute("UPDATE claims SET expires = ? WHERE key = ? AND owner = ?", [expires, key, self._owner])

    def release(self, key: str) -> None:
        """Give up one's claim."""
        with self._transaction() as db:
            db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", [key, self._owner])

    def keep(
        self, key: str, kind: str, model: str, answer: str, prompt_tokens: int, written_tokens: int, cost: float
    ) -> None:
        """Write an answer (JSON) and what it took, and give up the claim. A key that has an answer keeps it."""
        with self._transaction(durable=True) as db:
            row = [key, kind, model, answer, prompt_tokens, written_tokens, cost]
            new = db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", row).rowcount
            db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", [key, self._owner])
            if new:
                tokens = prompt_tokens + written_tokens
                db.execute(
                    "UPDATE spent SET answers = answers + 1, tokens = tokens + ?, cost = cost + ?", [tokens, cost]
                )
            else:
                _lose(db, prompt_tokens + written_tokens, cost)

    def lose(self, tokens: int, cost: float) -> None:
        """Count what an attempt without an answer may have spent."""
        with self._transaction(durable=True) as db:
            _lose(db, tokens, cost)

    @property
    def spent(self) -> Spent:
        """What the folder has spent in all runs."""
        with self._transaction(write=False) as db:
            return _spent(db)

    def _drop_dead_claims(self, db: sqlite3.Connection) -> None:
        """Free the claims that lapsed or whose process is gone. Their requests may have been answered and counted."""
        now, host = time.time(), socket.gethostname()
        for key, owner, where, pid, expires, tokens, cost in db.execute("SELECT * FROM claims").fetchall():
            if expires < now or (where == host and not _alive(pid)):
                db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", [key, owner])
                _lose(db, tokens, cost)

    def _budget_spent(
        self, spent: Spent, tokens: int, cost: float, limit_tokens: int | None, limit_cost: float | None
    ) -> BudgetSpent:
        used = [] if limit_tokens is None else [f"{spent.tokens:,} of {limit_tokens:,} tokens (the next: {tokens:,})"]
        if limit_cost is not None:
            used.append(f"{spent.cost:.4g} of {limit_cost:.4g} in money (the next: {cost:.2g})")
        message = (
            f"the budget of {self.folder} is spent: {' and '.join(used)}; all {spent.answers:,} answers are kept: "
            "raise budget_tokens or budget_cost and run again to go on"
        )
        return BudgetSpent(message, spent, limit_tokens, limit_cost)

    @contextmanager
    def _transaction(self, write: bool = True, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """One transaction, whole or not at all. Threads take turns; SQLite makes the processes do so.

        `durable`: it is on the disk before this returns, whatever happens to the machine; others may be lost with it.
        """
        with self._lock:
            try:
                db = self._connected()
                db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                try:
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise UserError(
                    f"the answers in {self.path} can be neither read nor written ({error}); make room on the disk, or "
                    "give another folder"
                ) from error

    def _connected(self) -> sqlite3.Connection:
        # A connection must not be used across a fork.
        if self._connection is None or self._pid != os.getpid():
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._pid = os.getpid()
        return self._connection


def _spent(db: sqlite3.Connection) -> Spent:
    answers, tokens, cost, lost_tokens, lost_cost = db.execute("SELECT * FROM spent").fetchone()
    return Spent(answers, tokens + lost_tokens, cost + lost_cost, lost_tokens, lost_cost)


def _lose(db: sqlite3.Connection, tokens: int, cost: float) -> None:
    db.execute("UPDATE spent SET lost_tokens = lost_tokens + ?, lost_cost = lost_cost + ?", [tokens, cost])


def _alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    if os.name == "nt":  # there, os.kill would end the process: the claim lapses by its time
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, and belongs to somebody else
        pass
    return True

"""A folder of answers: claims keep two from asking the same, and lapse when their holder is gone."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading

import pytest

from limbeck.errors import UserError
from limbeck.teachers.answers import BudgetSpent, KeptAnswers


def keep(answers: KeptAnswers, key: str, tokens: int = 10) -> None:
    answers.keep(key, "completions", "m", f'"{key}"', tokens, 0, tokens / 100)


def test_what_one_has_claimed_another_does_not_get(tmp_path):
    one, other = KeptAnswers(tmp_path), KeptAnswers(tmp_path)
    assert [one.claim("a", 5, 0.1, 60), one.claim("a", 5, 0.1, 60), other.claim("a", 5, 0.1, 60)] == [
        "mine", "taken", "taken",
    ]  # fmt: skip
    other.release("a")
    assert other.claim("a", 5, 0.1, 60) == "taken", "a claim is given up by its holder alone"
    one.release("a")
    assert other.claim("a", 5, 0.1, 60) == "mine"
    keep(other, "a")
    assert one.claim("a", 5, 0.1, 60) == "answered" and one.read(["a", "b"]) == {"a": "a"}


def test_of_many_threads_one_gets_the_claim(tmp_path):
    answers, got = KeptAnswers(tmp_path), []
    threads = [threading.Thread(target=lambda: got.append(answers.claim("a", 1, 0, 60))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == ["mine", *["taken"] * 7]


def test_a_claim_lapses_and_counts_as_lost(tmp_path):
    one, other = KeptAnswers(tmp_path), KeptAnswers(tmp_path)
    one.claim("a", 5, 0.5, -1)
    assert other.claim("a", 5, 0.5, 60) == "mine"
    assert other.spent.lost_tokens == 5 and other.spent.cost == 0.5
    one.renew("a", -1)
    assert one.claim("a", 5, 0.5, 60) == "taken", "only one's own claim is renewed"


def test_a_claim_of_a_process_that_is_gone_is_free(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    one, other = KeptAnswers(tmp_path), KeptAnswers(tmp_path)
    assert one.claim("a", 5, 0, 3600) == "mine" and other.claim("a", 5, 0, 3600) == "taken"
    with sqlite3.connect(one.path) as db:
        db.execute("UPDATE claims SET pid = ?", [gone.pid])
    assert other.claim("a", 5, 0, 3600) == "mine"


def test_the_first_answer_to_a_key_stays_and_a_second_is_counted(tmp_path):
    answers = KeptAnswers(tmp_path)
    keep(answers, "a")
    answers.keep("a", "completions", "m", '"later"', 7, 0, 0.0)
    spent = answers.spent
    assert answers.read(["a"]) == {"a": "a"} and (spent.answers, spent.tokens, spent.lost_tokens) == (1, 17, 7)


def test_a_budget_waits_for_what_is_under_way_and_ends_at_what_is_spent(tmp_path):
    answers = KeptAnswers(tmp_path)
    assert answers.claim("a", 60, 0, 60, 100) == "mine"
    assert answers.claim("b", 60, 0, 60, 100) == "wait"
    keep(answers, "a", 30)
    assert answers.claim("b", 60, 0, 60, 100) == "mine"
    keep(answers, "b", 50)
    with pytest.raises(BudgetSpent, match=r"80 of 100 tokens \(the next: 60\); all 2 answers are kept") as error:
        answers.claim("c", 60, 0, 60, 100)
    assert (error.value.spent.tokens, error.value.limit_tokens, error.value.limit_cost) == (80, 100, None)
    with pytest.raises(BudgetSpent, match="0.8 of 0.9 in money"):
        answers.claim("c", 1, 0.2, 60, None, 0.9)
    assert answers.claim("a", 60, 0, 60, 100) == "answered", "what is kept costs nothing"


def test_many_keys_are_read_at_once(tmp_path):
    answers = KeptAnswers(tmp_path)
    for number in range(3):
        keep(answers, str(number))
    assert answers.read(map(str, range(2000))) == {"0": "0", "1": "1", "2": "2"}


def test_a_file_that_is_none_of_ours_is_one_sentence(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "answers.sqlite").write_text("no database " * 100)
    with pytest.raises(UserError, match="can be neither read nor written .file is not a database"):
        KeptAnswers(tmp_path / "text")
    (tmp_path / "other").mkdir()
    with sqlite3.connect(tmp_path / "other" / "answers.sqlite") as db:
        db.execute("CREATE TABLE things (name)")
    with pytest.raises(UserError, match="holds no answers of this version"):
        KeptAnswers(tmp_path / "other")
    with pytest.raises(UserError, match="there can be no folder of answers"):
        KeptAnswers(tmp_path / "text" / "answers.sqlite" / "below")

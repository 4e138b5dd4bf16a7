"""A served teacher says what the live model says, asks nothing twice, loses nothing to faults, and tells no key."""

from __future__ import annotations

import copy
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch

from limbeck.data import Samples
from limbeck.errors import UserError
from limbeck.models import TopK
from limbeck.teachers import Stored, fill
from limbeck.teachers.answers import BudgetSpent
from limbeck.teachers.endpoint import Endpoint
from limbeck.teachers.served import Served
from tests.teachers.http_server import KINDS, LETTERS, ModelServer

ROOT = Path(__file__).parent.parent.parent
QUICK = {"model": "small", "timeout": 20.0, "backoff": 0.01, "attempts": 12}
SECRET = "sk-live-0123456789abcdef"


@pytest.fixture(scope="module")
def well():
    with ModelServer() as server:
        yield server


def served(server: ModelServer, folder: Path, *, top_k: int = 8, **settings) -> Served:
    endpoint = Endpoint(url=server.url, **{**QUICK, **settings})
    return Served(endpoint, folder, vocabulary=len(server.tokenizer), tokenizer=server.tokenizer, top_k=top_k)


def rows(count: int, length: int = 12, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Rows of random tokens and lengths, all different; the first has every place."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 4 + len(LETTERS), (count, length), generator=generator)
    lengths = torch.randint(3, length + 1, (count, 1), generator=generator)
    lengths[0] = length
    return {"text": {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}}


def kept(folder: Path) -> Counter[str]:
    with sqlite3.connect(folder / "answers.sqlite") as db:
        return Counter(key for (key,) in db.execute("SELECT key FROM answers"))


# ---------------------------------------------------------------- log-probabilities of given tokens


@pytest.mark.parametrize("dialect", ["vllm", "openai"])
@pytest.mark.parametrize("stops", [False, True], ids=["", "the written token is not reported"])
def test_log_probabilities_are_those_of_the_live_model_at_every_place(dialect, stops, tmp_path):
    fields = rows(10)
    with ModelServer(stops=stops) as server:
        top = served(server, tmp_path, dialect=dialect).top_k(fields, "text", 8)
    mask = fields["text"]["attention_mask"].bool()
    wanted = TopK.of(server.log_probs(fields["text"]["input_ids"]), 8)
    assert top.classes == len(server.tokenizer)
    torch.testing.assert_close(top.ids[mask], wanted.ids[mask])
    torch.testing.assert_close(top.log_probs[mask], wanted.log_probs[mask], atol=1e-4, rtol=0)
    torch.testing.assert_close(top.rest[mask], wanted.rest[mask], atol=1e-4, rtol=0)
    uniform = torch.full((int((~mask).sum()), top.classes), -torch.tensor(float(top.classes)).log())
    torch.testing.assert_close(top.dense()[~mask], uniform)


def test_logits_are_the_top_k_with_the_rest_spread(well, tmp_path):
    teacher, fields = served(well, tmp_path, dialect="vllm"), rows(4)
    logits = teacher.logits(fields, "text")
    assert teacher.sparse and logits.shape == (4, 12, teacher.vocabulary) and logits.dtype == torch.float32
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(4, 12))
    torch.testing.assert_close(logits, teacher.top_k(fields, "text", 8).dense("spread"))


def test_the_whole_vocabulary_gives_the_live_models_log_probabilities(well, tmp_path):
    fields = rows(3)
    teacher = served(well, tmp_path, dialect="vllm", top_k=len(well.tokenizer))
    mask = fields["text"]["attention_mask"].bool()
    live = well.log_probs(fields["text"]["input_ids"])
    torch.testing.assert_close(teacher.logits(fields, "text")[mask], live[mask], atol=1e-4, rtol=0)


def test_tokens_that_cannot_be_mapped_stay_in_the_rest(well, tmp_path):
    """A vocabulary smaller than the server's: ids beyond it are not this student's."""
    small = len(LETTERS) - 10
    teacher = Served(Endpoint(url=well.url, dialect="vllm", **QUICK), tmp_path, vocabulary=small, top_k=8)
    fields = rows(5)
    fields["text"]["input_ids"] %= small
    mask = fields["text"]["attention_mask"].bool()
    top = teacher.top_k(fields, "text", 8)
    live = TopK.of(well.log_probs(fields["text"]["input_ids"]), 8)
    dense = top.dense().exp()
    torch.testing.assert_close(dense.sum(-1), torch.ones(5, 12))
    known = (live.ids < small) & mask[..., None]
    assert known.any() and not known[mask].all()
    told = dense.gather(-1, live.ids.clamp(max=small - 1))
    torch.testing.assert_close(told[known], live.log_probs.exp()[known], atol=1e-4, rtol=0)
    assert all(len(set(ids)) == 8 for ids in top.ids.flatten(0, 1).tolist())


def test_a_smaller_k_is_cut_from_the_same_answers(well, tmp_path):
    teacher, fields = served(well, tmp_path, dialect="vllm"), rows(4)
    eight = teacher.top_k(fields, "text", 8)
    asked = teacher.summary.asked
    three = teacher.top_k(fields, "text", 3)
    assert teacher.summary.asked == asked == 4
    mask = fields["text"]["attention_mask"].bool()
    torch.testing.assert_close(three.ids[mask], eight.cut(3).ids[mask])
    torch.testing.assert_close(three.rest, eight.cut(3).rest)
    with pytest.raises(UserError, match="raise the teacher's top_k"):
        teacher.top_k(fields, "text", 9)


def test_rows_may_be_empty_and_padding_stands_on_the_right(well, tmp_path):
    teacher, fields = served(well, tmp_path, dialect="vllm"), rows(2)
    fields["text"]["attention_mask"][1] = 0
    assert teacher.top_k(fields, "text", 8).rest.shape == (2, 12) and teacher.summary.asked == 1
    fields["text"]["attention_mask"] = fields["text"]["attention_mask"].flip(1) * 0 + torch.arange(12).ge(2).long()
    with pytest.raises(UserError, match="on the right"):
        teacher.top_k(fields, "text", 8)
    with pytest.raises(UserError, match="'image' holds none"):
        teacher.top_k({"image": torch.zeros(2, 3)}, "image", 8)


def test_a_server_that_gives_no_log_probabilities_of_prompts_is_named(tmp_path):
    with ModelServer(echoes=False) as server, pytest.raises(UserError, match="does this server give those of prompts"):
        served(server, tmp_path, dialect="openai", attempts=2).top_k(rows(1), "text", 8)


def test_texts_of_tokens_need_the_tokenizer(well, tmp_path):
    teacher = Served(Endpoint(url=well.url, **QUICK), tmp_path, vocabulary=len(well.tokenizer), top_k=8)
    with pytest.raises(UserError, match="give the model's tokenizer"):
        teacher.top_k(rows(1), "text", 8)


def test_a_store_is_filled_from_it(well, tmp_path):
    teacher, samples = served(well, tmp_path / "answers", dialect="vllm"), Samples(rows(20))
    fill(tmp_path / "store", teacher, samples, field="text", top_k=8, values="log_probabilities", batch_size=8)
    stored, batch = Stored(tmp_path / "store", teacher=teacher), samples.batch(torch.arange(5, 15))
    got, wanted = stored.top_k(batch, "text", 8), teacher.top_k(batch, "text", 8)
    mask = batch["text"]["attention_mask"].bool()
    assert teacher.summary.asked == 20
    for name in ("ids", "log_probs", "rest"):
        torch.testing.assert_close(getattr(got, name)[mask], getattr(wanted, name)[mask], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- faults


def test_no_fault_loses_or_doubles_an_answer(well, tmp_path):
    """150 different questions of three kinds, nine kinds of fault at 10 % each."""
    fields, prompts = rows(50), [f"say {number}" for number in range(50)]

    def answers(server: ModelServer, folder: Path, **settings) -> tuple:
        plain = served(server, folder, dialect="vllm", **settings)
        chat = served(server, folder, chat=True, **settings)
        return plain.top_k(fields, "text", 8), plain.complete(prompts, n=2), chat.complete(prompts), plain, chat

    with ModelServer(fault_seed=3, hang=0.8) as failing:
        top, texts, chats, plain, chat = answers(failing, tmp_path / "failing", timeout=0.4)
        assert set(failing.faults) == set(KINDS) and sum(failing.faults.values()) > 200
        sent = sum(failing.attempts.values())
        again = answers(failing, tmp_path / "failing", timeout=0.4)
        assert sum(failing.attempts.values()) == sent, "the second run asked something"
    expected = answers(well, tmp_path / "well")
    for name in ("ids", "log_probs", "rest"):
        torch.testing.assert_close(getattr(top, name), getattr(expected[0], name), rtol=0, atol=1e-6)
        torch.testing.assert_close(getattr(top, name), getattr(again[0], name), rtol=0, atol=0)
    assert (texts, chats) == expected[1:3] == again[1:3]
    assert len(kept(tmp_path / "failing")) == len(failing.attempts) == 150
    assert kept(tmp_path / "failing") == kept(tmp_path / "well"), "the url is no part of the key"
    assert plain.summary.asked + chat.summary.asked == 150 and plain.summary.retried + chat.summary.retried > 200
    assert again[3].summary.stored == 100 and again[3].summary.asked == again[3].summary.tokens == 0


def test_equal_requests_of_a_batch_are_asked_once(tmp_path):
    with ModelServer() as server:
        teacher = served(server, tmp_path)
        assert len({tuple(texts) for texts in teacher.complete(["same"] * 20)}) == 1
        assert server.answered.total() == teacher.summary.asked == 1


def test_requests_are_sent_side_by_side_up_to_the_limit(tmp_path):
    with ModelServer(delay=0.05) as server:
        served(server, tmp_path, concurrency=6).complete([str(number) for number in range(24)])
        assert 3 <= server.most_at_once <= 6


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_one_sentence_at_once(status, tmp_path):
    with ModelServer(status=status) as server, pytest.raises(UserError, match=f"answered {status} .*told to") as error:
        served(server, tmp_path, concurrency=1).complete(["a", "b", "c"])
    assert len(server.headers) == 1 and "\n" not in str(error.value)


def test_after_the_last_attempt_the_answers_so_far_are_kept(tmp_path):
    with ModelServer() as server:
        served(server, tmp_path).complete(["first"])
        server.status = 503
        with pytest.raises(UserError, match=r"no answer in 3 attempts \(the last: 503 told to\).*kept in"):
            served(server, tmp_path, attempts=3).complete(["first", "second"])
        server.status = None
        assert len(server.headers) == 4
        served(server, tmp_path).complete(["first", "second"])
        assert len(server.headers) == 5
    with pytest.raises(UserError, match="no answer in 2 attempts .the last: ConnectError"):
        served(server, tmp_path, attempts=2).complete(["third"])


def test_a_server_may_say_how_long_to_wait(tmp_path):
    with ModelServer(status=429, retry_after="0.3") as server:
        start = time.monotonic()
        with pytest.raises(UserError, match="429"):
            served(server, tmp_path, attempts=3).complete(["a"])
        assert 0.6 <= time.monotonic() - start < 5
        server.retry_after = "3600"
        with pytest.raises(UserError, match="asks to wait for 3600 seconds, and longest_wait is 120"):
            served(server, tmp_path).complete(["a"])


# ---------------------------------------------------------------- processes

ASK = """
import sys
from limbeck.teachers.endpoint import Endpoint
from limbeck.teachers.served import Served
url, folder, start, stop = sys.argv[1:]
endpoint = Endpoint(url=url, model="small", concurrency=4)
print("asking", flush=True)
Served(endpoint, folder, vocabulary=30).complete([f"say {i}" for i in range(int(start), int(stop))])
"""


def asking(server: ModelServer, folder: Path, start: int, stop: int) -> subprocess.Popen:
    command = [sys.executable, "-c", ASK, server.url, str(folder), str(start), str(stop)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_goes_on_with_what_is_missing(tmp_path):
    with ModelServer(delay=0.05) as server:
        process = asking(server, tmp_path, 0, 60)
        while server.answered.total() < 20:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        while server.at_once:  # the server finishes what it had begun
            time.sleep(0.05)
        before, sent = kept(tmp_path), server.answered.total()
        assert 10 <= len(before) < 60
        teacher = served(server, tmp_path)
        start = time.monotonic()
        texts = teacher.complete([f"say {number}" for number in range(60)])
        assert time.monotonic() - start < 20, "it waited for the claims of a process that is gone"
        assert texts == [[f"say {number} and so on 0"] for number in range(60)]
        assert server.answered.total() - sent == teacher.summary.asked == 60 - len(before)
        assert len(kept(tmp_path)) == 60 and sum(n - 1 for n in server.answered.values()) <= 4


def test_two_processes_that_share_a_folder_ask_nothing_twice(tmp_path):
    with ModelServer(delay=0.02) as server:
        process = asking(server, tmp_path, 0, 60)
        process.stdout.readline()
        teacher = served(server, tmp_path, concurrency=4)
        texts = teacher.complete([f"say {number}" for number in range(20, 80)])
        process.communicate()
        assert process.returncode == 0 and texts == [[f"say {number} and so on 0"] for number in range(20, 80)]
        assert len(server.answered) == server.answered.total() == len(kept(tmp_path)) == 80
        assert teacher.summary.asked < 60


# ---------------------------------------------------------------- budget


def test_the_budget_ends_a_run_before_it_is_exceeded_and_counts_over_runs(tmp_path):
    prompts = [f"say {number:03d}" for number in range(60)]
    settings = {"budget_tokens": 1000, "price_in": 2.0, "price_out": 10.0}
    with ModelServer(delay=0.005) as server:
        teacher = served(server, tmp_path, **settings)
        with pytest.raises(BudgetSpent, match=r"of 1,000 tokens .*all \d+ answers are kept") as error:
            teacher.complete(prompts, max_tokens=40)
        spent = teacher._asker.answers.spent
        assert 900 < spent.tokens == server.tokens <= 1000 and spent == error.value.spent
        assert spent.answers == len(kept(tmp_path)) == server.answered.total() == teacher.summary.asked
        assert spent.cost == pytest.approx(teacher.summary.cost) and spent.cost > spent.tokens * 2e-6
        with pytest.raises(BudgetSpent):
            served(server, tmp_path, **settings).complete(prompts[::-1], max_tokens=40)
        assert server.tokens <= 1000
        more = served(server, tmp_path, budget_tokens=10_000)
        more.complete(prompts, max_tokens=40)
        assert set(server.answered.values()) == {1} and len(server.answered) == 60


def test_the_budget_can_be_money(tmp_path):
    with ModelServer() as server:
        teacher = served(server, tmp_path, price_in=1000.0, price_out=2000.0, budget_cost=1.0)
        with pytest.raises(BudgetSpent, match="of 1 in money"):
            teacher.complete([f"say {number}" for number in range(60)], max_tokens=30)
        assert 0.8 < teacher.summary.cost <= 1.0


def test_attempts_that_may_have_been_billed_count(tmp_path):
    with ModelServer(fault_seed=3, hang=0.8) as server:
        teacher = served(server, tmp_path, timeout=0.4)
        teacher.complete([f"say {number}" for number in range(20)], max_tokens=40)
        spent = teacher._asker.answers.spent
    billed = sum(server.faults[kind] for kind in ("time-out", "broken JSON", "truncated", "wrong shape"))
    assert billed >= 10 and spent.lost_tokens >= 40 * billed and spent.tokens == teacher.summary.tokens


# ---------------------------------------------------------------- the key


def test_the_key_is_sent_and_nowhere_else(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SMALL_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    with ModelServer(fault_seed=5, hang=0.8, key=SECRET, leaks=True) as server:
        settings = {"key_variable": "SMALL_KEY", "timeout": 0.4}
        teacher = served(server, tmp_path, **settings)
        texts = teacher.complete([f"say {number}" for number in range(12)])
        assert all("[key]" in text for (text,) in texts), "the server repeated it"
        assert {header["Authorization"] for header in server.headers} == {f"Bearer {SECRET}"}
        server.key = "another"
        with pytest.raises(UserError, match="answered 401 .*put a valid key into SMALL_KEY") as refused:
            teacher.complete(["more"])
        server.key, server.status = None, 503
        with pytest.raises(UserError, match="no answer in 2 attempts") as failed:
            served(server, tmp_path, **settings, attempts=2).complete(["more"])
    with pytest.raises(UserError, match="ConnectError") as lost:
        served(server, tmp_path, **settings, attempts=2).complete(["more"])
    for error in (refused, failed, lost):
        shown = traceback.TracebackException.from_exception(error.value, capture_locals=True)
        assert SECRET not in "".join(shown.format()) and "\n" not in str(error.value)
    assert SECRET not in caplog.text + repr(teacher) + repr(teacher.endpoint) + repr(vars(teacher))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(SECRET.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize("value", [None, " ", "two words", "schlüssel-geheim"])
def test_a_key_that_cannot_be_is_one_sentence(value, tmp_path, monkeypatch):
    if value is None:
        monkeypatch.delenv("SMALL_KEY", raising=False)
    else:
        monkeypatch.setenv("SMALL_KEY", value)
    with ModelServer() as server:
        with pytest.raises(UserError, match="the environment variable SMALL_KEY (is not set|holds no key)") as error:
            served(server, tmp_path, key_variable="SMALL_KEY").complete(["a"])
        assert not server.headers and "\n" not in str(error.value) and "geheim" not in str(error.value)


def test_what_is_answered_needs_neither_key_nor_server(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALL_KEY", SECRET)
    with ModelServer(key=SECRET) as server:
        texts = served(server, tmp_path, key_variable="SMALL_KEY").complete(["a"])
    monkeypatch.delenv("SMALL_KEY")
    assert served(server, tmp_path, key_variable="SMALL_KEY").complete(["a"]) == texts


# ---------------------------------------------------------------- texts


def test_completions_come_by_prompt_or_by_chat_with_their_settings(well, tmp_path):
    plain, chat = served(well, tmp_path), served(well, tmp_path, chat=True, extra={"top_p": 0.5, "temperature": None})
    assert plain.complete(["a", "b"], n=2, stop=["\n"], seed=7) == [
        ["a and so on 0", "a and so on 1"],
        ["b and so on 0", "b and so on 1"],
    ]
    assert chat.complete(["a"], max_tokens=5, temperature=0.3) == [["you said: a"]]
    assert well.bodies[-1] == {
        "model": "small", "messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "n": 1, "top_p": 0.5,
    }  # fmt: skip
    assert {"prompt": "b", "n": 2, "stop": ["\n"], "seed": 7}.items() <= well.bodies[-2].items() or (
        {"prompt": "a", "n": 2, "stop": ["\n"], "seed": 7}.items() <= well.bodies[-2].items()
    )
    with pytest.raises(UserError, match="list of texts"):
        plain.complete("a")


def test_scores_and_rankings_are_asked_again_until_they_can_be_read(tmp_path):
    def reply(prompt: str, seed: int) -> str:
        if prompt.startswith("never"):
            return "I would rather not."
        text = "2 > 3 > 1" if "rank" in prompt else "Score: 7/10"
        return text if seed >= int(prompt[-1]) else "Hm."

    with ModelServer(reply=reply) as server:
        teacher = served(server, tmp_path, chat=True)
        assert teacher.score(["s 0", "s 2", "never", "s 0"], 1, 10) == [7, 7, None, 7]
        assert teacher.rank(["rank 1", "never 0", "rank 3"], 3) == [[1, 2, 0], None, None]
        # 1 + 3 + 3 attempts at the three scores, 2 + 3 + 3 at the rankings; each is its own question.
        assert teacher.summary.asked == server.answered.total() == 15
        assert [body["temperature"] for body in server.bodies if body["seed"] > 0] == [0.7] * 9


def test_a_deep_copy_of_a_method_shares_the_teacher(well, tmp_path):
    teacher = served(well, tmp_path)
    assert copy.deepcopy({"teacher": teacher})["teacher"] is teacher


def test_the_fingerprint_tells_models_apart_and_not_servers(well, tmp_path):
    one = served(well, tmp_path)
    other = Served({"url": "http://elsewhere/v1", "model": "small"}, tmp_path, vocabulary=9)
    assert one.fingerprint() == other.fingerprint() != served(well, tmp_path, model="large").fingerprint()
    assert one.fingerprint() != served(well, tmp_path, extra={"top_p": 0.5}).fingerprint()


def test_it_is_built_from_plain_settings(well, tmp_path):
    settings = json.loads(json.dumps({"url": well.url, "model": "small", "dialect": "vllm"}))
    teacher = Served(settings, str(tmp_path), vocabulary=len(well.tokenizer), top_k=2, progress=True)
    assert teacher.top_k(rows(2), "text", 2).ids.shape == (2, 12, 2)
    with pytest.raises(UserError, match="top_k is 0; give 1 to"):
        Served(settings, tmp_path, vocabulary=9, top_k=0)
    assert os.listdir(tmp_path)

"""Numbers, rankings and log-probabilities are read by clear rules, or not at all."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data.language import bpe_tokenizer, char_tokenizer
from limbeck.data.tokenizers import train_wordpiece
from limbeck.teachers.replies import ids_by_text, number_in, openai_places, ranking_in, texts, vllm_places


@pytest.mark.parametrize(
    "text, number",
    [
        ("7", 7), ("7/10", 7), ("7.5 / 10", 7.5), ("7 out of 10.", 7), ("I'd give it an 8.", 8), ("**Score:** 9", 9),
        ("On a scale of 1 to 10, this is a 4.", 4), ("Rating (1-10): 6", 6), ("The score is 3. It has 2 errors.", 3),
        ("Score: 4. On reflection, score: 5", 5), ("8, yes, 8", 8), ("7 of the year 2024", 7), ("10/10", 10),
        ("Score: 11", None), ("3 or 4", None), ("good", None), ("", None), ("version 1.2.3", None), ("v2", None),
    ],
)  # fmt: skip
def test_the_number_of_a_text_follows_the_rule(text, number):
    assert number_in(text, 1, 10) == number


def test_numbers_may_be_negative_and_fractions():
    assert number_in("Score: -3", -5, 5) == -3
    assert number_in("0.25", 0, 1) == 0.25 and number_in("0.7/1.0", 0, 1) == 0.7


@given(number=st.integers(0, 100), before=st.sampled_from(["", "Score: ", "I say ", "rating = "]))
@settings(max_examples=25, deadline=None)
def test_a_number_in_range_is_found(number, before):
    assert number_in(f"{before}{number}", 0, 100) == number
    assert number_in(f"{before}{number}/100", 0, 100) == number


@pytest.mark.parametrize(
    "text, order",
    [
        ("2 > 1 > 3", [1, 0, 2]), ("[2, 1, 3]", [1, 0, 2]), ("B, A, C", [1, 0, 2]), ("[2] > [1] > [3]", [1, 0, 2]),
        ("There are 3 candidates.\nRanking: C > B > A", [2, 1, 0]), ("1. B\n2. A\n3. C", [1, 0, 2]),
        ("1) [3]\n2) [1]\n3) [2]", [2, 0, 1]), ("3\n1\n2", [2, 0, 1]), ("Answer: A B C", [0, 1, 2]),
        ("1 > 2", None), ("1 > 2 > 2", None), ("1 > 2 > 4", None), ("none", None), ("", None), ("321", None),
    ],
)  # fmt: skip
def test_a_ranking_is_a_permutation_or_none(text, order):
    assert ranking_in(text, 3) == order


@given(order=st.permutations(range(6)), between=st.sampled_from([" > ", ", ", "\n", "] > ["]), letters=st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_permutation_is_read_back(order, between, letters):
    names = [chr(ord("A") + i) if letters else str(i + 1) for i in order]
    assert ranking_in(between.join(names), 6) == order


def vllm(places: int, written: int = 1, **entry) -> dict:
    entries = {"5": {"logprob": -2.0}, "3": {"logprob": -1.0, "rank": 1}, **entry}
    return {
        "choices": [
            {
                "prompt_logprobs": [None, *[entries] * (places - 1)],
                "logprobs": {"top_logprobs": [{"token_id:7": -0.5}] * written},
            }
        ]
    }


def test_places_are_shifted_and_sorted():
    assert vllm_places(vllm(3), 3) == {
        "tokens": [[3, 5], [3, 5], [7]],
        "log_probs": [[-1.0, -2.0], [-1.0, -2.0], [-0.5]],
    }
    assert vllm_places(vllm(3, written=0), 3)["tokens"] == [[3, 5], [3, 5]]
    reply = {"choices": [{"logprobs": {"top_logprobs": [None, {"a": -2, "b": -1}, {"c": -math.inf}, {"d": 0}]}}]}
    assert openai_places(reply, 3) == {"tokens": [["b", "a"], ["c"], ["d"]], "log_probs": [[-1, -2], [-9999], [0]]}
    assert openai_places(reply, 2)["tokens"] == [["b", "a"], ["c"]]
    reply["choices"][0]["logprobs"]["top_logprobs"][3] = {}
    assert openai_places(reply, 3)["tokens"] == [["b", "a"], ["c"]]


@pytest.mark.parametrize(
    "reply, length, problem",
    [
        (vllm(3), 4, "without prompt_logprobs of its 4 tokens"),
        (vllm(3, **{"4": {"logprob": 0.3}}), 3, "above 0"),
        (vllm(3, **{"4": {"logprob": math.nan}}), 3, "above 0"),
        ({"choices": [{"prompt_logprobs": [None, {}], "logprobs": None}]}, 2, "without any"),
        ({"choices": [{"prompt_logprobs": [None], "logprobs": {"top_logprobs": [{"x": -1}]}}]}, 1, "by their text"),
    ],
)
def test_other_shapes_are_refused(reply, length, problem):
    with pytest.raises(ValueError, match=problem):
        vllm_places(reply, length)


def test_a_gap_in_the_middle_is_no_answer():
    reply = {"choices": [{"logprobs": {"top_logprobs": [None, {}, {"c": -1}, {"d": -1}]}}]}
    with pytest.raises(ValueError, match="a place without"):
        openai_places(reply, 3)


def test_texts_come_in_the_order_of_their_choices():
    assert texts({"choices": [{"index": 1, "text": "b"}, {"index": 0, "text": "a"}]}, 2, False) == ["a", "b"]
    assert texts({"choices": [{"message": {"content": None}}]}, 1, True) == [""]
    with pytest.raises(ValueError, match="1 texts, not 2"):
        texts({"choices": [{"text": "a"}]}, 2, False)
    with pytest.raises(ValueError, match="texts that are none"):
        texts({"choices": [{"text": 5}]}, 1, False)


WORDS = ["the cat sat on the mat", "a naïve café", "cats and mats"]


def test_a_token_is_found_by_its_text_with_the_space_before_it():
    tokenizer = bpe_tokenizer(WORDS * 5, 300)
    ids = ids_by_text(tokenizer)
    for name, i in tokenizer.get_vocab().items():
        text = name.replace("Ġ", " ")
        if text.isascii() and not name.startswith("<"):
            assert ids[text] == i, name
    assert ids["the"] != ids[" the"]
    # Bytes that are no character of their own share one text, which then names none of them.
    assert "�" not in ids


@pytest.mark.parametrize("tokenizer", [char_tokenizer(WORDS), train_wordpiece(WORDS * 5, 60)], ids=["char", "pieces"])
def test_no_text_names_a_token_of_another_text(tokenizer):
    ids = ids_by_text(tokenizer)
    assert {"a", "n"} <= set(tokenizer.get_vocab())
    assert all(ids.get(name, i) == i for name, i in tokenizer.get_vocab().items())

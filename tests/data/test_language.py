"""Tokenizers that are trained on the spot, response masks, and rows of tokens, packed and padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data import LanguageData, MaskTokens, Stream, data_folder, load_language, prompt_tokens
from limbeck.data.language import SPECIAL, bpe_tokenizer, char_tokenizer, language_tokenizer, pack, pad
from limbeck.errors import UserError

TEXT = "the quick brown fox jumps over the lazy dog. " * 20
PAIRS = {
    "train": {"prompt": ["1+1?", "capital of France?"], "response": ["2", "Paris"]},
    "test": {"prompt": ["2+2?"], "response": ["4"]},
}


def scored(data: LanguageData, row: int = 0, split: str = "train") -> list[int]:
    labels = getattr(data, split).fields["labels"][row]
    return labels[labels != -100].tolist()


# ---------------------------------------------------------------- tokenizers


def test_the_char_tokenizer_gives_a_token_a_character_and_the_text_back():
    tokenizer = char_tokenizer(["b\na c"])
    ids = tokenizer("cab\n a")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == list("cab\n a")
    assert tokenizer.decode(ids) == "cab\n a"
    assert len(tokenizer) == len(SPECIAL) + 5


def test_characters_that_the_training_text_lacks_are_unknown():
    tokenizer = char_tokenizer(["abc"])
    assert tokenizer("aZb")["input_ids"][1] == tokenizer.unk_token_id


@settings(max_examples=25, deadline=None)
@given(text=st.text(min_size=1, max_size=40))
def test_the_bpe_tokenizer_gives_any_text_back(text):
    tokenizer = _bpe()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def _bpe(made: list = []):  # noqa: B006
    if not made:
        made.append(bpe_tokenizer([TEXT], 300))
    return made[0]


def test_trained_tokenizers_are_the_same_in_every_run():
    assert bpe_tokenizer([TEXT], 300).get_vocab() == _bpe().get_vocab()
    assert 260 < _bpe().vocab_size <= 300


def test_a_trained_tokenizer_is_saved_and_loaded_by_its_folder(tmp_path):
    _bpe().save_pretrained(tmp_path)
    loaded = language_tokenizer(str(tmp_path))
    assert loaded("the fox")["input_ids"] == _bpe()("the fox")["input_ids"]
    assert loaded.eos_token_id == _bpe().eos_token_id


def test_a_bpe_of_fewer_tokens_than_bytes_is_refused():
    with pytest.raises(UserError, match="needs at least 260"):
        bpe_tokenizer([TEXT], 100)


def test_an_unknown_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no tokenizer '.*'"):
        load_language({"train": TEXT}, tokenizer=str(tmp_path))


# ---------------------------------------------------------------- packed rows


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(2, 200), length=st.integers(2, 40))
def test_packing_scores_every_token_but_the_first_exactly_once(tokens, length):
    place, is_scored = pack(tokens, length)
    assert sorted(place[is_scored].tolist()) == list(range(1, tokens))
    assert not is_scored[:, 0].any()
    assert (place.diff(dim=1) == 1).all() and place.shape[1] == min(length, tokens)


def test_a_text_is_cut_in_order_into_train_validation_and_test():
    text = "".join(chr(65 + i % 26) for i in range(1000))
    data = load_language({"train": text}, max_length=11, validation_fraction=0.1, test_fraction=0.2)
    sizes = {split: len(getattr(data, split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 70, "validation": 10, "test": 20}
    firsts = [data.decode(getattr(data, split).fields["tokens"]["input_ids"][:1])[0][0] for split in sizes]
    assert firsts == [text[0], text[700], text[800]]
    assert data.test.fields["tokens"]["attention_mask"].all()


def test_documents_are_joined_with_the_end_token_and_scored_in_full():
    data = load_language({"train": ["ab", "c"], "test": ["ab"]}, max_length=5, layout="packed")
    end = data.tokenizer.eos_token_id
    ids = data.train.fields["tokens"]["input_ids"]
    a, b, c = data.tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    assert ids.tolist() == [[a, b, end, c, end]]
    assert scored(data) == [b, end, c, end]


def test_prompts_are_not_scored_in_packed_rows_either():
    data = load_language(PAIRS, max_length=64, layout="packed")
    end = data.tokenizer.eos_token_id
    assert data.tokenizer.convert_ids_to_tokens(scored(data)) == ["2", SPECIAL[2], *"Paris", SPECIAL[2]]
    assert scored(data)[1] == end


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_characters_count_what_the_scored_tokens_stand_for(tokenizer):
    data = load_language({"train": TEXT, "test": "the dög"}, tokenizer=tokenizer, vocab_size=300, max_length=16)
    first = len(data.tokenizer.decode(data.test.fields["tokens"]["input_ids"][0, :1]))
    assert int(data.test.fields["characters"].sum()) == len("the dög") - first
    whole = int(data.train.fields["characters"].sum())
    assert len(TEXT) - 8 <= whole < len(TEXT)


# ---------------------------------------------------------------- padded rows


def test_only_the_response_and_its_end_are_scored():
    data = load_language(PAIRS, max_length=32)
    fields = data.train.fields
    ids, mask, labels = fields["tokens"]["input_ids"], fields["tokens"]["attention_mask"], fields["labels"]
    assert data.decode(ids) == ["1+1?\n2", "capital of France?\nParis"]
    assert data.tokenizer.convert_ids_to_tokens(scored(data, 1)) == [*"Paris", SPECIAL[2]]
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert mask.sum(1).tolist() == [len("1+1?\n2") + 1, len("capital of France?\nParis") + 1]
    assert (labels[mask == 0] == -100).all() and (ids[mask == 0] == data.tokenizer.pad_token_id).all()
    assert fields["characters"].tolist() == [1, 5]
    assert fields["prompt"] == PAIRS["train"]["prompt"]


def test_a_document_longer_than_the_model_is_refused_and_cut_on_request():
    with pytest.raises(UserError, match=r"1 of 2 train documents are longer than max_length=15 .* row 1, has 25"):
        load_language(PAIRS, max_length=15)
    with pytest.raises(UserError, match="prompt in row 1 of train takes 19 of max_length=15"):
        load_language(PAIRS, max_length=15, truncate=True)
    cut = load_language(PAIRS, max_length=22, truncate=True)
    assert cut.train.fields["tokens"]["input_ids"].shape == (2, 22)
    assert cut.tokenizer.convert_ids_to_tokens(scored(cut, 1)) == list("Par")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"train": " \n ", "test": "ab"}, "train text is empty"),
        ({"train": ["ab", ""], "test": ["a"]}, "text in row 1 of train is empty"),
        ({"train": {"prompt": ["a"], "response": [" "]}, "test": PAIRS["test"]}, "response in row 0 of train is empty"),
        ({"train": "ab", "test": "a"}, "test text has 1 tokens"),
    ],
)
def test_empty_text_is_named(source, sentence):
    with pytest.raises(UserError, match=sentence):
        load_language(source)


def test_a_missing_column_is_named_with_those_there_are():
    with pytest.raises(UserError, match="no column 'text' of texts, it has question, index; .* text_column"):
        load_language({"train": {"question": ["a"]}, "test": {"question": ["a"]}})


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "input.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="no UTF-8 text"):
        load_language(tmp_path)


def test_limit_keeps_the_first_rows_of_a_split():
    whole = load_language({"train": TEXT}, max_length=9)
    part = load_language({"train": TEXT}, max_length=9, limit={"train": 3})
    assert len(part.train) == 3 and len(part.test) == len(whole.test)
    assert torch.equal(part.train.fields["labels"], whole.train.fields["labels"][:3])


# ---------------------------------------------------------------- prompts and masks


def test_prompts_are_padded_on_the_left_and_begin_like_the_rows():
    data = load_language(PAIRS, max_length=32)
    prompts = prompt_tokens(PAIRS["train"]["prompt"], data.tokenizer)
    assert prompts["attention_mask"].tolist()[0] == [0] * 14 + [1] * 5
    row = data.train.fields["tokens"]["input_ids"][0, :5]
    assert torch.equal(prompts["input_ids"][0, 14:], row)


def test_rows_are_padded_on_either_side():
    assert pad([[1], [2, 3]], 0).tolist() == [[1, 0], [2, 3]]
    assert pad([[1], [2, 3]], 0, "left").tolist() == [[0, 1], [2, 3]]


def test_masking_chooses_15_percent_and_splits_them_80_10_10():
    torch.manual_seed(0)
    ids = torch.randint(10, 1000, (200, 500))
    ids[:, 0] = 2
    mask = torch.ones_like(ids)
    mask[:, -50:] = 0
    view = MaskTokens(mask_id=3, vocab_size=1000, special_ids=(0, 1, 2, 3))
    found = view({"input_ids": ids, "attention_mask": mask})
    chosen = found["labels"] != -100
    assert not chosen[:, 0].any() and not chosen[:, -50:].any()
    assert torch.equal(found["labels"][chosen], ids[chosen])
    assert torch.equal(found["input_ids"][~chosen], ids[~chosen])
    assert float(chosen[:, 1:-50].float().mean()) == pytest.approx(0.15, abs=0.005)
    new, old = found["input_ids"][chosen], ids[chosen]
    assert float((new == 3).float().mean()) == pytest.approx(0.8, abs=0.015)
    assert float((new == old).float().mean()) == pytest.approx(0.1, abs=0.01)


def test_masking_is_a_view_of_a_stream():
    data = load_language({"train": TEXT}, max_length=9)
    stream = Stream(data.train, 4, {"masked": MaskTokens.of(data.tokenizer)}, view_field="tokens", record=["masked"])
    stream.open("unlabelled", seed=0)
    batch = stream.render(stream.next())
    again = stream.views["masked"].apply(batch["tokens"], batch["masked_params"])
    assert torch.equal(again["input_ids"], batch["masked"]["input_ids"])
    assert torch.equal(again["labels"], batch["masked"]["labels"])


# ---------------------------------------------------------------- real data


@pytest.mark.skipif(not (data_folder() / "tiny_shakespeare").is_dir(), reason="tiny_shakespeare is not there")
def test_tiny_shakespeare_is_read_by_its_name():
    data = load_language("tiny_shakespeare", max_length=257, limit=2)
    assert data.vocab_size == 65 + len(SPECIAL)
    assert data.decode(data.train.fields["tokens"]["input_ids"])[0].startswith("First Citizen:\nBefore we proceed")


@pytest.mark.skipif(not (data_folder() / "gsm8k").is_dir(), reason="gsm8k is not there")
def test_gsm8k_gives_pairs_whose_answers_are_scored():
    data = load_language(
        "gsm8k",
        prompt_column="question",
        response_column="answer",
        tokenizer="bpe",
        vocab_size=512,
        max_length=900,
        limit=20,
    )
    answer = data.decode(torch.tensor([scored(data, split="test")]))[0]
    assert answer == data.test.fields["response"][0]


# ---------------------------------------------------------------- classes in words

LABELLED = {
    "train": {"text": ["a fox runs far", "the sun is hot", "dogs bark", "ice is cold"], "label": [1, 0, 1, 0]},
    "test": {"text": ["cats purr"], "label": [1]},
}


def test_classes_become_words_behind_their_texts_and_keep_their_numbers():
    data = load_language(LABELLED, max_length=40, verbalise=["Weather", "Animal"])
    assert data.classes == ["Weather", "Animal"]
    assert data.train.fields["prompt"][0] == "a fox runs far" and data.train.fields["response"][0] == "Animal"
    assert data.train.labels.tolist() == [1, 0, 1, 0]
    ids = data.train.fields["tokens"]["input_ids"][:1]
    assert data.decode(ids) == ["a fox runs far\nAnimal"]


def test_only_the_word_is_scored_and_nothing_ends_it():
    data = load_language(LABELLED, max_length=40, verbalise=["Weather", "Animal"])
    assert data.decode([scored(data, 1)]) == ["Weather"] and data.tokenizer.eos_token_id not in scored(data, 1)


def test_classes_may_speak_for_themselves():
    named = {split: {**part, "label": ["cold", "warm"]} for split, part in
             {"train": {"text": ["ice", "sun"]}, "test": {"text": ["snow", "fire"]}}.items()}  # fmt: skip
    data = load_language(named, max_length=16, verbalise="classes")
    assert data.test.fields["response"] == ["cold", "warm"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"verbalise": ["Animal"]}, "verbalise has 1 words and the data 2 classes"),
        ({"verbalise": ["Animal", "Atom"]}, "'Animal' and 'Atom' of verbalise begin with the same token"),
        ({"verbalise": ["Animal", "Animal"]}, "'Animal' and 'Animal' of verbalise begin with the same token"),
        ({"verbalise": ["X", "Y"], "layout": "packed"}, "verbalise asks for one answer a row"),
    ],
)
def test_words_that_do_not_fit_the_classes_are_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        load_language(LABELLED, max_length=40, **change)


def test_texts_without_classes_cannot_be_put_into_words():
    with pytest.raises(UserError, match="these samples have no field 'label'"):
        load_language(PAIRS, max_length=40, verbalise=["X", "Y"])
    with pytest.raises(UserError, match="verbalise asks for one answer a row"):
        load_language({"train": TEXT}, max_length=40, verbalise=["X", "Y"])


def test_a_prompt_is_shortened_before_the_separator_until_its_response_fits():
    data = load_language(PAIRS, max_length=14, truncate="prompt", separator=" -> ")
    assert data.decode(data.train.fields["tokens"]["input_ids"]) == ["1+1? -> 2", "capi -> Paris"]
    assert data.decode([scored(data, 1)]) == ["Paris"] and scored(data, 1)[-1] == data.tokenizer.eos_token_id


def test_the_splits_stand_still_where_they_have_a_seed_of_their_own():
    many = {"train": {"text": [f"text {n}" for n in range(40)], "label": [n % 2 for n in range(40)]}}
    first, second, other = (
        load_language(many, max_length=16, verbalise=["X", "Y"], test_fraction=0.25, **seeds).test.fields["prompt"]
        for seeds in ({"split_seed": 0, "seed": 1}, {"split_seed": 0, "seed": 2}, {"seed": 2})
    )
    assert first == second != other

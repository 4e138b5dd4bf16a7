"""Text for language models: tokenizers trained on the spot, response masks, packed and padded rows of tokens.

Shapes: T tokens of one split, N rows (samples), L tokens of a row, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from limbeck.data.samples import Data, Samples
from limbeck.data.sources import data_folder, load_data
from limbeck.data.tokenizers import load_tokenizer
from limbeck.errors import UserError, require_share

IGNORE = -100  # the label of a token that no loss and no metric counts: prompt and padding
PAD, UNKNOWN, END, MASK = SPECIAL = ("<pad>", "<unk>", "<eos>", "<mask>")
BLOCK = 1_000_000  # characters in one call of the tokenizer: bounds what its lists take

Texts = dict[str, Any]  # one split: {"text": [...]}, {"prompt": [...], "response": [...]}, or these with "label"


@dataclass(frozen=True, kw_only=True)
class LanguageData(Data):
    """Splits of token rows, and how they were made.

    Each split has the fields `tokens` ({"input_ids", "attention_mask"}, int64 [N, L], padding on the right), `labels`
    (int64 [N, L]: the token itself where it is scored, -100 in prompts and padding) and `characters` (int64 [N]: how
    many characters of text the scored tokens stand for). Pairs keep their texts as `prompt` and `response`, padded
    documents theirs as `text`. Classes that were put into words (`verbalise`) keep their number as `label`.
    """

    tokenizer: Any
    max_length: int
    teacher: Any = None  # a network that students are compared with where they are measured

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.tokenizer)

    def decode(self, ids_BL: Tensor) -> list[str]:
        """The texts of rows of tokens, special tokens left out."""
        return self.tokenizer.batch_decode(ids_BL, skip_special_tokens=True)


def load_language(
    name_or_path: str | Path | Mapping[str, Any],
    *,
    tokenizer: str = "char",
    vocab_size: int = 1024,
    max_length: int = 128,
    layout: Literal["packed", "padded"] | None = None,
    prompt_column: str | None = None,
    response_column: str | None = None,
    text_column: str | None = None,
    separator: str = "\n",
    verbalise: Sequence[str] | Literal["classes"] | None = None,
    truncate: bool | Literal["prompt"] = False,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
    limit: int | Mapping[str, int] | None = None,
    split_seed: int | None = None,
    seed: int = 0,
) -> LanguageData:
    """Rows of tokens for language models, from plain text, documents, or pairs of prompt and response.

    `name_or_path`:

    - a `.txt` file, or a folder that holds one: ONE text, cut in order into train, validation and test, so that the
      test text lies behind the training text and never within it;
    - what `load_data` reads (folders of parquet, csv, jsonl; names): with the columns `prompt` and `response` pairs of
      which only the response is scored, with a column `text` documents. Other names are given by `prompt_column`,
      `response_column` and `text_column`;
    - a mapping `{"train": ..., "test": ...}` of texts, or of mappings of such columns.

    `tokenizer`: `"char"` (every character of the training text) and `"bpe"` (byte-level, `vocab_size` tokens) are
    trained here on the training split and give the same tokens in every run; anything else names one
    (`load_tokenizer`). A pair becomes prompt + `separator`, response, end; tokenizers that have a token of
    their own for the beginning put it first.

    `layout`: `packed` joins all documents of a split and cuts rows of `max_length`, without padding, each token scored
    once (`pack`); `padded` makes every document one row. Default: packed for one text, padded for documents and pairs.
    In packed rows a document sees the ones before it.

    `verbalise` reads a labelled set of texts as pairs for classification by the next token: the text is the prompt, and
    the word of its class the response, with no end behind it. The words in the order of the classes, or `"classes"` for
    the classes' own names; they must begin with different tokens, for a model answers with the first.

    `truncate` says what becomes of a document longer than `max_length` in the padded layout: True cuts off its end,
    `"prompt"` shortens the prompt (before the separator) until the response fits. `limit` keeps the first rows of each
    split, or of those named. `split_seed` (by default the run's `seed`) chooses the documents of splits that are taken
    from `train`: set it where a teacher of another run must not have seen this run's validation or test rows.

    Raises `UserError` for text that is empty, documents longer than `max_length` (unless `truncate`), a prompt that
    leaves no room for its response, an unknown tokenizer, a missing column, or words that do not fit the classes.
    """
    if max_length < 2:
        raise UserError(f"max_length is {max_length}; a language model needs at least 2 tokens, one to predict another")
    columns = (prompt_column, response_column, text_column)
    split_seed = seed if split_seed is None else split_seed
    name, splits, words = _read(name_or_path, columns, verbalise, validation_fraction, test_fraction, split_seed)
    for split, texts in splits.items():
        _refuse_empty(split, texts)
    corpus = {**splits["train"], "separator": [separator]} if "prompt" in splits["train"] else splits["train"]
    reader = language_tokenizer(tokenizer, vocab_size=vocab_size, corpus=corpus)
    one_text = isinstance(splits["train"].get("text"), str)
    packed = (layout or ("packed" if one_text else "padded")) == "packed"
    if verbalise is not None and (words is None or packed):
        raise UserError("verbalise asks for one answer a row, so it takes labelled texts in the padded layout")
    if words is not None:
        _refuse_same_beginning(words, reader)
    room = max_length if truncate == "prompt" and not packed else None
    made = {}
    for split, texts in splits.items():
        documents = _encode(texts, reader, separator, room)
        if packed:
            rows = _packed(split, documents, max_length)
        else:
            rows = _padded(split, documents, max_length, reader.pad_token_id, bool(truncate))
            rows |= {column: values for column, values in texts.items() if not isinstance(values, str)}
        kept = limit.get(split) if isinstance(limit, Mapping) else limit
        samples = Samples(rows, words)
        made[split] = samples if kept is None else samples.select(torch.arange(min(kept, len(samples))))
    return LanguageData(**made, name=name, tokenizer=reader, max_length=max_length)


# ---------------------------------------------------------------- tokenizers


def language_tokenizer(name: str, *, vocab_size: int = 1024, corpus: Mapping[str, Any] | str | None = None) -> Any:
    """A transformers fast tokenizer: `char` or `bpe` trained on `corpus`, or what `load_tokenizer` gives for the name.

    One without a padding token pads with its end token. Raises `UserError` for one that is not there, not fast or has
    no end token, and for a BPE of fewer tokens than there are bytes.
    """
    if name in ("char", "bpe"):
        texts = [corpus] if isinstance(corpus, str) else list(_texts_of(corpus or {}))
        return char_tokenizer(texts) if name == "char" else bpe_tokenizer(texts, vocab_size)
    from transformers import PreTrainedTokenizerFast

    reader = load_tokenizer(name)
    if not isinstance(reader, PreTrainedTokenizerFast) or reader.eos_token_id is None:
        lacks = "end token" if isinstance(reader, PreTrainedTokenizerFast) else "fast version"
        raise UserError(f"the tokenizer '{name}' has no {lacks}; choose another, or train one here by 'char' or 'bpe'")
    if reader.pad_token_id is None:
        reader.pad_token = reader.eos_token
    return reader


def char_tokenizer(texts: Iterable[str]) -> Any:
    """One token a character of `texts`, in the order of their code points, behind pad, unknown, end and mask."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(set().union(*(set(text) for text in texts)))
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return _wrapped(made)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Byte-pair encoding over bytes, so that no text is unknown; at most `vocab_size` tokens, special ones included."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fewest = len(alphabet) + len(SPECIAL)
    if vocab_size < fewest:
        raise UserError(f"vocab_size is {vocab_size}; a byte-level BPE needs at least {fewest} tokens")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return _wrapped(made)


def _wrapped(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------- rows of tokens


def pack(tokens: int, length: int) -> tuple[Tensor, Tensor]:
    """Which tokens of a text each packed row holds: `(place_NL, scored_NL)`, int64 and bool.

    Rows overlap by one token, for the first of a row is only read: so every token but the very first is scored once.
    The last row ends with the text; what it repeats is read and not scored again. A text shorter than `length` makes
    one shorter row.
    """
    length = min(length, tokens)
    starts_N = torch.arange(0, max(tokens - 1, 1), length - 1)
    starts_N = torch.minimum(starts_N, torch.tensor(tokens - length))
    place_NL = starts_N[:, None] + torch.arange(length)
    done_N = torch.cat([torch.zeros(1, dtype=torch.long), place_NL[:-1, -1]])
    return place_NL, place_NL > done_N[:, None]


def pad(rows: Sequence[Sequence[int] | np.ndarray], value: int, side: Literal["left", "right"] = "right") -> Tensor:
    """int64 [N, L]: rows of different lengths filled up with `value`; on the left for prompts that go on."""
    length = max(len(row) for row in rows)
    filled = np.full((len(rows), length), value, dtype=np.int64)
    for number, row in enumerate(rows):
        filled[number, slice(length - len(row), None) if side == "left" else slice(len(row))] = row
    return torch.from_numpy(filled)


def prompt_tokens(prompts: Sequence[str], tokenizer: Any, *, separator: str = "\n") -> dict[str, Tensor]:
    """`{"input_ids", "attention_mask"}` [B, P] of prompts to go on from, padded on the left.

    They begin as `load_language` begins its rows. `separator=""` goes on in the middle of a text.
    """
    start = _beginning(tokenizer)
    encoded = _encodings([prompt + separator for prompt in prompts], tokenizer)
    rows = [[*start, *encoding.ids] for encoding in encoded]
    if not all(rows):
        raise UserError(f"the prompt in row {rows.index([])} is empty; give at least one token to go on from")
    mask = pad([[1] * len(row) for row in rows], 0, "left")
    return {"input_ids": pad(rows, tokenizer.pad_token_id, "left"), "attention_mask": mask}


@dataclass(frozen=True)
class MaskTokens:
    """BERT's masking as a view of the field `tokens`, for masked language models.

    Of all tokens but `special_ids`, `share` is chosen evenly; of these 80 % become `mask_id`, 10 % a random token and
    10 % stay. The view is `{"input_ids", "attention_mask", "labels"}`: labels [B, L] hold the true token where one
    was chosen, else -100. Draws from the global generator. Source: Devlin et al. 2019, section 3.1.
    """

    mask_id: int
    vocab_size: int
    special_ids: Sequence[int] = ()
    share: float = 0.15

    keeps_place = True

    @classmethod
    def of(cls, tokenizer: Any, share: float = 0.15) -> MaskTokens:
        """For a tokenizer. Raises `UserError` where it has no mask token."""
        require_share(share=share)
        if tokenizer.mask_token_id is None:
            raise UserError("the tokenizer has no mask token; use one of a masked language model, or 'char' or 'bpe'")
        return cls(tokenizer.mask_token_id, len(tokenizer), tuple(tokenizer.all_special_ids), share)

    def draw(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Two uniform numbers and a random token for every place."""
        ids_BL = tokens["input_ids"]
        return {
            "chosen": torch.rand(ids_BL.shape, device=ids_BL.device),
            "fate": torch.rand(ids_BL.shape, device=ids_BL.device),
            "random": torch.randint_like(ids_BL, self.vocab_size),
        }

    def apply(self, tokens: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masked tokens that these numbers stand for."""
        ids_BL = tokens["input_ids"]
        special_BL = torch.isin(ids_BL, torch.tensor(self.special_ids, dtype=torch.long, device=ids_BL.device))
        chosen_BL = (params["chosen"] < self.share) & ~special_BL & tokens["attention_mask"].bool()
        masked_BL = torch.where(params["fate"] < 0.8, self.mask_id, params["random"])
        changed_BL = torch.where(chosen_BL & (params["fate"] < 0.9), masked_BL, ids_BL)
        return {**tokens, "input_ids": changed_BL, "labels": ids_BL.masked_fill(~chosen_BL, IGNORE)}

    def __call__(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.apply(tokens, self.draw(tokens))


# ---------------------------------------------------------------- from texts to rows


@dataclass(frozen=True)
class _Document:
    """Tokens of one document: ids, how many of them are prompt, and the characters that each stands for."""

    ids: np.ndarray
    prompt: int
    characters: np.ndarray


def _encode(texts: Texts, tokenizer: Any, separator: str, room: int | None) -> list[_Document]:
    """The documents of a split. `room` is the most tokens that a pair may have; its prompt is shortened to it."""
    start = _beginning(tokenizer)
    end = [] if "label" in texts else [tokenizer.eos_token_id]
    if isinstance(texts.get("text"), str):  # one text that was cut: its pieces neither begin nor end
        pieces = [_scored([], piece, []) for piece in _encodings(_pieces(texts["text"]), tokenizer)]
        ids, characters = (np.concatenate([getattr(p, name) for p in pieces]) for name in ("ids", "characters"))
        return [_Document(ids, 0, characters)]
    if "text" in texts:
        return [_scored(start, encoding, end) for encoding in _encodings(texts["text"], tokenizer)]
    prompts = [prompt.ids for prompt in _encodings([prompt + separator for prompt in texts["prompt"]], tokenizer)]
    responses = _encodings(texts["response"], tokenizer)
    if room is not None:
        last = _encodings([separator], tokenizer)[0].ids
        room -= len(start) + len(end) + len(last)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            kept = max(0, room - len(response.ids))
            if len(prompt) > kept + len(last):
                prompts[row] = prompt[:kept] + last
    return [_scored([*start, *prompt], response, end) for prompt, response in zip(prompts, responses, strict=True)]


def _scored(prompt: list[int], encoding: Any, end: list[int]) -> _Document:
    ids = np.array([*prompt, *encoding.ids, *end], dtype=np.int64)
    # Tokens that share a character (its bytes) count it once, where it is finished.
    ends = np.fromiter((stop for _, stop in encoding.offsets), dtype=np.int64)
    ends = np.maximum.accumulate(np.concatenate([[0], ends]))
    characters = np.zeros(len(ids), dtype=np.int64)
    characters[len(prompt) : len(prompt) + len(encoding.ids)] = np.diff(ends)
    return _Document(ids, len(prompt), characters)


def _beginning(tokenizer: Any) -> list[int]:
    begin = tokenizer.bos_token_id
    return [] if begin is None or begin == tokenizer.eos_token_id else [begin]


def _encodings(texts: Sequence[str], tokenizer: Any) -> list[Any]:
    return tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)


def _pieces(text: str) -> list[str]:
    """A long text in pieces that end with a line, where tokenizers split anyway."""
    pieces = []
    while len(text) > BLOCK:
        cut = text.rfind("\n", 0, BLOCK) + 1 or BLOCK
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def _packed(split: str, documents: list[_Document], max_length: int) -> Texts:
    ids_T = torch.from_numpy(np.concatenate([document.ids for document in documents]))
    characters_T = torch.from_numpy(np.concatenate([document.characters for document in documents]))
    response_T = torch.cat([torch.arange(len(document.ids)) >= document.prompt for document in documents])
    if len(ids_T) < 2:
        raise UserError(f"the {split} text has {len(ids_T)} tokens; a language model needs at least 2, give more text")
    place_NL, scored_NL = pack(len(ids_T), max_length)
    scored_NL &= response_T[place_NL]
    ids_NL = ids_T[place_NL]
    return {
        "tokens": {"input_ids": ids_NL, "attention_mask": torch.ones_like(ids_NL)},
        "labels": ids_NL.masked_fill(~scored_NL, IGNORE),
        "characters": (characters_T[place_NL] * scored_NL).sum(1),
    }


def _padded(split: str, documents: list[_Document], max_length: int, pad_id: int, truncate: bool) -> Texts:
    lengths = [len(document.ids) for document in documents]
    longest = max(lengths)
    if longest > max_length and not truncate:
        over = sum(length > max_length for length in lengths)
        raise UserError(
            f"{over} of {len(lengths)} {split} documents are longer than max_length={max_length} tokens (the longest, "
            f"row {lengths.index(longest)}, has {longest}); raise max_length, or cut them by truncate=True"
        )
    for row, document in enumerate(documents):
        if document.prompt >= max_length:
            raise UserError(
                f"the prompt in row {row} of {split} takes {document.prompt} of max_length={max_length} tokens and "
                "leaves no room for the response; shorten it or raise max_length"
            )
    ids_NL = pad([document.ids[:max_length] for document in documents], pad_id)
    characters_NL = pad([document.characters[:max_length] for document in documents], 0)
    place_L = torch.arange(ids_NL.shape[1])
    inside_NL = place_L < torch.tensor(lengths).clamp(max=max_length)[:, None]
    # The first token of a row has nothing before it to be predicted from.
    scored_NL = inside_NL & (place_L >= torch.tensor([max(document.prompt, 1) for document in documents])[:, None])
    return {
        "tokens": {"input_ids": ids_NL, "attention_mask": inside_NL.long()},
        "labels": ids_NL.masked_fill(~scored_NL, IGNORE),
        "characters": (characters_NL * scored_NL).sum(1),
    }


# ---------------------------------------------------------------- where texts come from


def _read(
    source: str | Path | Mapping[str, Any],
    columns: tuple[str | None, str | None, str | None],
    verbalise: Sequence[str] | Literal["classes"] | None,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
) -> tuple[str, dict[str, Texts], list[str] | None]:
    """Name and texts of every split, and the words of the classes where these are put into words."""
    if isinstance(source, Mapping):
        if isinstance(source.get("train"), str):
            if "test" not in source:
                return "text", _cut(source["train"], "the text", validation_fraction, test_fraction), None
            return "text", {split: {"text": text} for split, text in source.items()}, None
        name, data = "data", load_data(_lists(source), test_fraction=test_fraction, seed=seed, progress=False)
    elif file := _text_file(str(source)):
        return Path(source).stem, _cut(_decoded(file), str(file), validation_fraction, test_fraction), None
    else:
        name = Path(source).name
        data = load_data(
            source, validation_fraction=validation_fraction, test_fraction=test_fraction, seed=seed, progress=False
        )
    words = None if verbalise is None else _words(verbalise, data.train)
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    texts = {
        split: _columns(split, samples, words, *columns) for split, samples in splits.items() if samples is not None
    }
    return name, texts, words


def _words(verbalise: Sequence[str] | Literal["classes"], samples: Samples) -> list[str]:
    """The word of each class."""
    classes = samples.classes
    if classes is None:
        raise UserError(
            f"verbalise puts classes into words, and these samples have no field 'label', they have "
            f"{', '.join(samples.fields)}; name prompts and responses by prompt_column and response_column"
        )
    words = classes if verbalise == "classes" else list(verbalise)
    if len(words) != len(classes):
        raise UserError(
            f"verbalise has {len(words)} words and the data {len(classes)} classes ({', '.join(classes)}); give one "
            "word for each, in this order"
        )
    return words


def _refuse_same_beginning(words: Sequence[str], tokenizer: Any) -> None:
    """A model answers with the first token, so it must tell the classes apart."""
    first = [encoding.ids[0] for encoding in _encodings(words, tokenizer)]
    for number, token in enumerate(first):
        if (other := first.index(token)) < number:
            raise UserError(
                f"the words '{words[other]}' and '{words[number]}' of verbalise begin with the same token; choose "
                "others, or a larger vocabulary"
            )


def _lists(source: Mapping[str, Any]) -> dict[str, Any]:
    """A list of texts alone is a split of documents."""
    return {split: {"text": value} if isinstance(value, list) else value for split, value in source.items()}


def _text_file(source: str) -> Path | None:
    """The plain-text file that is meant, if one is."""
    for place in (Path(source), data_folder() / source):
        if place.is_file() and place.suffix == ".txt":
            return place
        files = sorted(place.glob("*.txt")) if place.is_dir() else []
        if len(files) > 1:
            raise UserError(f"{place} holds {len(files)} text files; name the one to read, such as {files[0]}")
        if files:
            return files[0]
    return None


def _decoded(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _cut(text: str, where: str, validation_fraction: float, test_fraction: float) -> dict[str, Texts]:
    """Train, validation and test text in this order."""
    require_share(validation_fraction=validation_fraction, test_fraction=test_fraction)
    first = round(len(text) * (1 - validation_fraction - test_fraction))
    second = round(len(text) * (1 - test_fraction))
    parts = {"train": text[:first], "validation": text[first:second], "test": text[second:]}
    if not (parts["train"] and parts["test"]):
        raise UserError(
            f"{where} with {len(text)} characters leaves no train or test text at validation_fraction="
            f"{validation_fraction} and test_fraction={test_fraction}; give more text or other fractions"
        )
    return {split: {"text": part} for split, part in parts.items() if part}


def _columns(
    split: str,
    samples: Samples,
    words: Sequence[str] | None,
    prompt: str | None,
    response: str | None,
    text: str | None,
) -> Texts:
    """The columns that the caller named, else prompt and response where there are both, else text; with `words` the
    text as prompt and the word of its class as response."""
    if words is not None:
        texts = _columns(split, samples, None, None, None, prompt or text)
        labels = samples.labels
        return {"prompt": texts["text"], "response": [words[label] for label in labels.tolist()], "label": labels}
    is_pairs = text is None and (prompt or response or {"prompt", "response"} <= samples.fields.keys())
    wanted = (
        {"prompt": prompt or "prompt", "response": response or "response"} if is_pairs else {"text": text or "text"}
    )
    for field, column in wanted.items():
        if not isinstance(samples.fields.get(column), list):
            raise UserError(
                f"the {split} split has no column '{column}' of texts, it has {', '.join(samples.fields)}; name the "
                f"right one by {field}_column"
            )
    return {field: samples.fields[column] for field, column in wanted.items()}


def _refuse_empty(split: str, texts: Texts) -> None:
    for column, values in texts.items():
        if isinstance(values, Tensor):
            continue
        if isinstance(values, str):
            if not values.strip():
                raise UserError(f"the {split} text is empty; give a text with something in it")
            continue
        empty = [row for row, value in enumerate(values) if not value.strip()]
        if empty and column != "prompt":
            raise UserError(
                f"the {column} in row {empty[0]} of {split} is empty ({len(empty)} in all); fill in or drop such rows"
            )


def _texts_of(corpus: Mapping[str, Any]) -> Iterator[str]:
    for values in corpus.values():
        if not isinstance(values, Tensor):
            yield from _pieces(values) if isinstance(values, str) else values

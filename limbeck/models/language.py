"""Language models from transformers as `tokens -> logits_BLV`, and text that they write.

Shapes: B rows, P tokens of a prompt, L tokens of a row, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.load import DESCRIPTION, from_checkpoint, from_configuration, new_configuration, read_configuration
from limbeck.models.modes import evaluating
from limbeck.models.unwrap import LogitsOf, core_network
from limbeck.models.weights import load_weights

IGNORE = -100  # the label of tokens that are not scored


class CausalLM(LogitsOf):
    """A transformers causal model: `{"input_ids": [B, L], ...} -> logits_BLV`, place i predicting token i + 1.

    Padding must be on the RIGHT: no real token then ever sees it, so `attention_mask` is not read and attention keeps
    its fused causal kernels. `generate` takes prompts with padding on either side and returns rows with padding on the
    right. (A plain forward of transformers asks the device once whether positions restart; a compiled one does not.)
    """

    _head_is_plain = False  # until `head` has looked

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        return self.model(input_ids=tokens["input_ids"], use_cache=False).logits

    def hidden(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """hidden_BLD, what the output layer reads: `logits = hidden @ weight_VD^T + bias_V` with those of `head`."""
        body: Any = self.model.base_model
        return body(input_ids=tokens["input_ids"], use_cache=False).last_hidden_state

    def head(self) -> tuple[Tensor, Tensor | None]:
        """The output layer's own (weight_VD, bias_V or None); tied embeddings are the very tensor that they share.

        The first call runs four tokens through the model to see that its logits are just that layer of `hidden`. Raises
        `UserError` where they are not: heads that are no plain linear layer, logits that are scaled or soft-capped.
        """
        layer = self._output_layer()
        if not self._head_is_plain:
            self._require_plain(layer)
            self._head_is_plain = True
        return layer.weight, layer.bias

    def _output_layer(self) -> nn.Linear:
        get = getattr(self.model, "get_output_embeddings", None)
        layer = get() if get is not None else None
        if type(layer) is not nn.Linear or getattr(self.model, "base_model", self.model) is self.model:
            raise UserError(
                f"the output layer of {type(self.model).__name__} is {type(layer).__name__}, not a plain linear layer "
                "behind a body of its own; only whole logits can be had of it, so leave out `chunk`"
            )
        return layer

    def _require_plain(self, layer: nn.Linear) -> None:
        """Watch what the layer reads, and put far numbers in place of its answer: they must come out as the logits."""
        read, answer = [], []

        def watch(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            read.append(inputs[0])
            answer.append(torch.linspace(-99, 99, output.numel()).view_as(output).to(output))
            return answer[0]

        words, device = layer.weight.shape[0], layer.weight.device
        tokens = {"input_ids": torch.arange(4, device=device)[None] % words}
        handle = layer.register_forward_hook(watch)
        try:
            with torch.no_grad(), evaluating(self.model):
                logits, hidden = self(tokens), self.hidden(tokens)
        finally:
            handle.remove()
        if len(read) != 1 or not torch.equal(answer[0].to(logits), logits) or not torch.allclose(read[0], hidden):
            raise UserError(
                f"the logits of {type(self.model).__name__} are more than a linear layer of its hidden states (scaled, "
                "soft-capped or transformed); they cannot be computed a chunk at a time, so leave out `chunk`"
            )


class MaskedLM(LogitsOf):
    """A transformers masked model: `{"input_ids", "attention_mask"} [B, L] -> logits_BLV`, place i for token i.

    Other entries of the dict (`labels`) are left alone.
    """

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        return self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits


LanguageModel = CausalLM | MaskedLM


def load_language_model(
    name: str | Path | nn.Module,
    *,
    vocab_size: int | None = None,
    max_length: int | None = None,
    eos_id: int | None = None,
    weights: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The causal or masked language model of that name: `tokens -> logits_BLV`.

    `name` is one of

    - `hf-config:<model type>`: new weights, `config` overrides the type's configuration:
      `load_language_model("hf-config:gpt2", vocab_size=69, max_length=128, config={"n_layer": 1, "n_embd": 48})`;
      a type that can be both (`bert`) is masked, and causal with `config={"is_decoder": True}`;
    - `hf:<hub id or folder>`: a checkpoint with its weights (safetensors only);
    - a folder that `save_model` or transformers' `save_pretrained` wrote;
    - an `nn.Module`, taken as it is.

    `vocab_size`, `max_length`, `eos_id` say what the data need: a new network is built for them; a
    checkpoint is checked against them (it may have more words and places). `weights`: a safetensors file or folder,
    loaded into the network. `attn_implementation`: `sdpa`, `eager`, `flash_attention_2`, ... of transformers.

    Raises `UserError` for an unknown name or configuration key, a type without a language model, weights that do not
    fit, a vocabulary or a context that is too small for the data.
    """
    if isinstance(name, nn.Module):
        model = name
    elif str(name).startswith("hf-config:"):
        asked = {
            "vocab_size": vocab_size,
            "max_position_embeddings": max_length,
            "eos_token_id": eos_id,
            "bos_token_id": eos_id,
        }
        given = {key: value for key, value in asked.items() if value is not None}
        built = new_configuration(str(name)[10:], given, config or {})
        auto, wrapper = _auto_class(built)
        _check_room(str(name), built, vocab_size, max_length)
        model = wrapper(from_configuration(auto, built, attn_implementation))
    else:
        model = _pretrained(str(name), config, vocab_size, max_length, attn_implementation, trust_remote_code)
    if weights is not None:
        load_weights(core_network(model), weights)
    return model


def _pretrained(
    name: str,
    config: Mapping[str, Any] | None,
    vocab_size: int | None,
    max_length: int | None,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> nn.Module:
    source = name.removeprefix("hf:")
    if config:
        raise UserError(f"config={dict(config)} describes a new network, but '{name}' is already built; leave it out.")
    if not name.startswith("hf:") and not (Path(source) / "config.json").exists():
        raise UserError(
            f"There is no language model '{name}'; give 'hf:<hub id or folder>', 'hf-config:<model type>', or a folder "
            f"with config.json (and {DESCRIPTION}, where Limbeck wrote it)."
        )
    settings = read_configuration(source, trust_remote_code)
    auto, wrapper = _auto_class(settings)
    _check_room(name, settings, vocab_size, max_length)
    model, random = from_checkpoint(auto, source, settings, attn_implementation, trust_remote_code)
    if random:
        raise UserError(
            f"'{source}' has no weights for {len(random)} parts (first '{random[0]}'), which would be random; choose a "
            "checkpoint of a language model."
        )
    return wrapper(model)


def _check_room(name: str, settings: Any, vocab_size: int | None, max_length: int | None) -> None:
    """The data's tokens and rows must fit. Models without a limit of places (recurrent ones) state none."""
    words, places = settings.vocab_size, getattr(settings, "max_position_embeddings", None)
    if vocab_size is not None and words < vocab_size:
        raise UserError(
            f"'{name}' knows {words} tokens and the data's tokenizer gives {vocab_size}; read the data with that "
            "model's own tokenizer (data.tokenizer), or build the model with more"
        )
    if max_length is not None and isinstance(places, int) and places < max_length:
        raise UserError(
            f"the data's rows have up to {max_length} tokens and '{name}' has {places} places; lower max_length, or "
            "take a model with a longer context"
        )


def _auto_class(settings: Any) -> tuple[Any, type[LanguageModel]]:
    """The transformers auto class for that configuration, and our wrapper."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
    )

    said = " ".join([*(settings.architectures or []), *(getattr(settings, "auto_map", None) or {})])
    causal = type(settings) in MODEL_FOR_CAUSAL_LM_MAPPING
    if "ForMaskedLM" in said or (
        type(settings) in MODEL_FOR_MASKED_LM_MAPPING
        and "CausalLM" not in said
        and not (causal and settings.is_decoder)
    ):
        return AutoModelForMaskedLM, MaskedLM
    if causal or "CausalLM" in said:
        return AutoModelForCausalLM, CausalLM
    raise UserError(
        f"transformers has no causal or masked language model of type '{settings.model_type}'; choose a type such as "
        "gpt2, llama or bert, or build the model yourself and pass it as an nn.Module."
    )


def vocabulary_size(model: nn.Module) -> int | None:
    """How many words the logits of a transformers language model speak of; None for other networks."""
    config = getattr(core_network(model), "config", None)
    return getattr(config, "vocab_size", None)


def require_same_vocabulary(student: nn.Module, teacher: object) -> None:
    """Raise `UserError` where student and teacher are known to speak of different numbers of words."""
    network = getattr(teacher, "model", None)
    theirs = vocabulary_size(network) if isinstance(network, nn.Module) else getattr(teacher, "words", None)
    ours = vocabulary_size(student)
    if None not in (ours, theirs) and ours != theirs:
        raise UserError(
            f"the teacher's logits speak of {theirs} tokens and the student's of {ours}; distilling token by token "
            "needs one tokenizer and one vocabulary, so build the student with the teacher's"
        )


def require_output_layer(model: object, whose: str) -> CausalLM:
    """`model`, if its logits can be computed from hidden states; `whose` ("student", "teacher") is for the message.

    Raises `UserError` for a network that is no `CausalLM`, or whose output layer is not plain (`CausalLM.head`).
    """
    if not isinstance(model, CausalLM):
        found = "not one network in memory" if model is None else f"a {type(model).__name__}"
        raise UserError(
            f"chunk needs a {whose} that is a causal transformers model, whose hidden states can be had, and this one "
            f"is {found}; leave out `chunk`" + (", or set `top_k`" if whose == "teacher" else "")
        )
    model.head()
    return model


# ---------------------------------------------------------------- text that a model writes


class Written(NamedTuple):
    """Prompts and what was written after them, padding on the right.

    `tokens`: {"input_ids", "attention_mask"} [B, P + new], as `CausalLM` reads them. `labels` [B, P + new]: the token
    where the model wrote it (the end token included), -100 in the prompt and behind the end: a batch to train on.
    """

    tokens: dict[str, Tensor]
    labels: Tensor


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Mapping[str, Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Written:
    """Sample text after each prompt, in eval mode and without gradients.

    Token by token from softmax(logits / temperature), cut to the `top_k` likeliest words and then to the smallest set
    of likeliest ones whose probabilities reach `top_p`. `temperature=0` takes the likeliest. A row ends at `eos_id`
    (-1: never); `eos_id` and `pad_id` default to those of the model's configuration (without any, padding is 0).
    `generator` makes samples repeatable. `use_cache` keeps keys and values of past tokens, so that a new token costs
    one place; without it the whole row is run again: slower, and for models that cannot cache.

    Args:
        prompts: `input_ids` and `attention_mask` [B, P], padding on either side, at least one real token a row.

    Raises:
        UserError: `model` is no causal transformers model, or prompt and new tokens exceed its places.
    """
    core = core_network(model)
    if not (
        isinstance(model, nn.Module) and hasattr(core, "config") and hasattr(core, "prepare_inputs_for_generation")
    ):
        raise UserError(f"{type(core).__name__} is no causal model of transformers; load one by load_language_model")
    settings: Any = core.config
    stated = settings.eos_token_id if eos_id is None else eos_id  # some checkpoints state several
    ends = [end for end in (stated if isinstance(stated, list) else [stated]) if end is not None and end >= 0]
    pad_id = next((each for each in (pad_id, settings.pad_token_id, *ends) if each is not None), 0)
    ids_BL, mask_BL = _align(prompts["input_ids"], prompts["attention_mask"], pad_id, left=True)
    width, places = ids_BL.shape[1], getattr(settings, "max_position_embeddings", None)
    if isinstance(places, int) and width + max_new_tokens > places:
        raise UserError(
            f"a prompt of {width} tokens and {max_new_tokens} new ones exceed the model's {places} places; shorten the "
            "prompt or lower max_new_tokens"
        )
    running_B, past = torch.ones_like(ids_BL[:, 0]), None
    with evaluating(core):
        for _ in range(max_new_tokens):
            place_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
            new = slice(-1, None) if past is not None else slice(None)
            answer = core(
                input_ids=ids_BL[:, new],
                attention_mask=mask_BL,
                position_ids=place_BL[:, new],
                past_key_values=past,
                use_cache=use_cache,
            )
            past = answer.past_key_values if use_cache else None
            token_B = _draw(answer.logits[:, -1].float(), temperature, top_k, top_p, generator)
            ids_BL = torch.cat([ids_BL, torch.where(running_B.bool(), token_B, pad_id)[:, None]], 1)
            mask_BL = torch.cat([mask_BL, running_B[:, None]], 1)
            for end in ends:
                running_B = running_B * (token_B != end)
            if ends and not running_B.any():
                break
    place_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    labels_BL = ids_BL.masked_fill((place_L < width) | (mask_BL == 0), IGNORE)
    labels_BL, _ = _align(labels_BL, mask_BL, IGNORE, left=False)
    ids_BL, mask_BL = _align(ids_BL, mask_BL, pad_id, left=False)
    return Written({"input_ids": ids_BL, "attention_mask": mask_BL}, labels_BL)


def _align(values_BL: Tensor, mask_BL: Tensor, fill: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Every row with its padding on that side, in the order it had, and the mask that goes with it."""
    order_BL = mask_BL.argsort(dim=1, stable=True, descending=not left)
    mask_BL = mask_BL.gather(1, order_BL)
    return values_BL.gather(1, order_BL).masked_fill(mask_BL == 0, fill), mask_BL


def _draw(
    logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One word a row."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / temperature
    if top_k is not None:
        least_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if top_p is not None:
        p_BV, order_BV = logits_BV.softmax(-1).sort(descending=True)
        # A word stays when those before it have not yet reached top_p, so the likeliest always does.
        out_BV = torch.zeros_like(p_BV, dtype=torch.bool).scatter(1, order_BV, p_BV.cumsum(-1) - p_BV >= top_p)
        logits_BV = logits_BV.masked_fill(out_BV, -torch.inf)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]

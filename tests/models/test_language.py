"""Language models from transformers: built, saved and loaded, and text that they write."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models import (
    CausalLM,
    MaskedLM,
    class_count,
    core_network,
    evaluating,
    export_model,
    generate,
    load_language_model,
    measure_cost,
    require_same_vocabulary,
    save_model,
    vocabulary_size,
)
from limbeck.teachers import Frozen

V, PLACES = 13, 24
CONFIGS = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2},
    "llama": {
        "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 32,
    },
}  # fmt: skip
BERT = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def causal(kind: str = "llama", seed: int = 0, sharpness: float = 8.0, **options: object) -> nn.Module:
    """A model with sure opinions, so that what it writes depends on its context."""
    torch.manual_seed(seed)
    model = load_language_model(
        f"hf-config:{kind}", vocab_size=V, max_length=PLACES, eos_id=2, config=CONFIGS[kind], **options
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(sharpness)
    return model


def prompts(*lengths: int, seed: int = 1) -> dict[str, Tensor]:
    """Random prompts of these lengths, padded on the left with 0."""
    generator, width = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(3, V, (len(lengths), width), generator=generator)
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


def row(tokens: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """One prompt alone, without padding."""
    kept = tokens["attention_mask"][number].bool()
    return {name: part[number][kept][None] for name, part in tokens.items()}


def drawn(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_new_model_has_the_datas_vocabulary_and_places(kind):
    model = causal(kind)
    assert isinstance(model, CausalLM)
    assert model({"input_ids": torch.zeros(2, 5, dtype=torch.long)}).shape == (2, 5, V)
    settings = core_network(model).config
    assert (settings.vocab_size, settings.max_position_embeddings, settings.eos_token_id) == (V, PLACES, 2)
    assert vocabulary_size(model) == V and class_count(model) is None


def test_bert_is_masked_and_causal_as_a_decoder():
    masked = load_language_model("hf-config:bert", vocab_size=V, max_length=PLACES, config=BERT)
    decoder = load_language_model(
        "hf-config:bert", vocab_size=V, max_length=PLACES, config={**BERT, "is_decoder": True}
    )
    assert isinstance(masked, MaskedLM) and isinstance(decoder, CausalLM)
    tokens = {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert masked(tokens).shape == decoder(tokens).shape == (1, 4, V)


def test_a_masked_model_does_not_see_padding():
    torch.manual_seed(0)
    model = load_language_model("hf-config:bert", vocab_size=V, max_length=PLACES, config=BERT).eval()
    mask = torch.tensor([[1, 1, 1, 0]])
    one, other = (model({"input_ids": torch.tensor([[5, 6, 7, last]]), "attention_mask": mask}) for last in (0, 9))
    torch.testing.assert_close(one[:, :3], other[:, :3])


@pytest.mark.parametrize("kind", [*CONFIGS, "bert"])
def test_a_saved_model_is_loaded_by_its_folder(kind, tmp_path):
    if kind == "bert":
        model = load_language_model("hf-config:bert", vocab_size=V, max_length=PLACES, config=BERT)
    else:
        model = causal(kind)
    save_model(model, tmp_path)
    loaded = load_language_model(tmp_path, vocab_size=V, max_length=PLACES)
    assert type(loaded) is type(model)
    ids = torch.randint(0, V, (2, 6))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(loaded.eval()(tokens), model.eval()(tokens))
    fresh = load_language_model(f"hf:{tmp_path}", weights=tmp_path / "model.safetensors")
    assert torch.equal(fresh.eval()(tokens), model(tokens))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "hf-config:gtp2"}, "did you mean 'gpt2'"),
        ({"name": "hf-config:gpt2", "config": {"layers": 1}}, "has no 'layers'"),
        ({"name": "hf-config:resnet", "config": {}}, "no causal or masked language model of type 'resnet'"),
        ({"name": "no/such/folder"}, "no language model 'no/such/folder'"),
        ({"name": "hf-config:gpt2", "config": {"n_positions": 8, "vocab_size": 20}, "max_length": 9}, "8 places"),
        ({"name": "hf-config:gpt2", "config": {"vocab_size": 20}, "vocab_size": 30}, "knows 20 tokens .* gives 30"),
    ],
)
def test_what_does_not_fit_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        load_language_model(arguments.pop("name"), **arguments)


def test_a_checkpoint_that_is_too_small_for_the_data_is_refused(tmp_path):
    save_model(causal(), tmp_path)
    with pytest.raises(UserError, match="13 tokens and the data's tokenizer gives 14"):
        load_language_model(tmp_path, vocab_size=14)
    with pytest.raises(UserError, match="rows have up to 25 tokens .* 24 places"):
        load_language_model(tmp_path, max_length=25)


def test_other_vocabularies_of_teacher_and_student_are_refused():
    student = load_language_model("hf-config:gpt2", vocab_size=V + 1, max_length=8, config=CONFIGS["gpt2"])
    require_same_vocabulary(causal(), Frozen(causal("gpt2")))
    with pytest.raises(UserError, match="13 tokens and the student's of 14"):
        require_same_vocabulary(student, Frozen(causal()))


def test_the_attention_implementation_is_chosen_and_changes_no_value():
    eager, sdpa = causal(attn_implementation="eager"), causal(attn_implementation="sdpa")
    assert core_network(eager).config._attn_implementation == "eager"
    tokens = {"input_ids": torch.randint(0, V, (2, 7))}
    torch.testing.assert_close(eager.eval()(tokens), sdpa.eval()(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_padding_on_the_right_is_never_seen_by_real_tokens(kind):
    model, ids = causal(kind).eval(), torch.randint(3, V, (1, 7))
    alone, padded = model({"input_ids": ids[:, :4]}), model({"input_ids": ids})
    torch.testing.assert_close(alone, padded[:, :4], rtol=1e-4, atol=1e-4)


def test_costs_and_export_take_the_input_ids(tmp_path):
    model, example = causal().eval(), {"input_ids": torch.randint(0, V, (2, 6))}
    assert measure_cost(model, example, repeats=1).flops > 0
    assert export_model(model, tmp_path, example, formats=("safetensors",))["safetensors"].exists()


def test_evaluating_gives_every_module_its_own_mode_back():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]


# ---------------------------------------------------------------- hidden states and output layer


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", CONFIGS["llama"]),
        ("llama", CONFIGS["llama"] | {"tie_word_embeddings": True}),
        ("gpt2", CONFIGS["gpt2"]),
        ("gpt_neox", {key: value for key, value in CONFIGS["llama"].items() if key != "num_key_value_heads"}),
        ("phi", CONFIGS["llama"]),  # its output layer has a bias
        ("opt", {"num_hidden_layers": 1, "hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2,
                 "word_embed_proj_dim": 8}),
    ],
)  # fmt: skip
def test_hidden_states_and_output_layer_make_the_logits(kind, config):
    model = load_language_model(f"hf-config:{kind}", vocab_size=V, max_length=PLACES, eos_id=2, config=config).eval()
    tokens = {"input_ids": torch.randint(0, V, (2, 7))}
    weight_VD, bias_V = model.head()
    assert weight_VD is model.model.get_output_embeddings().weight and (bias_V is not None) == (kind == "phi")
    torch.testing.assert_close(F.linear(model.hidden(tokens), weight_VD, bias_V), model(tokens))


def test_looking_at_the_output_layer_leaves_the_model_as_it_was():
    model = causal("gpt2").train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    drawn_before = torch.get_rng_state()
    model.head()
    assert torch.equal(torch.get_rng_state(), drawn_before) and model.training and model.model.lm_head.training
    assert model.state_dict().keys() == state.keys() and not model.model.lm_head._forward_hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("gemma2", CONFIGS["llama"] | {"head_dim": 8, "final_logit_softcapping": 30.0}, "more than a linear layer"),
        ("cohere", CONFIGS["llama"] | {"logit_scale": 0.25}, "more than a linear layer"),
        ("bert", BERT | {"is_decoder": True}, "more than a linear layer"),
    ],
)
def test_logits_that_are_more_than_a_linear_layer_are_refused(kind, config, reason):
    model = load_language_model(f"hf-config:{kind}", vocab_size=V, max_length=PLACES, eos_id=2, config=config)
    assert isinstance(model, CausalLM)
    with pytest.raises(UserError, match=reason):
        model.head()


def test_a_head_that_is_no_linear_layer_is_refused():
    model = causal("llama")
    model.model.lm_head = nn.Sequential(model.model.lm_head)
    with pytest.raises(UserError, match="Sequential, not a plain linear layer"):
        model.head()


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("kind", CONFIGS)
def test_generation_with_cache_equals_generation_without(kind):
    model = causal(kind)
    one = generate(model, prompts(3, 7, 5), max_new_tokens=12, generator=drawn(), eos_id=-1)
    two = generate(model, prompts(3, 7, 5), max_new_tokens=12, generator=drawn(), eos_id=-1, use_cache=False)
    assert torch.equal(one.labels, two.labels)
    assert len(one.labels[one.labels >= 0].unique()) > 3  # no constant that any bug would give too


@pytest.mark.parametrize("kind", CONFIGS)
def test_padding_on_either_side_changes_nothing_of_what_is_written(kind):
    model, many = causal(kind), prompts(3, 7, 5)
    together = generate(model, many, max_new_tokens=8, temperature=0, eos_id=-1)
    right = {name: torch.stack([part[i].roll(int(many["attention_mask"][i].sum())) for i in range(3)])
             for name, part in many.items()}  # fmt: skip
    assert torch.equal(generate(model, right, max_new_tokens=8, temperature=0, eos_id=-1).labels, together.labels)
    for number in range(3):
        alone = generate(model, row(many, number), max_new_tokens=8, temperature=0, eos_id=-1)
        assert torch.equal(alone.labels[alone.labels >= 0], together.labels[number][together.labels[number] >= 0])


def test_the_likeliest_token_is_taken_one_by_one():
    model, start = causal().eval(), row(prompts(4), 0)
    ids = start["input_ids"]
    for _ in range(6):
        ids = torch.cat([ids, model({"input_ids": ids})[:, -1].argmax(-1, keepdim=True)], 1)
    found = generate(model, start, max_new_tokens=6, temperature=0, eos_id=-1)
    assert torch.equal(found.tokens["input_ids"], ids)
    assert torch.equal(found.labels, torch.cat([torch.full((1, 4), -100), ids[:, 4:]], 1))


def test_a_row_ends_with_the_end_token_and_is_padded_on_the_right():
    model, many = causal(seed=3, sharpness=1.0), prompts(2, 6, 4)
    found = generate(model, many, max_new_tokens=16, eos_id=2, pad_id=0, generator=drawn(8))
    ends = (found.labels == 2).sum(1)
    assert ends.any()
    for number in range(3):
        mask = found.tokens["attention_mask"][number].bool()
        ids, labels = found.tokens["input_ids"][number], found.labels[number]
        size = int(mask.sum())
        assert mask[:size].all() and (ids[size:] == 0).all() and (labels[size:] == -100).all()
        written = labels[labels >= 0]
        assert torch.equal(ids[size - len(written) : size], written)
        assert (written[:-1] != 2).all() and (ends[number] == 0 or written[-1] == 2)


def test_a_generator_makes_samples_repeatable_and_leaves_the_global_one_alone():
    model = causal(sharpness=1.0)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, same, other = (generate(model, prompts(3), max_new_tokens=8, generator=drawn(s)).labels for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_top_k_and_top_p_of_almost_nothing_take_the_likeliest():
    model, greedy = causal(), generate(causal(), prompts(3), max_new_tokens=8, temperature=0).labels
    for cut in ({"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(generate(model, prompts(3), max_new_tokens=8, generator=drawn(), **cut).labels, greedy)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    from limbeck.models.language import _draw

    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]])).expand(4000, 4)
    found = _draw(logits, 1.0, None, 0.7, drawn()).bincount(minlength=4) / 4000
    torch.testing.assert_close(found, torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=0.03, rtol=0)
    found = _draw(logits, 1.0, 3, None, drawn()).bincount(minlength=4) / 4000
    torch.testing.assert_close(found, torch.tensor([0, 0.5, 0.15, 0.25]) / 0.9, atol=0.03, rtol=0)


def test_writing_uses_eval_mode_and_restores_training():
    model = load_language_model(
        "hf-config:gpt2", vocab_size=V, max_length=PLACES, eos_id=2, config={**CONFIGS["gpt2"], "resid_pdrop": 0.9}
    ).train()
    one, two = (generate(model, prompts(3), max_new_tokens=8, generator=drawn()).labels for _ in range(2))
    assert torch.equal(one, two)
    assert all(module.training for module in core_network(model).modules())


def test_what_was_written_can_be_trained_on():
    model = causal(sharpness=1.0)
    written = generate(model, prompts(3, 5), max_new_tokens=6, generator=drawn())
    logits = model(written.tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), written.labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(UserError, match="20 tokens and 5 new ones exceed the model's 24 places"):
        generate(causal(), prompts(20), max_new_tokens=5)
    with pytest.raises(UserError, match="no causal model"):
        generate(nn.Linear(1, 1), prompts(2), max_new_tokens=1)

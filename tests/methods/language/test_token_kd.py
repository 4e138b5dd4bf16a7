"""Token KD: each divergence by its definition, and the labels' share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.losses import shift, token_cross_entropy
from limbeck.methods.language.token_kd import TokenKD
from limbeck.models import load_language_model
from limbeck.teachers import Ensemble, Frozen

B, L, V = 3, 6, 5


class Bigram(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, V, generator=torch.Generator().manual_seed(seed)))

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.table[tokens["input_ids"]]


def batch() -> dict[str, dict]:
    ids = torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :2] = -100
    return {"labelled": {"tokens": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "labels": labels}}


def kd(**settings: object) -> TokenKD:
    return TokenKD(Bigram(0), Frozen(Bigram(1)), **settings)  # type: ignore[arg-type]


def definition(name: str, p: Tensor, q: Tensor) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    match name:
        case "forward":
            return kl(p, q)
        case "reverse":
            return kl(q, p)
        case "jensen_shannon":
            return 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2)
        case "skew":
            return kl(p, 0.1 * p + 0.9 * q)
        case "skew_reverse":
            return kl(q, 0.1 * q + 0.9 * p)
    return 0.5 * (p - q).abs().sum(-1)


@pytest.mark.parametrize("name", ["forward", "reverse", "jensen_shannon", "skew", "skew_reverse", "total_variation"])
def test_the_loss_is_the_mean_divergence_of_the_scored_tokens_times_t_squared(name):
    method = kd(divergence=name, temperature=2.0)
    fields = batch()["labelled"]
    student, labels = shift(method.student(fields["tokens"]), fields["labels"])
    teacher, _ = shift(method.teacher.logits(fields, "tokens"), fields["labels"])
    rows = definition(name, (teacher / 2).softmax(-1), (student / 2).softmax(-1))[labels != -100]
    torch.testing.assert_close(method.training_step(batch())["kd"], 4 * rows.mean())


def test_labels_and_divergence_share_the_loss():
    method = kd(ratio=0.25)
    losses = method.training_step(batch())
    fields = batch()["labelled"]
    ce = token_cross_entropy(*shift(method.student(fields["tokens"]), fields["labels"]), reduction="token_mean")
    torch.testing.assert_close(losses["ce"], ce)
    assert method.weights == {"ce": 0.75, "kd": 0.25}
    assert kd().training_step(batch()).keys() == {"kd"}


def test_with_no_share_the_teacher_is_not_asked():
    class Absent(Frozen):
        def __call__(self, fields, view):
            raise AssertionError("asked")

    method = TokenKD(Bigram(0), Absent(Bigram(1)), ratio=0)
    assert method.training_step(batch()).keys() == {"ce"} == method.weights.keys()


def test_the_teacher_gets_no_gradient():
    method = kd()
    method.training_step(batch())["kd"].backward()
    assert method.student.table.grad is not None and method.teacher.model.table.grad is None


@pytest.mark.parametrize("wrong", [{"divergence": "kl"}, {"temperature": 0.0}, {"ratio": 1.5}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UserError):
        kd(**wrong)


def test_models_of_other_vocabularies_are_refused():
    config = {"n_layer": 1, "n_embd": 8, "n_head": 1}
    small, big = (load_language_model("hf-config:gpt2", vocab_size=v, max_length=8, config=config) for v in (5, 6))
    with pytest.raises(UserError, match="6 tokens and the student's of 5"):
        TokenKD(small, Frozen(big))


# ---------------------------------------------------------------- a vocabulary in chunks, a teacher in part

CONFIG = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}


def transformer(seed: int, width: int = 8, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    model = load_language_model(
        "hf-config:llama", vocab_size=V, max_length=8, eos_id=1, config=CONFIG | {"hidden_size": width} | config
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)  # so that the two have opinions, and other ones
    return model


def step(student: nn.Module, **settings: object) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Losses of one step and the gradients of their weighted sum."""
    method = TokenKD(student, Frozen(transformer(1, width=12)), **settings)  # type: ignore[arg-type]
    losses = method.training_step(batch())
    total = sum(method.weights[name] * loss for name, loss in losses.items())
    return losses, list(torch.autograd.grad(total, list(student.parameters())))


SPARSE = [{"top_k": 2, "rest": "ignore"}, {"top_k": 2, "rest": "spread"}, {"top_k": 2, "rest": "bucket"}]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        *({"divergence": name, "temperature": 2.0} for name in ("forward", "reverse", "jensen_shannon", "skew")),
        {"divergence": "skew_reverse"},
        {"divergence": "total_variation"},
        {"ratio": 0.25},
        {"ratio": 0.0},
        *SPARSE,
    ],
)
def test_in_chunks_losses_and_gradients_are_those_of_whole_logits(settings, tied):
    student = transformer(0, tie_word_embeddings=tied)
    (wanted, slopes), (found, chunked) = (step(student, chunk=chunk, **settings) for chunk in (None, 3))
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])
    for one, other in zip(chunked, slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", SPARSE)
def test_with_the_whole_vocabulary_kept_it_is_the_dense_loss(settings):
    whole = kd(temperature=1.0).training_step(batch())["kd"]
    torch.testing.assert_close(kd(**(settings | {"top_k": V})).training_step(batch())["kd"], whole)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_top_k_compares_with_the_teachers_recovered_distribution(divergence):
    method = kd(divergence=divergence, top_k=2)
    fields = batch()["labelled"]
    student, labels = shift(method.student(fields["tokens"]), fields["labels"])
    teacher, _ = shift(method.teacher.top_k(fields, "tokens", 2).dense("spread"), fields["labels"])
    rows = definition(divergence, teacher.exp(), student.softmax(-1))[labels != -100]
    torch.testing.assert_close(method.training_step(batch())["kd"], rows.mean())


def test_with_chunks_and_top_k_the_teacher_may_be_anything():
    method = TokenKD(transformer(0), Frozen(Bigram(1)), chunk=3, top_k=2)
    method.training_step(batch())["kd"].backward()
    assert method.student.head()[0].grad is not None


@pytest.mark.parametrize(
    "wrong", [{"chunk": 0}, {"top_k": 0}, {"rest": "drop"}, {"top_k": 2, "rest": "bucket", "temperature": 2.0}]
)
def test_settings_of_chunks_and_top_k_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UserError):
        kd(**wrong)


def test_more_words_than_there_are_cannot_be_kept():
    with pytest.raises(UserError, match="top_k is 6 and the vocabulary has 5"):
        TokenKD(transformer(0), Frozen(transformer(1)), top_k=6)


def test_chunks_of_networks_without_hidden_states_are_refused():
    with pytest.raises(UserError, match="student that is a causal transformers model.* a Bigram"):
        kd(chunk=3)
    with pytest.raises(UserError, match="teacher that is a causal transformers model.* a Bigram.*set `top_k`"):
        TokenKD(transformer(0), Frozen(Bigram(1)), chunk=3)
    ensemble = Ensemble([Frozen(transformer(1))])
    with pytest.raises(UserError, match="not one network in memory"):
        TokenKD(transformer(0), ensemble, chunk=3)

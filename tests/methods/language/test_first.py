"""FIRST: the temperature on probabilities, the three norms, what is reduced over, and the search for c."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.data import Data, Samples
from limbeck.errors import UserError
from limbeck.labels import expected_calibration_error
from limbeck.losses import kl_divergence
from limbeck.methods.language.first import (
    FIRST,
    first,
    judged,
    matching_loss,
    search_temperature,
    smoothed,
    student_log_probs,
    teacher_target,
    trustworthy,
)
from limbeck.models import TopK, load_language_model
from limbeck.teachers import Frozen, Stored, fill
from limbeck.train import Optimizer, Stage, StreamSettings, Trainer, Workspace

B, L, V, K = 3, 6, 9, 5
IGNORE = -100
seeds = st.integers(0, 10_000)
NORMS = ("linear", "softmax", "other_token")


class Bigram(nn.Module):
    """Logits of the next token from a table."""

    def __init__(self, seed: int, scale: float = 2.0, v: int = V) -> None:
        super().__init__()
        self.table = nn.Parameter(scale * torch.randn(v, v, generator=torch.Generator().manual_seed(seed)))

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.table[tokens["input_ids"]]


def draw(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept(seed: int, k: int = K) -> TopK:
    return TopK.of(draw(seed, B, L, V), k)


def probabilities(seed: int) -> Tensor:
    return kept(seed).log_probs.exp().double()


def token_rows(rows: int = 24, seed: int = 4, prompt: int = 2) -> Samples:
    ids = torch.randint(0, V, (rows, L), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :prompt] = IGNORE
    return Samples({"tokens": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "labels": labels})


def batch_of(samples: Samples, rows: int = B) -> dict:
    return {"labelled": samples.batch(torch.arange(rows))}


def stage(steps: int = 4) -> Stage:
    trainer = Trainer(steps=steps, accelerator="cpu", optimizer=Optimizer(lr=0.1, momentum=0.0), log_every=1)
    return Stage(trainer, {"labelled": StreamSettings(batch_size=4, views={})})


def data(validation: bool = True) -> Data:
    splits = {"train": token_rows(24, 4), "test": token_rows(8, 5)}
    return Data(**splits, validation=token_rows(40, 6) if validation else None)


def run(
    folder: Path, teacher: object = None, given: Data | None = None, **settings: object
) -> tuple[Workspace, Bigram]:
    ws = Workspace(folder)
    student = first(ws, given or data(), Bigram(0), teacher or Frozen(Bigram(1)), train=stage(), **settings)  # type: ignore[arg-type]
    return ws, student  # type: ignore[return-value]


# ---------------------------------------------------------------- the temperature


@settings(max_examples=25, deadline=None)
@given(seed=seeds, c=st.floats(0.05, 5))
def test_recalibrated_probabilities_sum_to_one_and_keep_their_order(seed, c):
    found = trustworthy(probabilities(seed), c)
    torch.testing.assert_close(found.sum(-1), torch.ones(B, L, dtype=torch.float64))
    assert bool((found[..., :-1] >= found[..., 1:]).all())


def test_a_large_c_gives_a_fifth_to_each():
    torch.testing.assert_close(trustworthy(probabilities(0), 1e6), torch.full((B, L, K), 0.2, dtype=torch.float64),
                               atol=1e-5, rtol=0)  # fmt: skip


def test_a_small_c_leaves_the_likeliest_alone():
    found = trustworthy(torch.tensor([0.5, 0.3, 0.1, 0.05, 0.01]), 1e-3)
    torch.testing.assert_close(found, torch.tensor([1.0, 0, 0, 0, 0]))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, c=st.floats(0.05, 5))
def test_two_entries_differ_by_the_exponential_of_their_difference_of_probabilities(seed, c):
    """Unlike a temperature of logits, whose ratio would be (P_1 / P_K)^(1/c)."""
    given_, found = probabilities(seed), trustworthy(probabilities(seed), c)
    torch.testing.assert_close(found[..., 0] / found[..., -1], ((given_[..., 0] - given_[..., -1]) / c).exp())


def test_c_of_one_flattens_certainty_to_a_ratio_of_e():
    found = trustworthy(torch.tensor([1.0, 0, 0, 0, 0]), 1.0)
    torch.testing.assert_close(found[0] / found[1], torch.tensor(math.e))
    torch.testing.assert_close(found[0], torch.tensor(math.e / (math.e + 4)))


def test_the_temperature_reads_probabilities_and_not_their_logarithms():
    top = kept(3)
    torch.testing.assert_close(
        teacher_target(top, norm="linear", temperature=0.4), (top.log_probs.exp() / 0.4).softmax(-1)
    )


def test_the_target_is_not_normalised_again_whatever_the_students_norm():
    linear, softmax = (teacher_target(kept(3), norm=norm, temperature=0.3) for norm in ("linear", "softmax"))  # type: ignore[arg-type]
    torch.testing.assert_close(linear, softmax, atol=0, rtol=0)


def test_smoothing_takes_the_same_from_every_likeliest_token():
    given_ = probabilities(1) / probabilities(1).sum(-1, keepdim=True)
    found = smoothed(given_, 0.1)
    torch.testing.assert_close(given_[..., 0] - found[..., 0], torch.full((B, L), 0.1, dtype=torch.float64))
    torch.testing.assert_close(found[..., 1:] - given_[..., 1:], torch.full((B, L, 4), 0.025, dtype=torch.float64))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("settings_", [{"temperature": 0.3}, {"temperature": None},
                                       {"temperature": None, "label_smoothing": 0.1}])  # fmt: skip
def test_every_target_is_a_distribution(norm, settings_):
    target = teacher_target(kept(2), norm=norm, **settings_)
    torch.testing.assert_close(target.sum(-1), torch.ones(B, L))
    assert float(target.min()) >= 0


# ---------------------------------------------------------------- the norms


@pytest.mark.parametrize("norm", NORMS)
def test_every_student_is_a_distribution(norm):
    log_s = student_log_probs(draw(1, B, L, V), kept(2).ids, norm=norm)
    torch.testing.assert_close(log_s.exp().sum(-1), torch.ones(B, L, dtype=log_s.dtype))


def test_the_rest_survives_the_temperature():
    top = kept(2)
    target = teacher_target(top, norm="other_token", temperature=0.3)
    torch.testing.assert_close(target[..., -1], top.rest)
    torch.testing.assert_close(target[..., :-1].sum(-1), 1 - top.rest)


def full_mass(seed: int) -> tuple[Tensor, TopK]:
    """Logits and a teacher that both give the first five tokens everything."""
    logits = torch.full((B, L, V), -60.0, dtype=torch.float64)
    logits[..., :K] = draw(seed, B, L, K)
    teacher = logits.clone()
    teacher[..., :K] = draw(seed + 1, B, L, K)
    return logits, TopK.of(teacher, K)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, c=st.sampled_from([None, 0.3]))
def test_the_rest_changes_nothing_where_both_give_the_five_everything(seed, c):
    logits, top = full_mass(seed)
    losses = []
    for norm in ("linear", "other_token"):
        log_s = student_log_probs(logits, top.ids, norm=norm, epsilon=1e-12)
        target = teacher_target(top, norm=norm, temperature=c, epsilon=1e-12)
        losses.append(matching_loss(log_s, target.double(), whole()))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-5)


def whole() -> Tensor:
    return torch.zeros(B, L, dtype=torch.long)


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_all_words_kept_and_no_epsilon_is_the_full_forward_kl(seed):
    student, teacher = draw(seed, B, L, V), draw(seed + 1, B, L, V)
    top = TopK.of(teacher, V)
    log_s = student_log_probs(student, top.ids, norm="linear", epsilon=0)
    found = matching_loss(log_s, teacher_target(top, norm="linear", temperature=None, epsilon=0).double(), whole())
    expected = kl_divergence(student, teacher, reduction="none", scale_by_t2=False).sum(1).mean()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_the_loss_is_zero_where_the_renormalised_five_equal_the_target(seed):
    top = kept(seed)
    target = teacher_target(top, norm="linear", temperature=0.3)
    logits = draw(seed + 1, B, L, V).float().scatter(-1, top.ids, target.log() + 1.5)  # any mass, the right shares
    assert float(matching_loss(student_log_probs(logits, top.ids, norm="linear"), target, whole())) < 1e-4


@settings(max_examples=25, deadline=None)
@given(seed=seeds, norm=st.sampled_from(NORMS))
def test_the_loss_is_positive_elsewhere(seed, norm):
    top = kept(seed)
    target = teacher_target(top, norm=norm, temperature=0.3)
    assert (
        float(matching_loss(student_log_probs(draw(seed + 1, B, L, V).float(), top.ids, norm=norm), target, whole()))
        > 1e-3
    )


def gradient(norm: str, epsilon: float) -> tuple[Tensor, Tensor, TopK, Tensor]:
    """The loss's gradient, and the logits, teacher and target that it is of."""
    top, logits = kept(5), draw(6, B, L, V).requires_grad_()
    log_s = student_log_probs(logits, top.ids, norm=norm, epsilon=epsilon)  # type: ignore[arg-type]
    target = teacher_target(top, norm=norm, temperature=0.3).double()  # type: ignore[arg-type]
    (found,) = torch.autograd.grad(matching_loss(log_s, target, whole()), logits)
    return found, logits.detach(), top, target


def outside_of(top: TopK, values: Tensor) -> Tensor:
    return values.scatter(-1, top.ids, 0.0)


def test_with_the_linear_norm_and_no_epsilon_words_outside_of_the_five_get_no_gradient():
    found, _, top, _ = gradient("linear", 0.0)
    assert float(outside_of(top, found).abs().max()) < 1e-12 < 1e-2 < float(found.abs().max())


def test_with_epsilon_their_gradient_is_of_its_order():
    """q_v (K eps / (S + K eps) - sum_i P^_i eps / (s_i + eps)), S the mass of the five: derived by hand."""
    epsilon = 1e-6
    found, logits, top, target = gradient("linear", epsilon)
    q = logits.softmax(-1)
    s = q.gather(-1, top.ids)
    mass = s.sum(-1, keepdim=True)
    factor = K * epsilon / (mass + K * epsilon) - (target * epsilon / (s + epsilon)).sum(-1, keepdim=True)
    torch.testing.assert_close(outside_of(top, found), outside_of(top, q * factor / B), atol=1e-12, rtol=1e-4)
    assert 0 < float(outside_of(top, found).abs().max()) < 1e-3


@pytest.mark.parametrize("norm", ["softmax", "other_token"])
def test_with_the_other_norms_words_outside_of_the_five_do_get_a_gradient(norm):
    found, _, top, _ = gradient(norm, 1e-6)
    assert float(outside_of(top, found).abs().max()) > 1e-2


@settings(max_examples=25, deadline=None)
@given(seed=seeds, scale=st.floats(0.1, 50))
def test_the_softmax_norm_never_reaches_a_target_whose_ratio_is_above_e(seed, scale):
    target = trustworthy(torch.tensor([0.9, 0.05, 0.02, 0.01, 0.005]), 0.3)
    log_s = student_log_probs(draw(seed, B, L, V, scale=scale).float(), kept(seed).ids, norm="softmax")
    assert float((log_s.amax(-1) - log_s.amin(-1)).max()) <= 1 + 1e-5
    assert float(matching_loss(log_s, target.expand(B, L, K), whole())) / L > 0.1


# ---------------------------------------------------------------- what is reduced over


def test_the_loss_is_a_sum_over_tokens_and_a_mean_over_all_samples():
    log_s = student_log_probs(draw(1, B, L, V).float(), kept(2).ids, norm="linear")
    target = teacher_target(kept(2), norm="linear", temperature=0.3)
    labels = torch.full((B, L), IGNORE)
    labels[0, 1:3] = 4
    labels[1, 5] = 2  # the third sample has no response: it counts as 0
    items = (target * (target.log() - log_s)).sum(-1)
    expected = (items[0, 1] + items[0, 2] + items[1, 5]) / 3
    torch.testing.assert_close(matching_loss(log_s, target, labels), expected)


def test_a_batch_without_any_response_costs_nothing():
    student = Bigram(0)
    samples = token_rows()
    samples = samples.with_fields({"labels": torch.full_like(samples.fields["labels"], IGNORE)})
    loss = FIRST(student, Frozen(Bigram(1))).training_step(batch_of(samples))["match"]
    loss.backward()
    assert float(loss.detach()) == 0 and student.table.grad is not None and not student.table.grad.any()


class Positions(nn.Module):
    """Logits that are free at every place of every row."""

    def __init__(self, seed: int, rows: int = B) -> None:
        super().__init__()
        self.logits = nn.Parameter(draw(seed, rows, L, V).float())

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.logits[: len(tokens["input_ids"])]


@pytest.mark.parametrize("norm", NORMS)
def test_only_places_before_response_tokens_teach(norm):
    """The last token of the prompt predicts the first of the response; the last of the response predicts nothing."""
    student = Positions(1)
    method = FIRST(student, Frozen(Positions(2)), temperature=0.3, norm=norm)
    method.training_step(batch_of(token_rows(prompt=3)))["match"].backward()
    assert student.logits.grad is not None
    assert student.logits.grad.abs().amax((0, 2)).gt(0).tolist() == [False, False, True, True, True, False]


def test_teacher_and_student_are_not_shifted_against_each_other():
    """A student that says what the teacher says, place by place, has nothing to learn."""
    method = FIRST(Positions(2), Frozen(Positions(2)), norm="other_token")
    assert float(method.training_step(batch_of(token_rows()))["match"].detach()) == pytest.approx(0, abs=1e-4)


def test_no_label_moves_the_loss():
    samples = token_rows()
    other = samples.with_fields({"labels": samples.fields["labels"].where(samples.fields["labels"] < 0, 1)})
    method = FIRST(Bigram(0), Frozen(Bigram(1)), temperature=0.3)
    one, two = (method.training_step(batch_of(each))["match"] for each in (samples, other))
    torch.testing.assert_close(one, two, atol=0, rtol=0)


def test_a_step_reads_nothing_back_from_the_device():
    method = FIRST(Bigram(0), Frozen(Bigram(1).to("meta")), temperature=0.3).to("meta")
    ids = torch.empty(B, L, dtype=torch.long, device="meta")
    losses = method.training_step({"labelled": {"tokens": {"input_ids": ids}, "labels": ids}})
    losses["match"].backward()
    assert losses["match"].shape == ()


# ---------------------------------------------------------------- the stages


def test_a_stored_teacher_teaches_what_the_live_one_does(tmp_path):
    samples = token_rows()
    fill(tmp_path / "store", Frozen(Bigram(1)), samples, field="tokens", top_k=K)
    live, stored = (
        FIRST(Bigram(0), teacher, temperature=0.3, norm="other_token").training_step(batch_of(samples))["match"]
        for teacher in (Frozen(Bigram(1)), Stored(tmp_path / "store"))
    )
    torch.testing.assert_close(live, stored)


def test_the_chosen_c_has_the_lowest_error_of_the_teacher_on_the_validation_split(tmp_path):
    given_, teacher = data(), Frozen(Bigram(1))
    ws, _ = run(tmp_path, teacher, given_)
    assert given_.validation is not None
    scored_NK, correct_N = judged(teacher, given_.validation, K)
    assert len(correct_N) == 40 * (L - 2)
    for number in range(1, 11):
        error = expected_calibration_error(trustworthy(scored_NK, number / 10)[:, 0], correct_N)
        assert ws.measured["temperature.ece"] <= float(error) + 1e-6
    chosen = expected_calibration_error(trustworthy(scored_NK, ws.measured["temperature.c"])[:, 0], correct_N)
    assert float(chosen) == pytest.approx(ws.measured["temperature.ece"], abs=1e-6)
    raw = expected_calibration_error(scored_NK[:, 0], correct_N)
    assert ws.measured["temperature.raw_ece"] == pytest.approx(float(raw), abs=1e-6)


def test_neither_training_nor_test_samples_have_a_say_in_c(tmp_path):
    one, _ = run(tmp_path / "one")
    others = Data(train=token_rows(16, 8), test=token_rows(8, 9), validation=data().validation)
    two, _ = run(tmp_path / "two", given=others)
    assert one.measured == two.measured


def test_the_search_follows_the_teachers_confidence():
    """Right in 60 of 100 cases: c gives the likeliest of a certain teacher 0.6."""
    certain = torch.tensor([1.0, 0, 0, 0, 0]).expand(100, K)
    c_M, ece_M = search_temperature(certain, torch.arange(100) < 60)
    confidence = float(trustworthy(certain, float(c_M[ece_M.argmin()]))[0, 0])
    assert confidence == pytest.approx(0.6, abs=0.02)


def test_the_student_is_the_same_when_a_finished_run_is_loaded(tmp_path):
    _, trained = run(tmp_path)
    _, loaded = run(tmp_path)
    torch.testing.assert_close(trained.table, loaded.table, atol=0, rtol=0)
    assert not torch.equal(trained.table, Bigram(0).table)


def test_the_report_shows_the_error_over_c(tmp_path):
    ws, _ = run(tmp_path)
    ((caption, bars),) = ws.exhibits.items()
    assert f"c = {ws.measured['temperature.c']:.2f}" in caption and len(bars.values) > 10  # type: ignore[arg-type]


def test_without_recalibration_no_validation_split_is_needed_and_nothing_is_searched(tmp_path):
    ws, student = run(tmp_path, given=data(validation=False), recalibrate=False)
    assert not ws.measured and not torch.equal(student.table, Bigram(0).table)


def test_the_text_mask_teaches_the_prompt_too_and_padding_never(tmp_path):
    samples = token_rows(prompt=4)
    tokens = dict(samples.fields["tokens"])
    tokens["attention_mask"] = tokens["attention_mask"].clone()
    tokens["attention_mask"][:, -1] = 0
    samples = samples.with_fields({"tokens": tokens, "labels": samples.fields["labels"].clone()})
    samples.fields["labels"][:, -1] = IGNORE
    given_ = Data(train=samples, test=samples)
    for mask, places in (("response", 1), ("text", L - 2)):
        ws, _ = run(tmp_path / mask, given=given_, recalibrate=False, mask=mask)
        store = Stored(ws.folder("cache") / "store").store
        assert store.count_tokens(store.rows(samples.index.numpy())).tolist() == [places] * 24


def test_stores_of_both_splits_stand_for_the_network(tmp_path):
    given_, live = data(), Frozen(Bigram(1))
    for split in ("train", "validation"):
        fill(tmp_path / split, live, getattr(given_, split), field="tokens", top_k=K)
    stores = {"teacher": Stored(tmp_path / "train"), "validation_teacher": Stored(tmp_path / "validation")}
    _, expected = run(tmp_path / "live", live, given_)
    _, found = run(tmp_path / "stored", given=given_, **stores)
    torch.testing.assert_close(found.table, expected.table)


def test_a_store_of_the_training_split_is_no_judge_of_the_validation_split(tmp_path):
    given_ = data()
    fill(tmp_path / "train", Frozen(Bigram(1)), given_.train, field="tokens", top_k=K)
    with pytest.raises(UserError):
        run(tmp_path / "run", Stored(tmp_path / "train"), given_)


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"top_k": 1}, "top_k is 1"),
        ({"norm": "linaer"}, "norm is 'linaer'; choose one of linear, softmax, other_token"),
        ({"recalibrate": False, "label_smoothing": 0.3}, "label_smoothing is 0.3; with top_k=5"),
        ({"label_smoothing": 0.1}, "set recalibrate: false with it"),
    ],
)
def test_settings_without_meaning_are_refused_before_the_teacher_is_asked(tmp_path, settings_, sentence):
    with pytest.raises(UserError, match=sentence):
        run(tmp_path, **settings_)
    assert not (tmp_path / "stages").exists()


def test_without_validation_samples_recalibration_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.validation_fraction, or recalibrate: false"):
        run(tmp_path, given=data(validation=False))


def test_networks_of_different_vocabularies_are_refused():
    small, large = (load_language_model("hf-config:gpt2", vocab_size=v, max_length=8,
                                        config={"n_layer": 1, "n_embd": 8, "n_head": 1}) for v in (9, 11))  # fmt: skip
    with pytest.raises(UserError, match="speak of 11 tokens and the student's of 9"):
        FIRST(small, Frozen(large))


@pytest.mark.slow
def test_one_step_of_a_model_of_gpt2s_size():
    student, teacher = (load_language_model("hf-config:gpt2", vocab_size=50257, max_length=64) for _ in range(2))
    ids = torch.randint(0, 50257, (1, 16))
    labels = ids.clone()
    labels[:, :8] = IGNORE
    method = FIRST(student, Frozen(teacher), temperature=0.3, norm="other_token")
    loss = method.training_step({"labelled": {"tokens": {"input_ids": ids}, "labels": labels}})["match"]
    loss.backward()
    assert 0 < float(loss.detach()) < 8 * math.log(50257)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.parameters())

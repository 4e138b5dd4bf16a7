"""Trans-Encoder: the losses' identities, labels that carry no gradient, restarts bit for bit, and whole small runs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.data import Pairs, load_pairs
from limbeck.errors import UserError
from limbeck.evaluate import PairEvaluator
from limbeck.methods.language.trans_encoder import (
    average_scores,
    bi_loss,
    cross_loss,
    distill_committee,
    order_gap,
    trans_encoder,
)
from limbeck.models import BiEncoder, CrossEncoder, load_encoder, score_pairs
from limbeck.train import Optimizer, Schedule, Stage, StreamSettings, Trainer, Workspace
from limbeck.train.checkpoint import load_tensors

CONFIG = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
NOUNS, VERBS = ("cat", "dog", "bird", "girl", "man", "horse"), ("sleeps", "runs", "sings", "jumps")
SENTENCES = [f"a {noun} {verb}" for noun in NOUNS for verb in VERBS]

values = st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=8)


def small_pairs(pairs: int = 48) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(len(SENTENCES), (2, pairs), generator=generator).tolist()
    first, second = [SENTENCES[i] for i in a], [SENTENCES[i] for i in b]
    same = [len(set(x.split()) & set(y.split())) / 3 for x, y in zip(first, second, strict=True)]
    return {"sentence1": first, "sentence2": second, "score": torch.tensor(same)}


@pytest.fixture(scope="module")
def data() -> Pairs:
    whole = small_pairs()
    part = {name: column[:24] for name, column in whole.items()}
    return load_pairs(
        {"train": whole, "validation": part, "test": part}, vocab_size=60, max_length=8, pair_max_length=12
    )


def encoder(seed: int = 0, **config: Any) -> BiEncoder:
    torch.manual_seed(seed)
    bi = load_encoder("hf-config:bert", config={**CONFIG, **config}, vocab_size=60, pooling="mean")
    assert isinstance(bi, BiEncoder)
    return bi


def stage(epochs: int = 1, lr: float = 1e-3, **trainer: Any) -> Stage:
    settings = StreamSettings(batch_size=8, views={})
    return Stage(
        Trainer(epochs=epochs, optimizer=Optimizer("adamw", lr=lr), accelerator="cpu", **trainer), {"pairs": settings}
    )


def workspace(path: Path) -> Workspace:
    return Workspace(path, seed=0, evaluator=PairEvaluator())


# ---------------------------------------------------------------- the losses


@settings(max_examples=25, deadline=None)
@given(values)
def test_a_bi_encoder_whose_cosines_are_the_labels_has_no_loss_and_no_gradient(cosines: list[float]) -> None:
    cosine_B = torch.tensor(cosines, requires_grad=True)
    loss = bi_loss(cosine_B, torch.tensor(cosines))
    loss.backward()
    assert loss == 0 and not cosine_B.grad.any()  # type: ignore[union-attr]


@settings(max_examples=25, deadline=None)
@given(values, st.integers(0, 10**6))
def test_the_gradient_of_the_soft_bce_is_sigmoid_minus_the_clamped_cosine(cosines: list[float], seed: int) -> None:
    s_B = torch.tensor(cosines)
    z_B = torch.randn(len(s_B), generator=torch.Generator().manual_seed(seed)).requires_grad_()
    (cross_loss(z_B, s_B) * len(s_B)).backward()
    assert torch.allclose(z_B.grad, z_B.detach().sigmoid() - s_B.clamp(0, 1), atol=1e-6)  # type: ignore[arg-type]


def test_the_soft_bce_is_smallest_at_the_logit_of_the_label_where_it_is_the_entropy() -> None:
    s_B = torch.tensor([0.1, 0.5, 0.8])
    best = cross_loss(s_B.logit(), s_B)
    entropy = -(s_B * s_B.log() + (1 - s_B) * (1 - s_B).log()).mean()
    assert best == pytest.approx(float(entropy), abs=1e-6) and best > 0
    for shift in (-0.3, 0.3):
        assert cross_loss(s_B.logit() + shift, s_B) > best


def test_negative_cosines_count_as_zero_in_the_loss_alone() -> None:
    z_B = torch.tensor([0.3, -1.0])
    assert cross_loss(z_B, torch.tensor([-0.7, 0.2])) == cross_loss(z_B, torch.tensor([0.0, 0.2]))
    assert average_scores([torch.tensor([-0.7]), torch.tensor([-0.7])]).tolist() == pytest.approx([-0.7])


def test_labels_carry_no_gradient() -> None:
    for loss in (cross_loss, bi_loss):
        student, label = torch.zeros(3, requires_grad=True), torch.full((3,), 0.5, requires_grad=True)
        loss(student, label).backward()
        assert student.grad is not None and label.grad is None


def test_mutual_labels_of_identical_models_are_the_self_labels_and_the_mean_otherwise(data: Pairs) -> None:
    pool = data.unlabelled
    assert pool is not None
    scores, others = (score_pairs(encoder(seed), pool.fields) for seed in (0, 1))
    assert average_scores([scores, scores]).equal(scores)
    assert torch.allclose(average_scores([scores, others]), (scores + others) / 2)


# ---------------------------------------------------------------- whole runs


def test_no_cycle_returns_the_start_untouched(data: Pairs, tmp_path: Path) -> None:
    start = encoder()
    before = copy.deepcopy(start.state_dict())
    assert trans_encoder(workspace(tmp_path), data, start, cross=stage(), bi=stage(), cycles=0) is start
    assert all(start.state_dict()[name].equal(part) for name, part in before.items())
    assert not (tmp_path / "stages").exists()


class Spy(Workspace):
    """Remembers the weights that every stage began with, and the labels that it learnt from."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, seed=0, evaluator=PairEvaluator())
        self.began: dict[str, dict[str, Tensor]] = {}
        self.taught: dict[str, Any] = {}

    def fit(self, stage: str, method: Any, streams: Any, *rest: Any, **named: Any) -> Any:
        self.began[stage] = {name: part.clone() for name, part in method.student.state_dict().items()}
        self.taught[stage] = streams["pairs"].samples
        return super().fit(stage, method, streams, *rest, **named)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part for name, part in state.items() if name.startswith("model.")}


@pytest.fixture(scope="module")
def two_cycles(data: Pairs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Spy, BiEncoder, Any]:
    ws, start = Spy(tmp_path_factory.mktemp("self")), encoder()
    shipped = trans_encoder(ws, data, start, cross=stage(), bi=stage(2), cycles=2)
    return ws, start, shipped


def test_each_cycle_restarts_from_the_first_weights_bit_for_bit(two_cycles) -> None:
    ws, start, _ = two_cycles
    assert equal(ws.began["bi_1"], ws.began["bi_2"]) and equal(ws.began["cross_1"], ws.began["cross_2"])
    assert equal(ws.began["bi_1"], start.state_dict())
    assert equal(backbone(ws.began["cross_1"]), start.state_dict())


def test_the_cross_encoder_sees_both_orders_with_equal_labels_and_the_bi_encoder_one(two_cycles, data: Pairs) -> None:
    ws, *_ = two_cycles
    n = len(data.unlabelled)  # type: ignore[arg-type]
    taught = ws.taught["cross_1"]
    assert len(taught) == 2 * n and len(ws.taught["bi_1"]) == n
    assert taught.fields["score"][:n].equal(taught.fields["score"][n:])
    assert taught.fields["tokens"]["input_ids"][n:].equal(taught.fields["tokens_swapped"]["input_ids"][:n])


def test_labels_are_the_scores_of_the_form_before_and_only_the_pool_is_labelled(two_cycles, data: Pairs) -> None:
    ws, start, _ = two_cycles
    n = len(data.unlabelled)  # type: ignore[arg-type]
    cosines = score_pairs(start, data.unlabelled.fields)  # type: ignore[union-attr]
    assert ws.taught["cross_1"].fields["score"][:n].equal(cosines)
    scores = ws.taught["bi_1"].fields["score"]
    assert bool(((scores > 0) & (scores < 1)).all())  # after the sigmoid


def test_what_ships_is_the_best_cycle_by_the_validation_pairs(two_cycles, data: Pairs) -> None:
    ws, _, shipped = two_cycles
    found = {name: ws.fits[name].metrics["spearman"] for name in ("bi_1", "bi_2")}
    assert PairEvaluator()(shipped, data.validation)["spearman"] == pytest.approx(max(found.values()), abs=1e-6)
    assert {"start.spearman", "cross.spearman", "order.gap"} <= ws.measured.keys()


def test_a_second_run_of_the_workspace_loads_every_stage_bit_for_bit(two_cycles, data: Pairs) -> None:
    ws, _, shipped = two_cycles
    again = trans_encoder(Spy(ws.path), data, encoder(), cross=stage(), bi=stage(2), cycles=2)
    assert equal(again.state_dict(), shipped.state_dict())


class Killed(Exception):
    pass


class Mortal(Workspace):
    """Dies before its nth stage of training."""

    def __init__(self, path: Path, lives: int) -> None:
        super().__init__(path, seed=0, evaluator=PairEvaluator())
        self.lives = lives

    def fit(self, *arguments: Any, **named: Any) -> Any:
        self.lives -= 1
        if self.lives < 0:
            raise Killed
        return super().fit(*arguments, **named)


@pytest.mark.parametrize("lives", [0, 1, 3])
def test_a_run_that_was_killed_between_stages_ends_with_the_same_weights(two_cycles, data, tmp_path, lives) -> None:
    *_, shipped = two_cycles
    with pytest.raises(Killed):
        trans_encoder(Mortal(tmp_path, lives), data, encoder(), cross=stage(), bi=stage(2), cycles=2)
    again = trans_encoder(workspace(tmp_path), data, encoder(), cross=stage(), bi=stage(2), cycles=2)
    assert equal(again.state_dict(), shipped.state_dict())


def test_without_restart_each_form_inherits_the_other_ones_weights(data: Pairs, tmp_path: Path) -> None:
    ws = Spy(tmp_path)
    trans_encoder(ws, data, encoder(), cross=stage(), bi=stage(), cycles=2, restart=False, select=None)

    def end(name: str) -> dict[str, Tensor]:
        state = load_tensors(ws.folder(name) / "method.safetensors")
        return {key.removeprefix("student."): part for key, part in state.items()}

    assert equal(ws.began["bi_1"], backbone(end("cross_1")))
    assert equal(backbone(ws.began["cross_2"]), end("bi_1"))


def test_the_cross_encoders_may_start_from_the_plain_language_model(data: Pairs, tmp_path: Path) -> None:
    ws, plain = Spy(tmp_path), encoder(5)
    shipped = trans_encoder(
        ws, data, encoder(), plain=plain, cross=stage(), bi=stage(), cycles=1, ships="cross", select=None
    )
    assert equal(backbone(ws.began["cross_1"]), plain.state_dict())
    assert isinstance(shipped, CrossEncoder)


def test_without_validation_the_last_cycle_ships(data: Pairs, tmp_path: Path) -> None:
    ws = Spy(tmp_path)
    shipped = trans_encoder(ws, replace(data, validation=None), encoder(), cross=stage(), bi=stage(), cycles=2)
    assert "spearman" not in ws.fits["bi_2"].metrics
    second = Spy(tmp_path)  # loads what the stages left
    again = trans_encoder(second, data, encoder(), cross=stage(), bi=stage(), cycles=2, select=None)
    assert equal(shipped.state_dict(), again.state_dict())


def test_a_peer_of_another_architecture_learns_the_same_averaged_labels(data: Pairs, tmp_path: Path) -> None:
    ws = Spy(tmp_path)
    peer = encoder(1, hidden_size=8, num_hidden_layers=2)
    trans_encoder(ws, data, encoder(), peer, cross=stage(), bi=stage(), cycles=1)
    mean = (score_pairs(encoder(), data.unlabelled.fields) + score_pairs(peer, data.unlabelled.fields)) / 2  # type: ignore[union-attr]
    for stage_of in ("cross_1_0", "cross_1_1"):
        assert torch.allclose(ws.taught[stage_of].fields["score"][: len(mean)], mean)
    assert ws.taught["bi_1_0"].fields["score"].equal(ws.taught["bi_1_1"].fields["score"])


def test_three_encoders_work_as_a_committee(data: Pairs, tmp_path: Path) -> None:
    starts = [encoder(seed) for seed in range(3)]
    shipped = distill_committee(workspace(tmp_path), data, starts, starts, cross=stage(), bi=stage(), cycles=1)
    assert isinstance(shipped, BiEncoder)


def test_after_training_the_scores_mind_the_order_less_than_with_one_order(data: Pairs, tmp_path: Path) -> None:
    gaps = {}
    for symmetric in (True, False):
        ws = workspace(tmp_path / str(symmetric))
        # As many steps for both: one order has half as many pairs.
        cross = stage(12 if symmetric else 24, lr=5e-3, schedule=Schedule("linear"))
        arguments = {"bi": stage(), "cycles": 1, "ships": "cross", "select": None, "symmetric": symmetric}
        shipped = trans_encoder(ws, data, encoder(), cross=cross, **arguments)  # type: ignore[arg-type]
        assert isinstance(shipped, CrossEncoder)
        gaps[symmetric] = order_gap(shipped, data.test)
    assert gaps[True] < gaps[False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cycles": -1}, "cycles is -1"),
        ({"student": torch.nn.Linear(2, 2)}, "starts from bi-encoders, got Linear"),
        ({"plain": "wider", "restart": False}, "plain has another architecture than student"),
    ],
)
def test_bad_input_is_refused(data: Pairs, tmp_path: Path, change: dict, message: str) -> None:
    given: dict[str, Any] = {"student": encoder(), **change}
    if given.get("plain") == "wider":
        given["plain"] = encoder(hidden_size=32)
    with pytest.raises(UserError, match=message):
        trans_encoder(workspace(tmp_path), data, cross=stage(), bi=stage(), **given)
    with pytest.raises(UserError, match="there are none; use load_pairs"):
        trans_encoder(workspace(tmp_path), replace(data, unlabelled=None), encoder(), cross=stage(), bi=stage())


def test_swapping_the_sentences_leaves_the_bi_encoders_scores(data) -> None:
    fields = data.unlabelled.fields
    swapped = {**fields, "tokens_a": fields["tokens_b"], "tokens_b": fields["tokens_a"]}
    torch.testing.assert_close(score_pairs(encoder(), fields), score_pairs(encoder(), swapped))

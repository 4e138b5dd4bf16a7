"""TAID: the mixed target, the one path of the gradient, and the controller: by hand, resumed, in two processes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.data import Samples, Stream
from limbeck.distributed import rank, world_size
from limbeck.errors import UserError
from limbeck.losses import (
    kl_divergence,
    shift,
    token_divergence,
    token_entropy,
    token_soft_cross_entropy,
)
from limbeck.methods.language.taid import TAID, Controller, interpolate, interpolated_loss
from limbeck.teachers import Frozen
from limbeck.train import Fit, Optimizer, Trainer, fit
from tests.train.toys import differing

B, L, V = 3, 7, 5


class Bigram(nn.Module):
    """Logits of the next token from a table."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, V, generator=torch.Generator().manual_seed(seed)))

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.table[tokens["input_ids"]]


def case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher in float64, and labels of which some are -100."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(B, L, V, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, V, (B, L), generator=generator)
    labels[torch.rand(B, L, generator=generator) < 0.4] = -100
    labels[0, 0] = 1
    return student.requires_grad_(), teacher, labels


def samples(rows: int = 24) -> Samples:
    ids = torch.randint(0, V, (rows, L), generator=torch.Generator().manual_seed(4))
    labels = ids.clone()
    labels[:, :2] = -100
    return Samples({"tokens": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "labels": labels})


def method(**settings: object) -> TAID:
    return TAID(Bigram(0), Frozen(Bigram(1)), **settings)  # type: ignore[arg-type]


def trainer(**more: object) -> Trainer:
    parallel = {"devices": world_size(), "strategy": "ddp"} if world_size() > 1 else {}
    rule = {"steps": 9, "log_every": 1, "optimizer": Optimizer(lr=0.5, momentum=0.0)}
    return Trainer(**{"accelerator": "cpu", **rule, **parallel, **more})  # type: ignore[arg-type]


def trained(taid: TAID, *, batch_size: int = 4, **more: object) -> Fit:
    places = {name: more.pop(name) for name in ("folder", "fabric") if name in more}
    return fit(taid, {"labelled": Stream(samples(), batch_size)}, trainer(**more), **places)  # type: ignore[arg-type]


def by_hand(losses: list[float], steps: int, *, start=0.4, end=1.0, alpha=5e-4, beta=0.99) -> list[float]:
    """t in every step, and after the last one."""
    t, previous, momentum, found = start, None, 0.0, [start]
    for n, loss in enumerate(losses):
        if previous is not None:
            momentum = beta * momentum + (1 - beta) * (previous - loss) / (previous + 1e-15)
            delta = alpha / (1 + float(torch.tensor(-momentum, dtype=torch.float64).exp())) * (1 - t)
            t = min(end, max(start + (end - start) * n / steps, t + delta))
        previous = loss
        found.append(t)
    return found


def moved(controller: Controller, losses: list[float], steps: int = 1000) -> list[float]:
    found = []
    for n, loss in enumerate(losses):
        controller.update(torch.tensor(loss), n, steps)
        found.append(float(controller.t))
    return found


# ---------------------------------------------------------------- target and loss


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), t=st.floats(0, 1))
def test_the_gradient_is_the_students_distribution_minus_the_target_over_the_tokens(seed, t):
    """A second path through the target would add to it."""
    student, teacher, labels = case(seed)
    mixing = torch.tensor(t, dtype=torch.float64)
    interpolated_loss(student, teacher, labels, mixing).backward()
    kept = (labels != -100)[..., None]
    wanted = (student.detach().softmax(-1) - interpolate(student, teacher, mixing)) * kept / kept.sum()
    torch.testing.assert_close(student.grad, wanted)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_at_0_the_loss_is_the_students_entropy_and_the_gradient_exactly_none(seed):
    student, teacher, labels = case(seed)
    loss = interpolated_loss(student, teacher, labels, torch.tensor(0.0))
    loss.backward()
    torch.testing.assert_close(loss, token_entropy(student, labels, reduction="token_mean"))
    assert student.grad.abs().max() < 1e-15


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_at_1_loss_and_gradient_are_those_of_forward_kl(seed):
    student, teacher, labels = case(seed)
    loss = interpolated_loss(student, teacher, labels, torch.tensor(1.0))
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(
        loss, token_soft_cross_entropy(student, teacher.softmax(-1), labels, reduction="token_mean")
    )
    kl = token_divergence(kl_divergence, student, teacher, labels, reduction="token_mean")
    torch.testing.assert_close(gradient, torch.autograd.grad(kl, student)[0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), t=st.floats(0.01, 0.99), constant=st.floats(-50, 50))
def test_the_target_is_the_normalised_geometric_mix_and_ignores_constants(seed, t, constant):
    student, teacher, _ = case(seed)
    mixing = torch.tensor(t, dtype=torch.float64)
    found = interpolate(student, teacher, mixing)
    geometric = student.detach().softmax(-1) ** (1 - t) * teacher.softmax(-1) ** t
    torch.testing.assert_close(found, geometric / geometric.sum(-1, keepdim=True))
    torch.testing.assert_close(interpolate(student, teacher + constant, mixing), found)
    assert not found.requires_grad
    arithmetic = (1 - t) * student.detach().softmax(-1) + t * teacher.softmax(-1)
    assert not torch.allclose(found, arithmetic, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_words_that_a_model_rules_out_leave_loss_and_gradient_finite(t):
    student, teacher, labels = case(5)
    ruled_out = student.detach().clone()
    ruled_out[..., 0] = -torch.inf
    ruled_out.requires_grad_()
    loss = interpolated_loss(ruled_out, teacher, labels, torch.tensor(t))
    loss.backward()
    assert loss.isfinite() and ruled_out.grad.isfinite().all()
    teacher[..., 1] = -torch.inf
    assert interpolated_loss(student, teacher, labels, torch.tensor(t)).isfinite()


def test_words_that_the_student_rules_out_contribute_nothing():
    student, teacher, labels = case(6)
    ruled_out = student.detach().clone()
    ruled_out[..., 0] = -torch.inf
    target = teacher.softmax(-1)
    wanted = -(target[..., 1:] * ruled_out.log_softmax(-1)[..., 1:]).sum(-1)
    found = interpolated_loss(ruled_out, teacher, labels, torch.tensor(1.0))
    torch.testing.assert_close(found, wanted[labels != -100].mean())


# ---------------------------------------------------------------- controller


@settings(max_examples=25, deadline=None)
@given(losses=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), alpha=st.floats(0, 1), start=st.floats(0, 1))
def test_t_is_that_of_the_hand_written_rule(losses, alpha, start):
    found = moved(Controller(start, 1.0, alpha, 0.9), losses, steps=40)
    wanted = by_hand(losses, 40, start=start, alpha=alpha, beta=0.9)[1:]
    assert found == pytest.approx(wanted, abs=2e-5)


@settings(max_examples=25, deadline=None)
@given(losses=st.lists(st.floats(1e-8, 1e4), min_size=2, max_size=30), end=st.floats(0.3, 1))
def test_t_never_falls_and_stays_between_the_line_and_its_end(losses, end):
    found = moved(Controller(0.2, end, 0.1, 0.99), losses, steps=len(losses))
    assert all(b >= a - 1e-6 for a, b in zip(found, found[1:], strict=False))
    line = [0.2 + (end - 0.2) * n / len(losses) for n in range(len(losses))]
    assert found[0] == pytest.approx(0.2)
    assert all(t >= low - 1e-6 and t <= end + 1e-6 for t, low in list(zip(found, line, strict=True))[1:])


def test_without_a_step_t_is_exactly_the_line():
    found = moved(Controller(0.4, 1.0, 0.0, 0.99), [3.0, 2.0, 1.0, 0.5], steps=10)
    assert found == pytest.approx([0.4, 0.46, 0.52, 0.58])


def test_a_flat_loss_moves_t_by_half_the_step_and_a_falling_one_by_more():
    flat, falling = Controller(0.2, 1.0, 0.01, 0.5), Controller(0.2, 1.0, 0.01, 0.5)
    one = moved(flat, [2.0] * 4, steps=10**6)
    assert [b - a for a, b in zip(one, one[1:], strict=False)] == pytest.approx(
        [0.01 * 0.5 * (1 - t) for t in one[:-1]], rel=1e-3
    )
    two = moved(falling, [2.0, 1.6, 1.2, 0.8], steps=10**6)
    assert all(b > a for a, b in zip(one[1:], two[1:], strict=True))


def test_the_first_step_only_remembers_the_loss():
    controller = Controller(0.4, 1.0, 0.5, 0.99)
    controller.update(torch.tensor(2.5), 0, 10)
    assert (float(controller.t), float(controller.momentum), float(controller.previous_loss)) == (
        pytest.approx(0.4), 0.0, 2.5,
    )  # fmt: skip


def test_the_straight_line_keeps_the_first_step_too():
    assert moved(Controller(0.2, 0.9, 0.5, 0.99, adaptive=False), [3.0, 2.0, 9.0], steps=7) == pytest.approx(
        [0.2, 0.3, 0.4]
    )


def test_tiny_losses_do_not_explode():
    found = moved(Controller(0.2, 1.0, 0.1, 0.99), [0.0, 0.0, 1e-30, 1e-38, 0.0], steps=10)
    assert all(0.2 <= t <= 1.0 for t in found)


@pytest.mark.parametrize("wrong", [{"t_start": -0.1}, {"t_end": 1.1}, {"t_start": 0.9, "t_end": 0.5}, {"beta": 2.0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError):
        method(**wrong)


# ---------------------------------------------------------------- in the loop


def test_t_in_training_follows_the_logged_losses():
    taid = method(alpha=0.3, beta=0.8)
    rows = trained(taid).train
    wanted = by_hand([row["taid"] for row in rows], 9, alpha=0.3, beta=0.8)
    assert [row["t"] for row in rows] == pytest.approx(wanted[:-1], abs=1e-5)
    assert float(taid.controller.t) == pytest.approx(wanted[-1], abs=1e-5)


def test_accumulated_batches_move_t_once_by_their_mean():
    one, two = method(alpha=0.3), method(alpha=0.3)
    trained(one, batch_size=4)
    trained(two, batch_size=2, accumulate=2)
    for name, buffer in one.controller.named_buffers():
        torch.testing.assert_close(buffer, two.controller.get_buffer(name), rtol=1e-4, atol=1e-5)


def test_validation_moves_nothing():
    taid = method(alpha=0.5)
    before = {name: buffer.clone() for name, buffer in taid.controller.named_buffers()}
    batch = samples().batch(torch.arange(4))
    taid.eval()
    taid.shipped()(batch["tokens"])
    taid.tune([batch])
    assert not differing(before, dict(taid.controller.named_buffers()))


class Broken(Exception):
    pass


class Breaking(TAID):
    def after_step(self) -> None:
        super().after_step()
        if self.clock.step == 5:
            raise Broken


def test_a_run_that_breaks_goes_on_with_the_same_t_bit_for_bit(tmp_path):
    whole, resumed = method(alpha=0.3), method(alpha=0.3)
    rows = trained(whole, folder=tmp_path / "whole").train
    broken = method(alpha=0.3)
    broken.__class__ = Breaking
    with pytest.raises(Broken):
        trained(broken, folder=tmp_path / "broken", checkpoint_every=2)
    again = trained(resumed, folder=tmp_path / "broken", checkpoint_every=2).train
    assert not differing(whole.state_dict(), resumed.state_dict())
    assert [row["t"] for row in again] == [row["t"] for row in rows]


def test_labels_take_their_share():
    taid = method(ratio=0.25)
    batch = {"labelled": samples().batch(torch.arange(4))}
    losses = taid.training_step(batch)
    assert taid.weights == {"ce": 0.75, "taid": 0.25} and losses.keys() == taid.weights.keys()
    assert method().weights == {"taid": 1.0}


def test_a_step_reads_nothing_back_from_the_device():
    taid = TAID(Bigram(0), Frozen(Bigram(1).to("meta"))).to("meta")
    ids = torch.empty(B, L, dtype=torch.long, device="meta")
    losses = taid.training_step({"labelled": {"tokens": {"input_ids": ids}, "labels": ids}})
    losses["taid"].backward()
    taid.after_step()
    assert taid.controller.t.device.type == "meta"


def test_the_loss_is_over_the_scored_tokens_that_follow():
    taid = method()
    fields = samples().batch(torch.arange(4))
    student, labels = shift(taid.student(fields["tokens"]), fields["labels"])
    teacher, _ = shift(taid.teacher.logits(fields, "tokens"), fields["labels"])
    target = interpolate(student, teacher, torch.tensor(0.4))
    wanted = -(target * student.log_softmax(-1)).sum(-1)[labels != -100].mean()
    torch.testing.assert_close(taid.training_step({"labelled": fields})["taid"], wanted)


# ---------------------------------------------------------------- a vocabulary in chunks


def transformer(seed: int, width: int) -> nn.Module:
    from limbeck.models import load_language_model

    torch.manual_seed(seed)
    shape = {"num_hidden_layers": 1, "hidden_size": width, "num_attention_heads": 2, "intermediate_size": 16}
    model = load_language_model("hf-config:llama", vocab_size=V, max_length=L, eos_id=1, config=shape)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)  # so that the two have opinions, and other ones
    return model


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_in_chunks_losses_and_gradients_are_those_of_whole_logits(t, ratio):
    student, teacher = transformer(0, 8), Frozen(transformer(1, 12))
    found = []
    for chunk in (None, 3):
        taid = TAID(student, teacher, ratio=ratio, chunk=chunk)
        taid.controller.t.fill_(t)
        losses = taid.training_step({"labelled": samples().batch(torch.arange(4))})
        total = sum(taid.weights[name] * loss for name, loss in losses.items())
        found.append((losses, torch.autograd.grad(total, list(student.parameters()))))
    (wanted, slopes), (chunked, in_chunks) = found
    assert chunked.keys() == wanted.keys() == taid.weights.keys()
    for name in wanted:
        torch.testing.assert_close(chunked[name], wanted[name])
    for one, other in zip(in_chunks, slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_in_chunks_t_moves_as_with_whole_logits():
    rows = [
        trained(TAID(transformer(0, 8), Frozen(transformer(1, 12)), alpha=0.3, chunk=chunk)).train
        for chunk in (None, 3)
    ]
    assert [row["t"] for row in rows[0]] == pytest.approx([row["t"] for row in rows[1]], abs=1e-4)


def test_chunks_of_networks_without_hidden_states_are_refused():
    with pytest.raises(UserError, match="student that is a causal transformers model"):
        method(chunk=3)
    with pytest.raises(UserError, match="teacher that is a causal transformers model"):
        TAID(transformer(0, 8), Frozen(Bigram(1)), chunk=3)
    with pytest.raises(UserError, match="chunk is 0"):
        method(chunk=0)


# ---------------------------------------------------------------- two processes


def both(number: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "NODE_RANK": "0"}
    fabric = Trainer(steps=1, accelerator="cpu", devices=2, strategy="ddp").fabric()
    try:
        assert rank() == number
        taid = method(alpha=0.3)
        trained(taid, batch_size=2, fabric=fabric)
        torch.save(taid.state_dict(), Path(folder) / f"{number}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_have_the_same_t_and_that_of_one_with_the_double_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(both, (str(tmp_path), port), nprocs=2)
    found = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1)]
    assert not differing(*found)
    alone = method(alpha=0.3)
    trained(alone, batch_size=4)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- real size


@pytest.mark.slow
def test_a_student_of_100_million_weights_takes_a_step_by_overrides_alone(tmp_path):
    # Imported here: the two processes above start faster without them.
    from limbeck.models import load_language_model, save_model
    from limbeck.recipes import run

    text = tmp_path / "input.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 8)
    small = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50257, "n_positions": 17}
    save_model(load_language_model("hf-config:gpt2", config=small), tmp_path / "teacher")
    result = run(
        "taid",
        {
            "data.name_or_path": str(text),
            "data.max_length": 17,
            "data.test_fraction": 0.2,
            "teacher": {"name": str(tmp_path / "teacher")},
            "student": {"name": "hf-config:gpt2", "config": {"vocab_size": 50257}},
            "streams.labelled.batch_size": 2,
            "trainer.steps": 1,
            "trainer.optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.0},  # without Adam's 1 GB of moments
        },
        workspace=tmp_path / "run",
        report=False,
    )
    assert result.metrics["parameters"] > 100e6
    assert result.fit.steps == 1 and result.metrics["teacher_kl"] > 0

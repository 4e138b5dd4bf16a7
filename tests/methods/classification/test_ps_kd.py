"""PS-KD: where the past is one-hot it is cross-entropy; the past is that of one epoch ago, of this very sample.

A linear student on the rows of an identity matrix makes every logit a weight (logits_BC = weight_CB transposed), so
that the target can be read off the gradient: t = softmax - B dL/dz.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.data import Samples, Stream, Weak
from limbeck.errors import UserError
from limbeck.methods.classification.ps_kd import PSKD
from limbeck.methods.classification.supervised import Supervised
from limbeck.train import Batch, Clock, Losses, Method, Optimizer, Trainer, fit

B, C = 6, 4
N = 70  # 70 samples in batches of 16: the last 6 of every epoch are dropped


def one_step(past: Tensor | None, *, alpha: float = 0.8, epoch: int = 0, epochs: int = 10, seed: int = 0):
    """(loss, target read off the gradient [B, C], softmax before the step [B, C], labels [B], method)."""
    torch.manual_seed(seed)
    student, labels = nn.Linear(B, C, bias=False), torch.randint(C, (B,))
    method = PSKD(student, alpha_final=alpha)
    method.clock = Clock(step=epoch * 3, steps=epochs * 3, steps_per_epoch=3)
    samples = Samples({"image": torch.zeros(B, 1, 1, 1), "label": labels}, classes=list("abcd"))
    method.prepare({"labelled": Stream(samples, B)})
    if past is not None:
        method.past.table.copy_(past)
    softmax = student.weight.detach().T.softmax(-1)
    loss = method.training_step({"labelled": {"weak": torch.eye(B), "label": labels, "index": torch.arange(B)}})["ce"]
    loss.backward()
    return loss.detach(), softmax - B * student.weight.grad.T, softmax, labels, method


def random_past(seed: int) -> Tensor:
    return torch.randn(B, C, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 1000), epoch=st.integers(0, 9))
def test_gradient_is_prediction_minus_the_mixed_target(alpha, seed, epoch):
    past = random_past(seed)
    loss, target, softmax, labels, _ = one_step(past, alpha=alpha, epoch=epoch, seed=seed)
    share = alpha * (epoch + 1) / 10
    want = (1 - share) * torch.eye(C)[labels] + share * past
    torch.testing.assert_close(target, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, -(want * softmax.log()).sum(-1).mean(), atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0, 0.49), seed=st.integers(0, 1000))
def test_target_is_a_distribution_whose_argmax_stays_the_label_below_one_half(alpha, seed):
    _, target, _, labels, _ = one_step(random_past(seed), alpha=alpha, epoch=9, seed=seed)
    torch.testing.assert_close(target.sum(-1), torch.ones(B), atol=1e-5, rtol=0)
    assert (target >= -1e-5).all()
    assert torch.equal(target.argmax(-1), labels)


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 1000))
def test_first_epoch_is_cross_entropy_whatever_alpha_is(alpha, seed):
    loss, _, softmax, labels, _ = one_step(None, alpha=alpha, epochs=1, seed=seed)
    torch.testing.assert_close(loss, F.nll_loss(softmax.log(), labels), atol=1e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 1000))
def test_a_uniform_past_is_label_smoothing_by_alpha(alpha, seed):
    loss, _, softmax, labels, _ = one_step(torch.full((B, C), 1 / C), alpha=alpha, epoch=9, seed=seed)
    torch.testing.assert_close(loss, F.cross_entropy(softmax.log(), labels, label_smoothing=alpha))


def test_alpha_grows_linearly_over_epochs_and_ends_at_alpha_final():
    wrong = torch.eye(C)[torch.randint(C, (B,), generator=torch.Generator().manual_seed(0))]
    for epoch in range(5):
        _, target, _, labels, _ = one_step(wrong, alpha=0.8, epoch=epoch, epochs=5)
        elsewhere = wrong.argmax(-1) != labels
        weight_of_past = target[elsewhere].gather(-1, wrong.argmax(-1)[elsewhere, None])
        torch.testing.assert_close(weight_of_past, torch.full_like(weight_of_past, 0.8 * (epoch + 1) / 5))


def test_after_the_same_gain_a_hard_sample_keeps_more_of_its_pull_than_a_well_learnt_one():
    now, past = torch.tensor([0.92, 0.32]), torch.tensor([0.9, 0.3])  # of the label: well learnt, hard
    student, labels = nn.Linear(2, 2, bias=False), torch.zeros(2, dtype=torch.long)
    student.weight.data = torch.stack([now, 1 - now]).log()
    method = PSKD(student, alpha_final=0.8)
    method.prepare({"labelled": Stream(Samples({"image": torch.zeros(2, 1), "label": labels}, list("ab")), 2)})
    method.past.table.copy_(torch.stack([past, 1 - past], dim=1))
    fields = {"weak": torch.eye(2), "label": labels, "index": torch.arange(2)}
    method.training_step({"labelled": fields})["ce"].backward()
    kept = 2 * student.weight.grad[0] / (now - 1)  # share of the pull of plain cross-entropy
    torch.testing.assert_close(kept, 1 - 0.8 * (1 - past) / (1 - now), atol=1e-5, rtol=1e-4)
    assert 0 <= kept[0].round(decimals=4) < kept[1] < 1


def test_the_past_takes_no_gradient_and_is_no_parameter():
    *_, method = one_step(random_past(0))
    assert not method.past.table.requires_grad
    assert [name for name, _ in method.named_parameters()] == ["student.weight"]
    assert "past.table" in method.state_dict()


def test_what_is_kept_is_the_prediction_of_this_forward_for_these_indices_only():
    torch.manual_seed(0)
    samples = Samples({"image": torch.zeros(5, 1), "label": torch.tensor([0, 1, 2, 0, 1])})
    method = PSKD(nn.Linear(2, 3, bias=False))
    method.prepare({"labelled": Stream(samples, 2)})
    before = method.past.table.clone()
    index = torch.tensor([3, 1])
    method.training_step({"labelled": {"weak": torch.eye(2), "label": torch.tensor([0, 1]), "index": index}})
    torch.testing.assert_close(method.past.table[index], method.student.weight.detach().T.softmax(-1))
    untouched = torch.tensor([0, 2, 4])
    assert torch.equal(method.past.table[untouched], before[untouched])


def test_a_student_with_more_classes_than_the_data_can_be_trained():
    method = PSKD(nn.Linear(2, 7))
    method.prepare({"labelled": Stream(Samples({"image": torch.zeros(2, 1), "label": torch.tensor([0, 1])}), 2)})
    fields = {"weak": torch.eye(2), "label": torch.tensor([0, 1]), "index": torch.arange(2)}
    assert method.training_step({"labelled": fields})["ce"].isfinite()


def test_half_precision_table_takes_half_of_the_memory_and_is_close():
    full, half = PSKD(nn.Linear(2, 3)), PSKD(nn.Linear(2, 3), half_precision_table=True)
    half.load_state_dict(full.state_dict())
    fields = {"weak": torch.randn(2, 2), "label": torch.tensor([0, 1]), "index": torch.arange(2)}
    for method in (full, half):
        samples = Samples({"image": torch.zeros(2, 1), "label": torch.tensor([0, 1])}, list("abc"))
        method.prepare({"labelled": Stream(samples, 2)})
        method.training_step({"labelled": fields})
    assert half.past.table.dtype == torch.float16
    losses = [method.training_step({"labelled": fields})["ce"] for method in (full, half)]
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=0)


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_out_of_range_is_refused_at_the_door_and_not_in_a_late_epoch(alpha):
    with pytest.raises(UserError, match="alpha_final"):
        PSKD(nn.Linear(2, 2), alpha_final=alpha)


# -- over whole runs ------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, C)
    )


def stream() -> Stream:
    """Every third of 210 samples: their indices are not their rows."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (3 * N, 1, 8, 8), dtype=torch.uint8, generator=generator)
    samples = Samples({"image": images, "label": torch.randint(C, (3 * N,), generator=generator)}, classes=list("abcd"))
    return Stream(samples.select(torch.arange(0, 3 * N, 3)), 16, {"weak": Weak(padding=1)})


def trainer(epochs: int) -> Trainer:
    optimizer = Optimizer("sgd", lr=0.05, nesterov=True, weight_decay=5e-4)
    return Trainer(epochs=epochs, optimizer=optimizer, accelerator="cpu", log_every=1, checkpoint_every=1, seed=5)


class Witness(PSKD):
    """Writes down the softmax of every training forward by its sample, and can be killed."""

    def __init__(self, *args, kill_at: int | None = None, **settings) -> None:
        super().__init__(*args, **settings)
        self.kill_at, self.emitted = kill_at, {}

    def training_step(self, batch: Batch) -> Losses:
        heard = []
        hook = self.student.register_forward_hook(lambda _net, _inputs, logits: heard.append(logits.detach()))
        losses = super().training_step(batch)
        hook.remove()
        for index, row in zip(batch["labelled"]["index"].tolist(), heard[0].softmax(-1), strict=True):
            self.emitted[index] = (self.clock.epoch, row)
        return losses

    def after_step(self) -> None:
        if self.clock.step == self.kill_at:
            raise KeyboardInterrupt


def same_weights(first: Method, second: Method) -> bool:
    pairs = zip(first.student.state_dict().values(), second.student.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_alpha_0_is_bitwise_plain_cross_entropy_over_a_run():
    plain, ours = Supervised(net()), PSKD(net(), alpha_final=0.0)
    results = [fit(method, {"labelled": stream()}, trainer(3)) for method in (plain, ours)]
    assert same_weights(plain, ours)
    # the printed values are the same sums in another order
    first, second = ([row["ce"] for row in result.train] for result in results)
    assert first == pytest.approx(second, rel=1e-5)


def test_the_first_epoch_of_a_run_is_bitwise_cross_entropy_and_the_second_is_not():
    plain, ours = Supervised(net()), PSKD(net(), alpha_final=1.0)
    first, second = (fit(method, {"labelled": stream()}, trainer(2)).train for method in (plain, ours))
    per_epoch = N // 16
    # (1 - alpha) + alpha is 1 but for rounding
    assert [row["ce"] for row in first[:per_epoch]] == pytest.approx(
        [row["ce"] for row in second[:per_epoch]], rel=1e-5
    )
    assert abs(first[-1]["ce"] - second[-1]["ce"]) > 1e-3


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_table_holds_what_was_last_emitted_for_every_sample_and_the_label_of_those_never_seen(epochs):
    method, data = Witness(net()), stream()
    fit(method, {"labelled": data}, trainer(epochs))
    labels = dict(zip(data.samples.index.tolist(), data.samples.labels.tolist(), strict=True))
    for index, label in labels.items():
        want = method.emitted[index][1] if index in method.emitted else torch.eye(C)[label]
        assert torch.equal(method.past.table[index], want), index
    last = [index for index, (epoch, _) in method.emitted.items() if epoch == epochs - 1]
    assert len(last) == N // 16 * 16
    if epochs == 1:
        assert len(labels) - len(method.emitted) == N % 16  # the dropped last batch


def test_a_run_killed_in_mid_epoch_goes_on_to_the_very_same_weights_and_table(tmp_path: Path):
    whole = Witness(net())
    fit(whole, {"labelled": stream()}, trainer(4), folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(Witness(net(), kill_at=9), {"labelled": stream()}, trainer(4), folder=tmp_path / "killed")
    resumed = Witness(copy.deepcopy(net()))
    fit(resumed, {"labelled": stream()}, trainer(4), folder=tmp_path / "killed")
    assert min(epoch for epoch, _ in resumed.emitted.values()) >= 2  # it did go on and not start anew
    assert same_weights(whole, resumed)
    assert torch.equal(whole.past.table, resumed.past.table)

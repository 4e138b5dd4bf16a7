"""Losses that are no numbers end a run before they do harm."""

from __future__ import annotations

import pytest
import torch

from limbeck.train import NonFiniteLoss, Optimizer, fit
from limbeck.train.loop import RunningTerms
from tests.train.toys import Classify, differing, pictures, plain_net, streams, trainer, weights_of

NAN, INF = float("nan"), float("inf")


class Bad(Classify):
    """The term `size` is `value` at step `at`."""

    def __init__(self, student, at, value=NAN):
        super().__init__(student)
        self.at, self.value = at, value

    def training_step(self, batch):
        losses = super().training_step(batch)
        if self.clock.step == self.at:
            self.before = weights_of(self.student)
            losses["size"] = losses["size"] * self.value
        return losses


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_run_stops_before_the_update_and_names_term_and_step(value):
    method = Bad(plain_net(), at=2, value=value)
    with pytest.raises(NonFiniteLoss, match="'size' is not finite at step 2; nothing was saved yet"):
        fit(method, streams(), trainer())
    assert not differing(method.before, weights_of(method.student))


def test_the_last_good_checkpoint_is_kept_and_named(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"last good checkpoint is .*checkpoint\.pt"):
        fit(Bad(plain_net(), at=5), streams(), trainer(steps=9, checkpoint_every=2), folder=tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4
    healed, whole = Classify(plain_net()), Classify(plain_net())
    fit(healed, streams(), trainer(steps=9), folder=tmp_path)
    fit(whole, streams(), trainer(steps=9))
    assert not differing(whole.state_dict(), healed.state_dict())


class BadGradient(Classify):
    """At step 3 a finite loss whose gradient is NaN: the square root at zero, times zero."""

    def training_step(self, batch):
        losses = super().training_step(batch)
        if self.clock.step == 3:
            losses["size"] = (losses["size"] * 0).sqrt()
        return losses


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_weights_that_a_bad_gradient_spoilt_are_never_saved(clip_norm, tmp_path):
    method = BadGradient(plain_net())
    method.weights = {}
    with pytest.raises(NonFiniteLoss, match="the weight 'student.0.weight' is not finite at step 4.*last good"):
        fit(method, streams(), trainer(checkpoint_every=1, clip_norm=clip_norm), folder=tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3 and all(value.isfinite().all() for value in state["method"].values())


def test_weights_that_the_last_gradient_spoilt_do_not_ship():
    method = BadGradient(plain_net())
    method.weights = {}
    with pytest.raises(NonFiniteLoss, match="weight"):
        fit(method, streams(), trainer(steps=4))


# -- on an accelerator the guard records on the device and is read at intervals ---------------------------------


def recorded(*steps: dict[str, float]) -> RunningTerms:
    terms = RunningTerms(check_each_step=False, checkpoint=None)
    for step, losses in enumerate(steps):
        terms.take({name: torch.tensor(value) for name, value in losses.items()}, step)
    return terms


def test_an_accelerator_learns_of_bad_terms_at_the_next_look():
    terms = recorded({"a": 1, "b": 1}, {"a": 1, "b": NAN}, {"a": INF, "b": 1}, {"a": 1, "b": 1})
    for look in (terms.look, terms.means):
        with pytest.raises(NonFiniteLoss, match="'b' is not finite at step 1"):
            look()


def test_the_first_bad_step_is_kept_when_later_ones_are_bad_too():
    with pytest.raises(NonFiniteLoss, match="step 1"):
        recorded({"a": 1}, {"a": NAN}, {"a": NAN}).look()


def test_good_terms_pass_the_look():
    terms = recorded({"a": 1, "b": -2}, {"a": 3, "b": 0})
    terms.look()
    assert terms.means() == {"a": 2.0, "b": -1.0}


def test_means_span_the_steps_since_the_last_row_and_mix_with_plain_numbers():
    terms = recorded({"a": 1}, {"a": 3})
    terms.add("share", 0.25)
    terms.add("share", torch.tensor(0.75))
    terms.add("plain", 2.0)
    assert terms.means() == {"a": 2.0, "share": 0.5, "plain": 2.0}
    assert terms.means() == {}


def test_sums_survive_a_checkpoint():
    terms, resumed = recorded({"a": 1}, {"a": 3}), RunningTerms(False, None)
    resumed.load_state_dict(terms.state_dict(), torch.device("cpu"))
    resumed.add("a", torch.tensor(8.0))
    assert resumed.means() == {"a": 4.0}


def test_an_epoch_on_an_accelerator_ends_with_a_look_before_its_evaluation(monkeypatch):
    """Whatever the logging interval is: NaN weights must not be evaluated, kept as the best, or saved."""
    init = RunningTerms.__init__
    monkeypatch.setattr(RunningTerms, "__init__", lambda self, _, checkpoint: init(self, False, checkpoint))
    evaluated = []
    evaluator = lambda model, samples: evaluated.append(1) or {"accuracy": 0.0}  # noqa: E731
    with pytest.raises(NonFiniteLoss, match="'size' is not finite at step 8"):
        fit(
            Bad(plain_net(), at=8),
            streams(),
            trainer(steps=24, log_every=1000, optimizer=Optimizer(lr=0.01)),
            validation=pictures(8),
            evaluator=evaluator,
        )
    assert evaluated == [1]


class Namesake(Classify):
    """Logs a number under the name of a loss term: one column would mix the two."""

    def training_step(self, batch):
        self.log(size=1.0)
        return super().training_step(batch)


def test_a_logged_number_cannot_have_the_name_of_a_loss_term():
    with pytest.raises(ValueError, match="'size' is a loss term"):
        fit(Namesake(plain_net()), streams(), trainer())

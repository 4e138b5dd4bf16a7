"""The moving average of a network, and its past."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck.teachers import EMA, Past
from limbeck.train import Method

FIELDS = {"weak": torch.rand(6, 4, generator=torch.Generator().manual_seed(2))}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    model[1].running_mean.fill_(float(seed))
    model[1].num_batches_tracked.fill_(seed)
    return model


@given(decay=st.floats(0, 1), steps=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_the_average_follows_its_formula(decay, steps):
    average = EMA(net(0), decay)
    wanted = net(0)[0].weight.detach()
    for step in range(steps):
        model = net(step + 1)
        average.update(model, step)
        wanted = decay * wanted + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(average.model[0].weight, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (8, 0.5), (90, 0.9), (10**6, 0.9)])
def test_with_warm_up_the_decay_grows_to_its_value(step, decay):
    average = EMA(net(0), 0.9, warmup=True)
    average.update(net(1), step)
    wanted = decay * net(0)[0].weight + (1 - decay) * net(1)[0].weight
    torch.testing.assert_close(average.model[0].weight, wanted.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("step", "decay"), [(0, 0.0), (1, 0.5), (3, 0.75), (9, 0.9), (10**6, 0.9)])
def test_the_mean_warm_up_is_the_plain_mean_of_the_first_weights(step, decay):
    average = EMA(net(0), 0.9, warmup="mean")
    average.update(net(1), step)
    wanted = decay * net(0)[0].weight + (1 - decay) * net(1)[0].weight
    torch.testing.assert_close(average.model[0].weight, wanted.detach(), rtol=1e-4, atol=1e-6)


def test_buffers_that_are_kept_are_the_copys_own():
    average = EMA(net(0), 0.75, buffers="keep")
    average.update(net(1), 0)
    assert average.model[1].running_mean.eq(0).all() and average.model[1].num_batches_tracked == 0


@pytest.mark.parametrize(("buffers", "mean"), [("copy", 1.0), ("average", 0.25)])
def test_buffers_are_copied_or_averaged_and_counters_always_copied(buffers, mean):
    average = EMA(net(0), 0.75, buffers=buffers)
    average.update(net(1), 0)
    assert average.model[1].running_mean[0] == mean
    assert average.model[1].num_batches_tracked == 1


def test_the_followed_network_does_not_move():
    model = net(1)
    before = copy.deepcopy(model.state_dict())
    EMA(net(0), 0.5).update(model, 0)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_a_decay_outside_of_0_to_1_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay is {decay}"):
        EMA(net(), decay)


KINDS = {"ema": lambda model: EMA(model, 0.5), "past": Past}


class Holder(Method):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.student = net()
        self.other = KINDS[kind](self.student)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_in_the_checkpoint_and_not_among_what_is_trained(kind):
    method = Holder(kind)
    assert "other.model.0.weight" in method.state_dict()
    assert {id(p) for p in method.parts()["student"]} == {id(p) for p in method.student.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_it_stays_in_eval_mode_and_the_student_does_not(kind):
    method = Holder(kind)
    method.train()
    assert method.student.training and not any(m.training for m in method.other.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_its_answers_are_those_of_its_copy_without_gradient(kind):
    method = Holder(kind)
    method.train()
    with torch.no_grad():
        method.student[0].weight.zero_()
    outputs = method.other(FIELDS, "weak")
    torch.testing.assert_close(outputs.logits, net().eval()(FIELDS["weak"]).detach())
    assert not outputs.logits.requires_grad and not outputs.logits.is_inference()


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_of_the_method_has_its_own(kind):
    method = Holder(kind)
    assert copy.deepcopy(method).other.model[0].weight is not method.other.model[0].weight


def test_the_past_changes_only_when_it_is_renewed():
    model = net(1)
    past = Past(model)
    now = net(2)
    assert torch.equal(past.model[0].weight, model[0].weight)
    past.renew(now)
    assert all(torch.equal(value, past.model.state_dict()[name]) for name, value in now.state_dict().items())
    with torch.no_grad():
        now[0].weight.zero_()
    assert past.model[0].weight.any() and not any(p.requires_grad for p in past.parameters())

"""Optimisers: groups without weight decay, and LARS against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.train import LARS, Optimizer


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars"])
def test_norm_and_bias_are_spared_from_weight_decay_on_request(name):
    built = Optimizer(name, weight_decay=0.3, decay_norm_and_bias=False).build(net().parameters())
    decays = {p.ndim: group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert decays == {2: 0.3, 1: 0.0}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars"])
def test_every_parameter_is_in_one_group_with_the_base_rate(name):
    model = net()
    for spare in (True, False):
        built = Optimizer(name, lr=0.7, decay_norm_and_bias=not spare).build(model.parameters())
        held = [p for group in built.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()} and len(held) == 5
        assert {group["lr"] for group in built.param_groups} == {0.7}


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="nothing to train"):
        Optimizer().build([])


def test_adamw_decays_apart_from_the_gradient_and_adam_within_it():
    weights = {}
    for name in ("adam", "adamw"):
        weight = nn.Parameter(torch.tensor([[2.0]]))
        weight.grad = torch.tensor([[1e-12]])
        Optimizer(name, lr=0.1, weight_decay=0.5).build([weight]).step()
        weights[name] = weight.item()
    assert weights["adamw"] == pytest.approx(2.0 * (1 - 0.1 * 0.5), abs=1e-4)
    assert weights["adam"] == pytest.approx(2.0 - 0.1, abs=1e-4)  # Adam normalises the decay's size away


def lars_by_hand(weights, gradients_by_step, rates, momentum, decay, trust, adapt):
    """The step as SimCLR's code has it, one tensor and one number at a time."""
    weights = [w.clone() for w in weights]
    buffers = [torch.zeros_like(w) for w in weights]
    for gradients, rate in zip(gradients_by_step, rates, strict=True):
        for i, gradient in enumerate(gradients):
            g = gradient + (decay * weights[i] if adapt[i] else 0)
            w_norm, g_norm = weights[i].norm().item(), g.norm().item()
            ratio = trust * w_norm / g_norm if adapt[i] and w_norm > 0 and g_norm > 0 else 1.0
            buffers[i] = momentum * buffers[i] + rate * ratio * g
            weights[i] = weights[i] - buffers[i]
    return weights


def test_lars_equals_the_step_written_by_hand_under_a_changing_rate():
    torch.manual_seed(1)
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.randn(5))]
    start = [p.detach().clone() for p in parameters]
    rates = [0.5, 0.3, 0.9, 0.1]
    gradients = [[torch.randn_like(p) for p in parameters] for _ in rates]
    gradients[2][0].zero_()  # only weight decay is left of it
    optimizer = Optimizer("lars", lr=1.0, momentum=0.9, weight_decay=0.01, trust=1e-2, decay_norm_and_bias=False)
    built = optimizer.build(parameters)
    for step, rate in zip(gradients, rates, strict=True):
        for group in built.param_groups:
            group["lr"] = rate
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        built.step()
    wanted = lars_by_hand(start, gradients, rates, 0.9, 0.01, 1e-2, adapt=[True, True, False])
    for parameter, by_hand in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), by_hand)


def test_lars_leaves_parameters_without_gradient_alone():
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    used.grad = torch.ones(2, 2)
    LARS([used, unused], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(unused, torch.ones(2, 2)) and not torch.equal(used, torch.ones(2, 2))

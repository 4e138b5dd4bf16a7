"""Virtual steps: what goes back, and what stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.train import Loop, Method, Optimizer, Snapshot, Soup
from tests.train.toys import norm_net, pictures, plain_net, stream, trainer, weights_of


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()


def equal(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_restoring_brings_parameters_back_as_often_as_it_is_asked():
    net = plain_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    before, snapshot = weights_of(net), Snapshot(net)
    for _ in range(2):
        step(net, optimizer)
        assert not equal(before, weights_of(net))
        snapshot.restore()
        assert equal(before, weights_of(net))


@pytest.mark.parametrize("buffers", [True, False])
def test_buffers_go_back_only_when_asked(buffers):
    net = norm_net()
    before, snapshot = weights_of(net), Snapshot(net, buffers=buffers)
    step(net, torch.optim.SGD(net.parameters(), 0.1))
    snapshot.restore()
    assert torch.equal(net[1].running_mean, before["1.running_mean"]) == buffers
    assert torch.equal(net[0].weight, before["0.weight"])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_rolled_back_optimizer_goes_on_as_if_nothing_had_been(kind, steps):
    settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    virtual, plain = plain_net(), plain_net()
    of_virtual, of_plain = kind(virtual.parameters(), 0.1, **settings), kind(plain.parameters(), 0.1, **settings)
    for net, optimizer in ((virtual, of_virtual), (plain, of_plain)):
        torch.manual_seed(0)
        for _ in range(steps):
            step(net, optimizer)
    snapshot = Snapshot(virtual, optimizer=of_virtual)
    for _ in range(2):
        step(virtual, of_virtual)
        snapshot.restore()
    for net, optimizer in ((virtual, of_virtual), (plain, of_plain)):
        torch.manual_seed(1)
        step(net, optimizer)
        step(net, optimizer)
    assert equal(weights_of(plain), weights_of(virtual))


def test_without_it_the_moments_of_virtual_steps_stay():
    net = plain_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    snapshot = Snapshot(net)
    step(net, optimizer)
    snapshot.restore()
    assert all("momentum_buffer" in optimizer.state[p] for p in net.parameters())


def test_a_random_roll_back_repeats_the_draws():
    snapshot = Snapshot(plain_net(), random=True)
    first = torch.rand(3)
    snapshot.restore()
    assert torch.equal(first, torch.rand(3))


def test_a_soup_is_the_mean_of_its_ingredients():
    nets = [plain_net(seed) for seed in range(3)]
    soup, pot = Soup(), plain_net(9)
    for net in nets:
        soup.add(net)
    soup.pour(pot)
    for name, value in weights_of(pot).items():
        torch.testing.assert_close(value, torch.stack([weights_of(net)[name] for net in nets]).mean(0))
    with pytest.raises(ValueError, match="at least one"):
        Soup().pour(pot)


class LookAhead(Method):
    """One virtual step before each real one, rolled back with the optimiser; the result is that of real steps alone."""

    def __init__(self, student: nn.Module, virtual: int) -> None:
        super().__init__()
        self.student, self.virtual = student, virtual

    def training_step(self, batch):
        labelled = batch["labelled"]
        snapshot = Snapshot(self.student, optimizer=self.optimizers["student"])
        for turn in range(self.virtual + 1):
            snapshot.restore()
            loss = nn.functional.cross_entropy(self.student(labelled["weak"]), labelled["label"])
            yield "student", {"ce": loss * (1 if turn == self.virtual else 3)}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_loop_offers_the_optimizer_to_be_rolled_back(name):
    ended = []
    for virtual in (0, 2):
        method = LookAhead(plain_net(), virtual)
        loop = Loop(
            method,
            {"labelled": stream(pictures())},
            trainer(steps=5, optimizer=Optimizer(name=name, lr=0.01, momentum=0.9)),
        )
        loop.run()
        assert method.optimizers == {}
        ended.append(weights_of(method))
    assert equal(*ended)

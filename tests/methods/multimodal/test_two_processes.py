"""Routing and load balance in two gloo processes equal those of one with the double batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from limbeck.distributed import rank, world_size
from limbeck.methods.multimodal.mst_distill import RoutedDistillation
from limbeck.models.moe import GateNet
from limbeck.teachers import Frozen
from limbeck.teachers.routed import Routed
from limbeck.train import average_gradients

C, M = 4, 3


class Reads(nn.Module):
    def __init__(self, field: str) -> None:
        super().__init__()
        self.field, self.linear = field, nn.Linear(5, C)

    def forward(self, fields) -> Tensor:
        return self.linear(fields[self.field])


def one_step(balance: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    pool = Routed([Frozen(Reads("image")) for _ in range(M)])
    method = RoutedDistillation(Reads("sound"), GateNet(C, M), pool, k=2, balance=balance)
    with torch.no_grad():  # an unbalanced gate, so that the mean over both halves matters
        method.gate.out.weight.mul_(20)
    generator = torch.Generator().manual_seed(1)
    whole = {name: torch.randn(8, 5, generator=generator) for name in ("image", "sound")}
    whole["sound"][:4] += 2
    whole["label"] = torch.arange(8) % C
    fields = {name: value.chunk(world_size())[rank()] for name, value in whole.items()}
    losses = method.training_step({"labelled": fields})
    sum(method.weights[term] * value for term, value in losses.items()).backward()
    average_gradients(method.parameters())
    found = {f"gradient/{n}": p.grad for n, p in method.named_parameters()}
    numbers = {**losses, **method.logged}
    for name, value in numbers.items():
        mean = value.detach().clone()
        if world_size() > 1:
            dist.all_reduce(mean)
            mean /= world_size()
        found[name] = mean
    return found


def both(number: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=number, world_size=2)
    try:
        torch.save({balance: one_step(balance) for balance in ("kl", "cv")}, Path(folder) / f"{number}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(both, (str(folder), port), nprocs=2)
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in (0, 1)]


@pytest.mark.parametrize("balance", ["kl", "cv"])
def test_two_processes_route_and_balance_like_one_with_the_double_batch(balance, found):
    alone = one_step(balance)
    assert alone["balance"] > 0.01 and alone["gradient/gate.out.weight"].abs().max() > 1e-4
    for process in found:
        for name, value in alone.items():
            torch.testing.assert_close(process[balance][name], value, rtol=1e-5, atol=1e-6, msg=name)

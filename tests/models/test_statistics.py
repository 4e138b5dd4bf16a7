"""What BatchNorm layers read, by hooks that leave nothing behind, with one process and with two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.statistics import forward_with_statistics, statistics_distance


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten()
    )
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return model.eval()


def images(n: int = 6) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_statistics_are_those_of_each_layers_input_in_order() -> None:
    model, x = net(), images()
    output, found = forward_with_statistics(model, x)
    assert torch.equal(output, model(x)) and [len(layer.mean) for layer in found] == [4, 5]
    for layer, read in zip(found, (model[0](x), model[:4](x)), strict=True):
        assert torch.allclose(layer.mean, read.mean((0, 2, 3)), atol=1e-6)
        assert torch.allclose(layer.variance, read.var((0, 2, 3), correction=0), atol=1e-6)
    assert torch.equal(found[1].running_variance, model[4].running_var)


def test_the_distance_is_the_sum_of_norms_with_a_factor_on_the_first_layer() -> None:
    _, found = forward_with_statistics(net(), images())
    each = [(a.variance - a.running_variance).norm() + (a.mean - a.running_mean).norm() for a in found]
    assert torch.allclose(statistics_distance(found, 10.0), 10 * each[0] + each[1])


def test_the_distance_is_zero_where_the_batch_has_the_remembered_statistics() -> None:
    model, x = net(), images()
    for _ in range(2):  # the second layer reads what the first one gives
        _, found = forward_with_statistics(model, x)
        for layer, read in zip((model[1], model[4]), found, strict=True):
            layer.running_mean.copy_(read.mean.detach())
            layer.running_var.copy_(read.variance.detach())
    with torch.no_grad():
        distance = statistics_distance(forward_with_statistics(model, x)[1])
    assert float(distance) == pytest.approx(0, abs=1e-5)


def test_nothing_stays_behind_and_nothing_moves() -> None:
    model, x = net(), images().requires_grad_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, found = forward_with_statistics(model, x)
    statistics_distance(found).backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert float(x.grad.norm()) > 0


def test_a_forward_that_fails_leaves_no_hook_behind() -> None:
    model = net()
    with pytest.raises(RuntimeError):
        forward_with_statistics(model, torch.rand(2, 7, 8, 8))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_network_without_running_statistics_is_refused() -> None:
    with pytest.raises(UserError, match="Sequential has no BatchNorm layer with running statistics"):
        forward_with_statistics(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2))


def test_a_layer_that_never_runs_is_named() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(UserError, match="never ran the BatchNorm layer 'idle'"):
        forward_with_statistics(Partly().eval(), torch.ones(3, 2))


def gradient_of(rank: int, world: int) -> dict[str, Tensor]:
    x = torch.cat([part for n, part in enumerate(images(6).split([2, 4])) if world == 1 or n == rank]).requires_grad_()
    distance = statistics_distance(forward_with_statistics(net(), x, across=True)[1], 10.0)
    # Every process holds the whole loss, so that each gradient is summed over as many copies of it.
    (distance / world).backward()
    return {"distance": distance.detach(), "gradient": x.grad}


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(gradient_of(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_match_the_statistics_of_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(run, args=(str(tmp_path),), nprocs=2)
    alone = gradient_of(0, 1)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for part in both:
        assert torch.allclose(part["distance"], alone["distance"], atol=1e-5)
    assert torch.allclose(torch.cat([part["gradient"] for part in both]), alone["gradient"], atol=1e-6)

"""Everything that remembers is, on two processes, what one process with the double batch has."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from limbeck.labels import (
    AverageAlignment,
    ClassAdaptive,
    DistributionAlignment,
    PredictionTable,
    RunningQuantile,
    SelfAdaptive,
    TruncatedGaussian,
)

CLASSES, SAMPLES, BATCH, STEPS = 4, 32, 8, 3


def modules() -> dict[str, nn.Module]:
    return {
        "class_adaptive": ClassAdaptive(SAMPLES, CLASSES, threshold=0.8),
        "self_adaptive": SelfAdaptive(CLASSES, decay=0.9),
        "running_quantile": RunningQuantile(CLASSES),
        "queue_alignment": DistributionAlignment(CLASSES, length=2),
        "average_alignment": AverageAlignment(CLASSES, decay=0.9),
        "truncated_gaussian": TruncatedGaussian(CLASSES, decay=0.9),
        "table": PredictionTable(torch.zeros(SAMPLES, dtype=torch.int64), CLASSES),
    }


def states_after(rank: int, world: int) -> dict[str, Tensor]:
    """The states and last answers of all modules after a few steps on this process's share of the batches."""
    found = modules()
    states = {}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        p = (torch.randn(BATCH, CLASSES, generator=generator) * 3).softmax(-1)
        index = torch.randperm(SAMPLES, generator=generator)[:BATCH]
        mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        for name, module in found.items():
            if isinstance(module, PredictionTable):
                module.write(index[mine], p[mine])
            elif isinstance(module, ClassAdaptive):
                states[f"{name}.answer"] = module(p[mine], index[mine])
            else:
                states[f"{name}.answer"] = module(p[mine])
    for name, module in found.items():
        states |= {f"{name}.{key}": value.clone() for key, value in module.state_dict().items()}
    return states


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(states_after(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_remember_what_one_with_the_double_batch_does(tmp_path: Path) -> None:
    mp.spawn(run, args=(str(tmp_path),), nprocs=2)
    alone = states_after(0, 1)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for key, value in alone.items():
        if key.endswith(".answer"):
            joined = torch.cat([part[key] for part in both])
            assert torch.allclose(joined.float(), value.float(), atol=1e-6), key
        else:
            for part in both:
                assert torch.allclose(part[key], value, atol=1e-6), key

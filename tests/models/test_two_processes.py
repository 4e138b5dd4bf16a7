"""What must hold between two processes: SyncBatchNorm equals the whole batch, taps work through DDP."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from limbeck.errors import UserError
from limbeck.models import SmallCnn, Taps, convert_sync_batchnorm

# Sizes that differ: a mean of means would be wrong.
SPLIT = (3, 5)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 7),
        nn.BatchNorm1d(7, momentum=None, affine=False),
    )


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    # Far from zero: E[x^2] - E[x]^2 would lose its digits.
    return torch.randn(8, 3, 6, 6, generator=generator) + 30, torch.randn(8, 7, generator=generator)


def normalise_together(rank: int, folder: str) -> None:
    model = convert_sync_batchnorm(net())
    image, weight = data()
    image = image.split(SPLIT)[rank].requires_grad_()
    outs = []
    for _ in range(2):
        outs.append(model(image))
    (outs[-1] * weight.split(SPLIT)[rank]).sum().backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters()}
    for grad in grads.values():
        dist.all_reduce(grad)
    saved = {"out": outs[-1].detach(), "image_grad": image.grad, "grads": grads, "state": model.state_dict()}
    torch.save(saved, f"{folder}/{rank}.pt")


def test_synchronised_statistics_equal_those_of_the_whole_batch(meeting: Path):
    parts = [torch.load(meeting / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    model, (image, weight) = net(), data()
    image.requires_grad_()
    model(image)
    out = model(image)
    (out * weight).sum().backward()
    torch.testing.assert_close(torch.cat([p["out"] for p in parts]), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([p["image_grad"] for p in parts]), image.grad, rtol=1e-3, atol=1e-5)
    for part in parts:
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(part["grads"][key], parameter.grad, rtol=1e-3, atol=1e-4)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(part["state"][key], value, rtol=1e-4, atol=1e-5)


def tap_distributed(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    model = SmallCnn(10, channels=(4, 6)).eval()
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    image = torch.rand(8, 3, 8, 8)
    mine = image.chunk(2)[rank]
    outputs = Taps(wrapped, ["stages.0", "module.stages.1"])(mine)
    features = outputs.features
    (features["stages.0"].mean() + features["module.stages.1"].mean() + outputs.logits.mean()).backward()

    whole = Taps(model, ["stages.0", "stages.1"])(image)
    (whole.features["stages.0"].mean() + whole.features["stages.1"].mean() + whole.logits.mean()).backward()
    for ours, theirs in zip(wrapped.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)

    with pytest.raises(UserError, match="stop_early"):
        Taps(wrapped, ["stages.0"], stop_early=True)(mine)
    with torch.no_grad():
        early = Taps(wrapped, ["stages.0"], stop_early=True)(mine)
    assert early.logits is None
    torch.testing.assert_close(early.features["stages.0"], whole.features["stages.0"].chunk(2)[rank])

    torch.testing.assert_close(
        Taps(torch.compile(wrapped, backend="aot_eager"), ["stages.1"])(mine).features["stages.1"],
        whole.features["stages.1"].chunk(2)[rank],
    )
    Path(f"{folder}/{rank}.tapped").touch()


def test_taps_through_ddp_give_the_features_and_gradients_of_one_process(meeting: Path):
    assert sorted(p.name for p in meeting.glob("*.tapped")) == ["0.tapped", "1.tapped"]


def both(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        normalise_together(rank, folder)
        tap_distributed(rank, folder)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def meeting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to which two processes wrote; they start once, for starting is what takes the time."""
    folder = tmp_path_factory.mktemp("meeting")
    mp.spawn(both, (str(folder),), nprocs=2)
    return folder

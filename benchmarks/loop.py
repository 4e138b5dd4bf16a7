"""The loop's price: steps of our loop against a hand-written PyTorch loop of the same mathematics, paired in one run.

    python -m benchmarks.loop

`digits`: the demo's CNN, supervised. `resnet`: a CIFAR ResNet-20 taught by a ResNet-56 (KD). Both loops slice the same
batches, apply the same view, compute the same loss in the same memory format and step the same optimiser; ours adds
schedules, metrics, the NaN guard and exact resume.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Row, finish, in_turn, judged, machine, repeat
from limbeck.data import Samples, Stream, Weak
from limbeck.methods.classification.kd import KD
from limbeck.methods.classification.supervised import Supervised
from limbeck.models import load_model
from limbeck.teachers import Frozen
from limbeck.train import Loop, Method, Optimizer, Trainer

SGD = Optimizer("sgd", lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)


def hand_written(student: nn.Module, teacher: nn.Module | None, images: Tensor, labels: Tensor, batch: int) -> Callable:
    """A plain loop, as one would write it in a script: returns a function that does one step."""
    student.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, foreach=True
    )
    view = Weak(padding=1, flip=False)
    order, position, total = torch.randperm(len(images)), 0, torch.zeros(())

    def step() -> None:
        nonlocal order, position, total
        if position + batch > len(order):
            order, position = torch.randperm(len(images)), 0
        rows = order[position : position + batch]
        position += batch
        x = view(images[rows].float() / 255).contiguous(memory_format=torch.channels_last)
        y = labels[rows]
        logits = student(x)
        loss = F.cross_entropy(logits, y)
        if teacher is not None:
            with torch.inference_mode():
                target = teacher(x).div(4).log_softmax(-1)
            kl = F.kl_div(logits.div(4).log_softmax(-1), target.clone(), reduction="batchmean", log_target=True)
            loss = 0.1 * loss + 0.9 * 16 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = total + loss.detach()

    return step


def ours(method: Method, images: Tensor, labels: Tensor, batch: int) -> Callable:
    """The same step by our loop, with a row of metrics every 20 steps."""
    stream = Stream(Samples({"image": images, "label": labels}), batch, {"weak": Weak(padding=1, flip=False)})
    loop = Loop(method, {"labelled": stream}, Trainer(steps=10**6, optimizer=SGD))
    loop.logs.start(0, 10**6)
    method.train()

    def step() -> None:
        loop.step()
        if loop.clock.step % 20 == 0:
            loop.report()

    return step


def measured(name: str, theirs: Callable, mine: Callable, steps: int, rounds: int, limit: float) -> Row:
    """Blocks of steps in turn."""
    blocks = {"hand-written": repeat(theirs, steps), "loop": repeat(mine, steps)}
    timing = in_turn(blocks, rounds)
    hand, loop = (1000 * timing.best(each) / steps for each in blocks)
    row = {"measure": name, "hand-written ms": hand, "loop ms": loop, **timing.compare("loop", "hand-written")}
    return judged(row, most=limit)


def digits() -> Row:
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (1200, 1, 8, 8), dtype=torch.uint8), torch.randint(0, 10, (1200,))
    net = load_model("small_cnn", num_classes=10, in_channels=1, config={"channels": [8, 16, 16]})
    mine = ours(Supervised(copy.deepcopy(net)), images, labels, 64)
    return measured("digits", hand_written(net, None, images, labels, 64), mine, steps=200, rounds=15, limit=1.05)


def resnet() -> Row:
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (1200, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (1200,))
    net = load_model("resnet20", num_classes=10)
    teacher = load_model("resnet56", num_classes=10).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    mine = ours(KD(copy.deepcopy(net), Frozen(copy.deepcopy(teacher))), images, labels, 64)
    return measured("resnet", hand_written(net, teacher, images, labels, 64), mine, steps=8, rounds=11, limit=1.02)


if __name__ == "__main__":
    torch.set_num_threads(2)
    where = machine()
    rows = [digits(), resnet()]
    sys.exit(0 if finish("loop", rows, {"batch": 64}, where) else 1)
